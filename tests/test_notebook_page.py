"""Executed notebooks as HTML: what a reader sees of them, offline, on a phone too."""

import re
from base64 import b64encode
from io import BytesIO

import nbformat
import pytest
from browser import PROGRAM, Page
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from PIL import Image

from selfrepair.errors import UserError
from selfrepair.run.notebook_page import write_notebook_pages
from selfrepair.run.notebooks import WIDGET, all_notebooks, without_widgets

pytestmark = pytest.mark.slow("every notebook can be read as a page, with its formulas, links and figures")

FORMULA = r"\text{floor} = \tfrac12\,\mathrm{mean}\,\min\!\left(\left|\frac{\text{part}}{\mathrm{DE}}\right|, 1\right)"
ALIGNED = r"\begin{aligned} a &= b + c \\ d &= e \end{aligned}"
TEXT = rf"""# 01 · A title <&>

**Question.** Is $\sigma_\mathrm{{clean}} < 1$? See [the glossary](00_by_hand.ipynb#Glossary), [the next](02_next.ipynb),
[below](#One-head-by-hand), [the models](../shared/models/README.md) and [a paper](https://arxiv.org/abs/2402.15390).

$${FORMULA} = {FORMULA} = {FORMULA}$$

## One head by hand

$${ALIGNED}$$

| {" | ".join(f"column-{number}" for number in range(12))} |
|{" --- |" * 12}
|{" 0.123 |" * 12}

<details><summary>Answer</summary>

It *does*, as $u \cdot c$ says. $\nonsense_a_b$

</details>
"""
TABLE = "<table class='dataframe'><tr>" + "<td>0.123456</td>" * 30 + "</tr></table>"


def png(width, height=200):
    content = BytesIO()
    Image.new("RGB", (width, height), "#0173b2").save(content, "png")
    return b64encode(content.getvalue()).decode()


def shown(data):
    return new_output("display_data", data)


def notebook(out_dir="/a/folder"):
    """With everything that notebooks hold once they have run."""
    hidden = {"jupyter": {"source_hidden": True}}
    cells = [
        new_markdown_cell(TEXT),
        new_code_cell('model = None\nout_dir = None', metadata={"tags": ["parameters"]}),
        new_code_cell(f'model = "a"\nout_dir = "{out_dir}"', metadata={"tags": ["injected-parameters"]}),
        new_code_cell("print('<b>' + 'x' * 300)  # " + "y" * 200, outputs=[new_output("stream", text="<b>" + "x" * 300)]),
        new_code_cell("secret_1 = 1", metadata={"tags": ["remove-input"]}, outputs=[shown({"text/markdown": "**What to see.** $\\beta$"})]),
        new_code_cell("secret_2 = 2", metadata=hidden, outputs=[new_output("stream", text="said")]),
        new_code_cell("secret_3 = 3", metadata={"jupyter": {"source_hidden": True, "outputs_hidden": True}}, outputs=[new_output("stream", text="secret_4")]),
        new_code_cell("controls", outputs=[shown({WIDGET: {"model_id": "1"}, "text/plain": "HBox(children=())"}), shown({"text/html": TABLE, "text/plain": "0.12"})]),
        new_code_cell('save(figure, "01_by_layer")\nsave(figure, "01_other_one")', outputs=[shown({"image/png": png(1300), "text/plain": "<Figure>"}), shown({"image/png": png(60)})]),
        new_code_cell("table", outputs=[new_output("execute_result", {"text/plain": "a      b\n" + "1.0  " * 60}, execution_count=1)]),
    ]  # fmt: skip
    metadata = {"widgets": {}, "papermill": {"start_time": out_dir}}
    return without_widgets(nbformat.v4.new_notebook(cells=cells, metadata=metadata))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A results folder with three notebooks."""
    made = tmp_path_factory.mktemp("results")
    (made / "notebooks").mkdir()
    others = {"00_by_hand": "# 00 · By hand\n\n## Glossary", "02_next": "# 02 · Next"}
    for name, text in others.items():
        nbformat.write(
            nbformat.v4.new_notebook(cells=[new_markdown_cell(text)]), made / "notebooks" / f"{name}.ipynb"
        )
    nbformat.write(notebook(), made / "notebooks" / "01_title.ipynb")
    pages = write_notebook_pages(made)
    assert [page.name for page in pages] == ["00_by_hand.html", "01_title.html", "02_next.html"]
    return made


@pytest.fixture(scope="module")
def page(folder):
    return BeautifulSoup((folder / "notebooks" / "01_title.html").read_text(encoding="utf-8"), "html.parser")


def test_text_code_and_outputs_are_there_and_what_is_hidden_is_not(page):
    assert page.title.text == page.h1.contents[0] == "01 · A title <&>"
    text = page.main.text
    for part in (
        "Question.",
        "One head by hand",
        "column-11",
        "Answer",
        "It does",
        "<b>xxx",
        "said",
        "What to see.",
        "0.123456",
    ):
        assert part in text
    assert "secret" not in text and "HBox" not in text and "<Figure>" not in text
    assert 'model = "a"' in text and "/a/folder" not in page.decode(), (
        "where it was run is nothing to the reader"
    )


def test_formulas_are_mathml(page):
    assert "$" not in page.main.text and r"\frac" not in page.main.text
    formulas = page.find_all("math")
    assert [formula["display"] for formula in formulas] == ["inline", "block", "block", "inline", "inline"]
    assert formulas[0].text == "σclean<1" and len(formulas[1].find_all("mfrac")) == 6
    rows = formulas[2].find_all("mtr")
    assert ["".join(row.text.split()) for row in rows] == ["a=b+c", "d=e"]
    assert page.details.code.text == r"\nonsense_a_b", "as it is written, where the converter gives up"


def test_links_lead_to_neighbours_as_html(page):
    found = {link.text: link.get("href") for link in page.main.find_all("a") if link.text != "¶"}
    assert found == {
        "the glossary": "00_by_hand.html#Glossary",
        "the next": "02_next.html",
        "below": "#One-head-by-hand",
        "a paper": "https://arxiv.org/abs/2402.15390",
    }
    assert "the models (shared/models/README.md)" in page.main.text
    for nav in page.find_all("nav"):
        assert {link.text.strip(" ←→"): link["href"] for link in nav.find_all("a")} == {
            "00 · By hand": "00_by_hand.html",
            "Results page": "../index.html",
            "02 · Next": "02_next.html",
        }


def test_pictures_say_what_they_show(page):
    assert [image["alt"] for image in page.find_all("img")] == ["By layer", "Other one"]


def test_nothing_is_fetched_and_no_script_runs(page):
    assert page.find_all("script") == []
    fetched = [
        tag[name] for tag in page.find_all() for name in ("src", "srcset", "data") if name in tag.attrs
    ]
    assert fetched and all(address.startswith("data:") for address in fetched)
    assert [link["href"] for link in page.find_all("link") if link["rel"] != ["icon"]] == []
    assert not re.search(r"url\(|@import|https?:", "".join(style.text for style in page.find_all("style")))
    (policy,) = (meta["content"] for meta in page.find_all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_the_same_notebook_gives_the_same_bytes_in_whatever_folder_it_was_run(folder, tmp_path):
    (tmp_path / "notebooks").mkdir()
    for source in (folder / "notebooks").glob("*.ipynb"):
        (tmp_path / "notebooks" / source.name).write_bytes(source.read_bytes())
    nbformat.write(notebook("/another/one"), tmp_path / "notebooks" / "01_title.ipynb")
    for one in write_notebook_pages(tmp_path):
        assert one.read_bytes() == (folder / "notebooks" / one.name).read_bytes()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"cells": 3}'])
def test_a_notebook_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_a.ipynb").write_text(content)
    with pytest.raises(
        UserError, match=r"01_a.ipynb: cannot be read \(\w+\); delete it and run again"
    ) as raised:
        write_notebook_pages(tmp_path)
    assert "\n" not in str(raised.value)


# --- the notebooks of the repository -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    made = tmp_path_factory.mktemp("committed")
    (made / "notebooks").mkdir()
    for one in all_notebooks():
        (made / "notebooks" / one.path.name).write_bytes(one.path.read_bytes())
    write_notebook_pages(made)
    return made / "notebooks"


@pytest.mark.parametrize("notebook", all_notebooks(), ids=lambda notebook: notebook.stem)
def test_every_formula_and_every_link_of_the_committed_notebooks_comes_through(committed, notebook):
    pages = {
        path.name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in committed.glob("*.html")
    }
    page = pages[f"{notebook.stem}.html"]
    formulas = page.find_all("math")
    assert formulas and not [formula.text for formula in formulas if re.search(r"[\\$&]", formula.text)]
    text = " ".join(part.text for part in page.main.find_all(["p", "li", "td", "th"]))
    assert "$" not in text and not re.search(r"\\[a-z]{2,}", text)  # a line end may be shown as \\n
    for link in page.find_all("a"):
        name, _, anchor = link["href"].partition("#")
        if re.match(r"\w+:", name) or name == "../index.html":
            continue
        ids = {tag["id"] for tag in pages[name or f"{notebook.stem}.html"].find_all(id=True)}
        assert not anchor or anchor in ids, link["href"]


# --- in a browser ------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    PROGRAM is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)"
)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SCROLLS = "[...document.querySelectorAll('{}')].map(box => box.scrollWidth > box.clientWidth)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Page(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@needs_browser
def test_on_a_phone_only_what_is_wide_scrolls_in_its_own_box(browser, folder):
    browser.open(folder / "notebooks" / "01_title.html", 375, 800)
    assert browser.run(f"[innerWidth, {OVERFLOW}]") == [375, 0]
    assert browser.run(SCROLLS.format("main > .scroll")) == [True], "the table of the text"
    assert browser.run(SCROLLS.format(".output > .scroll")) == [True, True, False], "table and pictures"
    assert any(browser.run(SCROLLS.format(".code pre"))) and browser.run(SCROLLS.format("pre.columns")) == [
        True
    ]
    assert browser.run(SCROLLS.format(".output > pre:not(.columns)")) == [False, False], (
        "text is broken into lines"
    )
    assert browser.run(SCROLLS.format("p:has(math[display=block])"))[0] is True


@needs_browser
def test_formulas_are_drawn_and_pictures_load(browser, folder):
    browser.open(folder / "notebooks" / "01_title.html")
    size = "(shape => [shape.width, shape.height])"
    fraction, letter = (
        browser.run(f"{size}(document.querySelector('{name}').getBoundingClientRect())")
        for name in ("mfrac", "mi")
    )
    assert fraction[1] > 1.2 * letter[1] > 0, "a fraction is higher than a letter"
    assert browser.run("[...document.images].map(image => image.naturalWidth)") == [1300, 60]
    assert browser.run(SCROLLS.format(".picture")) == [False, False]


@needs_browser
@pytest.mark.parametrize("notebook", all_notebooks(), ids=lambda notebook: notebook.stem)
def test_committed_notebooks_open_without_complaint_request_or_sideways_scrolling(
    browser, committed, notebook
):
    browser.complaints.clear()
    browser.requests.clear()
    for width in (1280, 375):
        browser.open(committed / f"{notebook.stem}.html", width, 800)
        browser.run("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert browser.run(f"[innerWidth, {OVERFLOW}]") == [width, 0]
        assert browser.run("document.querySelectorAll('math').length") > 0
    assert (browser.complaints, browser.requests) == ([], [])
