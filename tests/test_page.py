"""The summary page: everything of a results folder is in it, nothing else is needed, and a real browser
shows it as meant."""

import base64
import dataclasses
import io
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
import vl_convert
from browser import PROGRAM, Page
from PIL import Image

from selfrepair.analysis.claims import COLUMNS, LEGEND, write_claims
from selfrepair.analysis.rules import load_claims, load_statistics
from selfrepair.errors import UserError
from selfrepair.paths import NOTEBOOKS
from selfrepair.plots import forest
from selfrepair.run.page import HEADINGS, MARKS, write_page

pytestmark = pytest.mark.slow(
    "the page of a run holds what was measured, whatever names it holds, and works in a browser"
)

HOSTILE = (
    """</script><script>alert(1)</script><img src="http://example.org/x" onerror='alert(2)'>&amp; "NA" [1]"""
)
FIGURES = (
    "01_self_repair_by_depth",
    "01_effect_against_change",
    "03_ways_of_counting",
    "05_not_in_a_notebook",
    "99_of_no_notebook",
    "<&>",
)
VOID = {"meta", "link", "img"}


class Elements(HTMLParser):
    """Every element with its attributes, all text outside scripts and styles, and what is opened or closed
    wrongly."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.faults: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self._open]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> closes something else at {self.getpos()}")

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def heads(model, n_layers=2, n_heads=12, seed=0):
    """A heads table with the columns that the summary knows and one that it does not."""
    numbers = np.random.default_rng(seed)
    index = [(model, layer, head) for layer in range(n_layers) for head in range(n_heads)]
    table = pd.DataFrame(index, columns=["model", "layer", "head"])
    for name in [*HEADINGS, "self_repair_low", "self_repair_high", "of_a_later_version"]:
        table[name] = numbers.normal(size=len(table))
    table.loc[0, "direct_effect"] = -0.0001
    return table.assign(n_tokens=np.arange(len(table)) * 7 % 50)


#: What is shown of each claim: our numbers (model, estimate, low, high, what they say of it), then published
#: ones.
CLAIMS = [
    (
        "partly",
        [("pocket-a", 0.068, 0.055, 0.079, "yes"), (HOSTILE, -0.09, -0.10, 0.10, "open")],
        [("gpt2-small", 0.25), ("pythia-160m", 0.20)],
    ),
    ("not reproduced", [("pocket-a", -2.34, -2.71, -2.04, "no")], []),
    ("reproduced", [("pocket-a", 1.0, np.nan, np.nan, "yes")], []),
    ("not testable here", [("pocket-a", np.nan, np.nan, np.nan, "")], []),
    ("reproduced", [("NA", 0.5, 0.4, 0.6, "yes")], []),
]


#: One passage for every head of two of the models, with a text that could be taken for an element.
TOKENS = {
    model: {
        f"L{layer}H{head}": [
            {
                "tokens": [["<b>The", None, None], [" cat", 1.5, -0.4], ["\n<img>", 0.2, 0.8]],
                "marked": 1,
                "prompt": 7,
            }
        ]
        for layer in range(2)
        for head in range(12)
    }
    for model in ("pocket-a", HOSTILE)
}


def long_table():
    """Claims as notebooks keep them, with the verdicts that ``CLAIMS`` names."""
    rows = []
    for claim, (_, measured, published) in zip(load_claims(), CLAIMS, strict=False):
        statistic = load_statistics()[claim.statistic]
        about = {
            "claim": claim.id,
            "notebook": claim.notebook,
            "statistic": statistic.id,
            "unit": statistic.unit,
        }
        for model, estimate, low, high, holds in measured:
            found = {"estimate": estimate, "low": low, "high": high, "holds": holds}
            rows.append(about | found | {"model": model, "source": "measured"})
        for model, estimate in published:
            rows.append(about | {"model": model, "source": "published", "estimate": estimate, "holds": "yes"})
    return pd.DataFrame(rows, columns=list(COLUMNS))


@pytest.fixture
def results(tmp_path):
    """A results folder such as a run leaves, of three models, two of them with names that could be taken for
    something else."""
    folder = tmp_path / "pocket"
    (folder / "figures").mkdir(parents=True)
    for number, name in enumerate(FIGURES):
        image = Image.new("RGBA", (300 + 400 * number, 200), (40 * number, 80, 120, 255))
        image.save(folder / "figures" / f"{name}.png")
    for _, table in long_table().groupby("notebook"):
        write_claims(table, folder)
    for seed, ablation in enumerate(("mean", "resample", "zero")):
        tables = [
            heads("pocket-a", seed=seed),
            heads(HOSTILE, n_heads=2, seed=seed),
            heads("NA", n_heads=3, seed=10 + seed),
        ]
        pd.concat(tables).to_csv(folder / f"heads_{ablation}.csv", index=False, float_format="%.6g")
    (folder / "head_tokens.json").write_text(json.dumps({"ablation": "mean", "models": TOKENS}))
    comparison = [
        {
            "model": "gpt2",
            "quantity": "direct_effect",
            "unit": "logits",
            "n_heads": 144,
            "correlation": 0.98765,
            "mean_ours": 1.5,
        },
        {
            "model": "gpt2",
            "quantity": "self_repair",
            "unit": "logits",
            "n_heads": 144,
            "correlation": np.nan,
            "mean_ours": 0.25,
        },
    ]
    pd.DataFrame(comparison).to_csv(folder / "comparison.csv", index=False)
    manifest = {
        "profile": {"models": ["pocket-a", HOSTILE], "dataset": None},
        "seconds": 480.3,
        "packages": {f"package-{number}": f"1.{number}" for number in range(20)},
        "machine": {"cores": 2, "accelerators": []},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def page(results):
    return Elements(write_page(results).read_text(encoding="utf-8"))


# --- what the page holds
# -------------------------------------------------------------------------------------------


def test_is_well_formed(page):
    assert page.faults == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    sections = [section["id"] for section in page.all("section")]
    assert [link["href"] for link in page.all("a")] == [f"#{id}" for id in sections]


def test_every_figure_is_there_pixel_by_pixel_under_its_notebook(page, results):
    images = {image["alt"]: image for image in page.all("img") if "src" in image}
    assert len(images) == len(FIGURES)
    for name in FIGURES:
        image = images[re.sub(r"^\d\d_", "", name).replace("_", " ").capitalize()]
        kind, content = image["src"].split(",")
        assert kind == "data:image/webp;base64"
        with (
            Image.open(io.BytesIO(base64.b64decode(content))) as shown,
            Image.open(results / "figures" / f"{name}.png") as drawn,
        ):
            assert np.array_equal(shown.convert("RGBA"), drawn)
            assert (int(image["width"]), int(image["height"])) == drawn.size
    order = [
        page.text.index(caption)
        for caption in ("Self repair by depth", "Effect against change", "Ways of counting", "Of no notebook")
    ]
    assert order == sorted(order), "as the notebooks draw them, the others last"


def test_a_notebooks_title_question_and_headings_are_there(page):
    first = nbformat.read(next(NOTEBOOKS.glob("01_*.ipynb")), as_version=4)
    title, question = (
        line for line in first.cells[0].source.splitlines() if line.startswith(("# ", "**Question.**"))
    )
    assert title.removeprefix("# ") in page.text
    assert question.removeprefix("**Question.**").strip().replace("*", "") in page.text
    heading = [
        line.removeprefix("## ")
        for cell in first.cells[: [FIGURES[0] in cell.source for cell in first.cells].index(True)]
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ][-1]
    assert f"{heading} Self repair by depth" in page.text


def test_a_notebooks_text_is_shown_as_text_with_emphasis(results, tmp_path, monkeypatch):
    cells = [
        nbformat.v4.new_markdown_cell(f"# {HOSTILE}\n\n**Question.** Is *it* {HOSTILE}?"),
        nbformat.v4.new_code_cell(f'"{FIGURES[0]}"'),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01_x.ipynb")
    monkeypatch.setattr("selfrepair.run.page_figures.NOTEBOOKS", tmp_path)
    page = Elements(write_page(results).read_text())
    assert page.faults == []
    assert len(page.all("em")) == 1 + LEGEND.count("*") // 2
    assert f"{HOSTILE} Is it {HOSTILE}? Self repair by depth" in page.text


def test_every_claim_is_there(page):
    statistics = load_statistics()
    for claim, (verdict, *_) in zip(load_claims(), CLAIMS, strict=False):
        assert f"{claim.claim} {claim.source} {verdict}" in page.text
        statistic = statistics[claim.statistic]
        control = f"{statistic.control}, {statistic.control_is}"
        if statistic.control_id is not None:
            control = statistics[statistic.control_id].sentence
        rule = f"{statistic.sentence}; {claim.rule}; control: {control}"
        assert f"{rule} Rule written {claim.written} looking, {claim.date} {claim.notebook}" in page.text
    assert "pocket-a 0.068 [0.055, 0.079] yes" in page.text
    first = statistics[load_claims()[0].statistic].sentence
    assert (
        f"{HOSTILE} -0.09 [-0.10, 0.10] open gpt2-small 0.25 yes pythia-160m 0.20 yes reproduced {first}"
        in page.text
    )
    assert "1 not reproduced 1 not testable here" in page.text
    marks = Counter(
        mark
        for span in page.all("span")
        for mark in (span.get("class") or "").split()
        if mark in MARKS.values()
    )
    assert marks == {"yes": 5, "partly": 3, "no": 3, "untested": 2}, (
        "each verdict in its row, in the tally and, if it has a number, beside its strip"
    )


def test_every_head_is_there_for_every_ablation_best_known_first(page, results):
    table = pd.read_csv(results / "heads_mean.csv")
    row = table.iloc[13]
    interval = f"{row.self_repair:.3f} [{row.self_repair_low:.3f}, {row.self_repair_high:.3f}]"
    assert "-0.000" not in page.text
    assert f"L1H1 {interval} {row.direct_effect:.3f} {row.logit_change:.3f}" in page.text
    assert len(re.findall(r"\bL\dH\d", page.text)) == 3 * len(table)
    assert (
        page.text.index("pocket-a: 24 heads resample ablation")
        < page.text.index("mean ablation")
        < page.text.index("zero ablation")
    )
    for heading in (*HEADINGS.values(), "of a later version"):
        assert page.text.count(heading) >= 9, "in the tables of three models under three ablations"


def test_comparison_and_manifest_are_there(page):
    assert "gpt2 direct_effect logits 144 0.988 1.500 gpt2 self_repair logits 144 – 0.250" in page.text
    assert f"models pocket-a {HOSTILE} dataset – seconds 480.3 packages 20 entries package-0 1.0" in page.text
    assert "machine cores 2 accelerators –" in page.text


def test_names_are_shown_as_text(page):
    assert f"{HOSTILE}: 4 heads" in page.text
    assert "NA: 6 heads" in page.text
    assert len(page.all("script")) == 5, "the page's own, Vega's, the explorer's, its data and its charts"
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_nothing_is_fetched(page, results):
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    source = (results / "index.html").read_text()
    written = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", source, flags=re.DOTALL)
    own = "".join(text for text in written if text != vl_convert.javascript_bundle())
    assert own
    assert not re.search(r"url\(|@import|https?:|fetch|XMLHttpRequest|WebSocket|import\(", own)
    policy = next(
        meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_same_results_same_bytes(results, tmp_path):
    first = write_page(results).read_bytes()
    assert write_page(results).read_bytes() == first
    places = [tmp_path / name / "page.html" for name in ("one", "other")]
    assert [write_page(results, place) for place in places] == places
    assert places[0].read_bytes() == places[1].read_bytes()


def test_a_run_links_its_notebooks_as_html_and_the_committed_page_those_of_the_repository(results):
    (results / "notebooks").mkdir()
    (results / "notebooks" / "01_self_repair_across_models.html").touch()
    page = Elements(write_page(results).read_text())
    links = [link["href"] for link in page.all("a") if not link["href"].startswith("#")]
    assert links == ["notebooks/01_self_repair_across_models.html"]
    elsewhere = write_page(results, results.parent / "elsewhere" / "index.html")
    page = Elements(elsewhere.read_text())
    links = [link["href"] for link in page.all("a") if not link["href"].startswith("#")]
    assert [(elsewhere.parent / link).resolve() for link in links] == sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    assert page.faults == []


# --- what is missing or broken
# -------------------------------------------------------------------------------------

PARTS = {
    "claims": ["figures/claims.csv"],
    "comparison": ["comparison.csv"],
    "heads": ["heads_mean.csv", "heads_resample.csv", "heads_zero.csv"],
    "run": ["manifest.json"],
    "figures-": [f"figures/{name}.png" for name in FIGURES],
}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_missing_is_left_out(results, part):
    for name in PARTS[part]:
        (results / name).unlink()
    page = Elements(write_page(results).read_text())
    assert page.faults == []
    sections = [section["id"] for section in page.all("section")]
    assert {other for other in PARTS if any(id.startswith(other) for id in sections)} == set(PARTS) - {part}
    assert [link["href"] for link in page.all("a")] == [f"#{id}" for id in sections]


@pytest.mark.parametrize("made", [False, True])
def test_nothing_to_show_is_one_line(tmp_path, made):
    folder = tmp_path / "none"
    if made:
        folder.mkdir()
    with pytest.raises(UserError, match=r"none: holds no figures.*run a profile into it") as raised:
        write_page(folder)
    assert "\n" not in str(raised.value)
    assert not (folder / "index.html").exists()


@pytest.mark.slow("a damaged file of a run is one line, not a page with holes")
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[1]", b"a,b\n1,2\n", b'"', b"model,layer,head\n1,2,3,4\n5,6,7,8,9\n"]
)
@pytest.mark.parametrize(
    "name",
    [
        *(f"figures/{FIGURES[0]}.png", "figures/claims.csv", "heads_mean.csv", "comparison.csv"),
        *("manifest.json", "head_tokens.json"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(results, name, content):
    (results / "index.html").write_text("of an earlier run")
    (results / name).write_bytes(content)
    with pytest.raises(
        UserError, match=r"cannot be read \(\w+\); delete it and run again what made it"
    ) as raised:
        write_page(results)
    assert str(results / name) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (results / "index.html").read_text() == "of an earlier run"


# --- in a browser
# --------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    PROGRAM is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Page(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.fixture
def shown(browser, results):
    """The page of a run in the browser, whose list of complaints and requests is then empty."""
    path = write_page(results)
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(path)
    return browser


def column(browser, table, number):
    """The shown texts of one column of the first table of a class."""
    cells = f"document.querySelector('{table}').tBodies[0].rows"
    return browser.run(f"[...{cells}].map(row => row.cells[{number}].innerText.trim())")


@needs_browser
def test_the_browser_reports_what_goes_wrong(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<img src='http://localhost:9/x.png'><script>console.error('broken'); nothing.here()</script>"
    )
    browser.open(page)
    assert any("broken" in complaint for complaint in browser.complaints)
    assert any("nothing is not defined" in complaint for complaint in browser.complaints)
    assert browser.requests == ["http://localhost:9/x.png"]


@needs_browser
def test_images_load_and_nothing_is_complained_of_or_asked_for(shown):
    widths = shown.run("[...document.querySelectorAll('figure img')].map(image => image.naturalWidth)")
    assert sorted(widths) == [300 + 400 * number for number in range(len(FIGURES))]
    assert (
        shown.run("getComputedStyle(document.querySelector('.verdict.yes')).backgroundColor")
        == "rgb(0, 105, 163)"
    )
    assert (shown.complaints, shown.requests) == ([], [])


@needs_browser
def test_a_page_of_the_repository_shows_the_figures_beside_it(browser, results, tmp_path):
    beside = tmp_path / "a figure's folder"
    shutil.copytree(results / "figures", beside)
    browser.open(write_page(results, beside / "index.html"))
    widths = browser.run("[...document.querySelectorAll('figure img')].map(image => image.naturalWidth)")
    assert sorted(widths) == [300 + 400 * number for number in range(len(FIGURES))]
    browser.click("figure button")
    assert browser.run("document.querySelector('dialog img').naturalWidth") > 0
    assert (browser.complaints, browser.requests) == ([], [])
    assert "base64" not in re.sub("sha256-", "", (beside / "index.html").read_text(encoding="utf-8"))


@needs_browser
def test_the_policy_stops_what_the_page_does_not_hold(shown):
    shown.run(
        "document.body.insertAdjacentHTML('beforeend', `<img src='http://localhost:9/x.png' "
        "onerror='document.title = 1'>`)"
    )
    shown.run("new Promise(resolve => setTimeout(resolve, 200))")
    assert any("Content Security Policy" in complaint for complaint in shown.complaints)
    assert shown.run("document.title") == "Self-repair: pocket"


@needs_browser
def test_claims_sort_by_verdict_and_text(shown):
    order = list(MARKS)
    shown.click(".claims th:nth-child(2) button")
    assert column(shown, ".claims", 1) == sorted(column(shown, ".claims", 1), key=order.index)
    claims = [claim.claim for claim in load_claims()]
    in_order = [claims[number] for number in (2, 4, 0, 1, 3)]
    assert all(map(str.startswith, column(shown, ".claims", 0), in_order))
    shown.click(".claims th:nth-child(2) button")
    assert column(shown, ".claims", 1) == [
        "not testable here",
        "not reproduced",
        "partly",
        "reproduced",
        "reproduced",
    ]
    shown.click(".claims th:nth-child(1) button")
    texts = column(shown, ".claims", 0)
    assert texts == sorted(texts, key=str.casefold)
    sorted_by = (
        "[...document.querySelectorAll('.claims th')].map(heading => heading.getAttribute('aria-sort'))"
    )
    assert shown.run(sorted_by)[:6] == ["ascending", None, None, None, None, None]


@needs_browser
def test_heads_sort_as_numbers_by_mouse_and_keyboard(shown):
    assert shown.run("document.querySelector('details table').checkVisibility()") is False
    shown.click("details summary")
    assert shown.run("document.querySelector('details table').checkVisibility()") is True
    named = [f"L{layer}H{head}" for layer in range(2) for head in range(12)]
    assert column(shown, "details table", 0) == named
    shown.click("details th:nth-child(2) button")
    values = [float(text.split()[0]) for text in column(shown, "details table", 1)]
    assert values == sorted(values)
    assert values[0] < 0 < values[-1]
    shown.press("Enter", 13, "\r")
    values = [float(text.split()[0]) for text in column(shown, "details table", 1)]
    assert values == sorted(values, reverse=True)
    shown.click("details th:nth-child(1) button")
    assert column(shown, "details table", 0) == named, "L0H2 before L0H10"


@needs_browser
def test_missing_numbers_sort_last_both_ways(shown):
    correlation = "#comparison th:nth-child(5) button"
    for _ in range(2):
        shown.click(correlation)
        assert column(shown, "#comparison table", 4) == ["0.988", "–"]
    assert shown.run("document.querySelector('#comparison th:nth-child(5)').ariaSort") == "descending"


@needs_browser
def test_a_figure_is_enlarged_and_put_away(shown):
    shown.click("#figures-03 .enlarge")
    assert shown.run(
        "(image => [image.alt, image.naturalWidth, image.width])(document.querySelector('dialog[open] img'))"
    ) == [
        "Ways of counting",
        1100,
        1100,
    ]
    shown.press("Escape", 27)
    assert shown.run("document.querySelector('dialog[open]')") is None
    shown.click(".enlarge")
    shown.click("dialog button")
    assert shown.run("document.querySelector('dialog[open]')") is None


def test_every_claim_with_a_number_has_a_strip(page, results):
    """With every estimate, interval, control and published number under the pointer."""
    shown = [
        claim
        for claim, (_, measured, _) in zip(load_claims(), CLAIMS, strict=False)
        if measured[0][1] == measured[0][1]
    ]
    (figure,) = [of for of in page.all("figure") if of.get("class") == "forest"]
    assert figure
    strips = [of for of in page.all("svg") if of.get("role") == "img"]
    assert len(strips) == len(shown)
    assert all(
        part in page.text for part in ("pocket-a: 0.068 [0.055, 0.079]", "gpt2-small, published: 0.25")
    )
    assert f"{HOSTILE}: -0.09 [-0.1, 0.1]" in page.text


def test_a_strip_places_numbers_on_its_scale():
    claim, *_ = load_claims()
    numbers = {"source": "measured", "low": 1.0, "high": 3.0, "control": 0.0}
    rows = pd.DataFrame(
        [{"model": "a", "estimate": 2.0, **numbers}, {"model": "b", "estimate": 3.0, **numbers}]
    )
    looks = {"a": ("#111111", "o"), "b": ("#222222", "s")}
    drawn = str(forest.strip(dataclasses.replace(claim, at_least=0.0, at_most=4.0), rows, looks))
    left, right = forest.MARGIN, forest.WIDTH - forest.MARGIN
    middle = (left + right) / 2
    assert f'class="range" d="M{left:.1f} 0H{right:.1f}' in drawn, "0 to 4 is the whole scale"
    assert f'fill="#111111" transform="translate({middle:.1f} ' in drawn
    assert f'stroke="#222222" stroke-width="1.6" d="M{left + (right - left) / 4:.1f} ' in drawn
    assert drawn.count(f'class="control" transform="translate({left:.1f} ') == 2


def test_the_committed_page_says_where_the_explorer_is(results, tmp_path):
    small = write_page(results, tmp_path / "committed" / "index.html")
    page = Elements(small.read_text(encoding="utf-8"))
    assert "results/pocket/index.html" in page.text
    assert "zero ablation" not in page.text and "the page of a run has mean, zero too" in page.text
    assert len(page.all("script")) == 1
    assert small.stat().st_size < 0.15 * write_page(results).stat().st_size


@pytest.fixture
def explorer(shown):
    shown.wait_for("document.getElementById('explorer').dataset.ready")
    return shown


def choose(browser, name, value):
    """Chooses an option of a list, as a keyboard does."""
    browser.run(
        f"(list => {{ list.focus(); list.value = {json.dumps(value)}; "
        f"list.dispatchEvent(new Event('change')); }})(document.getElementById('explorer-{name}'))"
    )


POINTS = "document.querySelectorAll('#explorer-chart path[aria-roledescription=point]')"


@needs_browser
def test_a_click_on_a_head_shows_what_repairs_it_and_its_tokens(explorer, results):
    table = pd.read_csv(results / "heads_resample.csv", keep_default_na=False).query("model == 'pocket-a'")
    choose(explorer, "model", "pocket-a")
    assert explorer.run(f"{POINTS}.length") == len(table)
    assert explorer.run("document.getElementById('explorer-detail').checkVisibility()") is False
    outermost = table.loc[table["self_repair"].idxmax()]  # nothing lies over it
    place = f"L{outermost['layer']}H{outermost['head']}"
    number = table.index.get_loc(outermost.name)
    explorer.run(f"{POINTS}[{number}].id = 'one'")
    explorer.click("#one")
    explorer.wait_for("document.getElementById('explorer-name').innerText != ''")
    assert (
        explorer.run("document.getElementById('explorer-name').innerText")
        == f"pocket-a, {place}, resample ablation"
    )
    said = explorer.run("document.getElementById('explorer-numbers').innerText")
    assert f"self-repair {outermost['self_repair']:.3f}" in said
    bars = explorer.run("document.querySelectorAll('#explorer-split path[aria-roledescription=bar]').length")
    assert bars == 3
    assert explorer.run("document.querySelector('#explorer-split svg').clientWidth") > 300
    assert explorer.run("document.querySelector('.passage mark').innerText").strip() == "cat"
    assert "<b>The cat↵<img>" in explorer.run("document.querySelector('.passage').innerText")
    assert (
        explorer.run("document.querySelector('.passage mark').title")
        == "direct effect 1.5, self-repair -0.4 (logits)"
    )
    assert (explorer.complaints, explorer.requests) == ([], [])


@needs_browser
def test_pointing_at_a_head_shows_its_numbers(explorer):
    choose(explorer, "model", HOSTILE)
    explorer.run(f"{POINTS}[0].id = 'one'")
    explorer.click("#one")
    explorer.wait_for("document.querySelector('#vg-tooltip-element.visible')")
    text = explorer.run("document.getElementById('vg-tooltip-element').innerText")
    assert "direct effect" in text and "<script>alert(1)" in text
    assert explorer.run("document.querySelectorAll('#vg-tooltip-element :is(script, img)').length") == 0
    assert (explorer.complaints, explorer.requests) == ([], [])


@needs_browser
def test_lists_filter_and_choose_without_a_mouse(explorer):
    everything = explorer.run(f"{POINTS}.length")
    assert everything == 24 + 4 + 6
    choose(explorer, "model", "NA")
    assert explorer.run(f"{POINTS}.length") == 6
    heads = explorer.run("[...document.getElementById('explorer-head').options].map(one => one.text)")
    assert heads == ["choose a head", *(f"NA L{layer}H{head}" for layer in range(2) for head in range(3))]
    explorer.run("document.getElementById('explorer-head').focus()")
    for _ in range(2):
        explorer.press("ArrowDown", 40)
    name = "document.getElementById('explorer-name').innerText"
    assert explorer.run(name) == "NA, L0H1, resample ablation"
    assert explorer.run("document.querySelectorAll('.passage').length") == 0, "this model has no tokens"
    before = explorer.run("document.getElementById('explorer-numbers').innerText")
    choose(explorer, "kind", "zero")
    assert explorer.run(name) == "NA, L0H1, zero ablation", "the head stays chosen"
    assert explorer.run("document.getElementById('explorer-numbers').innerText") != before
    choose(explorer, "model", "pocket-a")
    assert explorer.run("document.getElementById('explorer-detail').checkVisibility()") is False
    assert (explorer.complaints, explorer.requests) == ([], [])


@needs_browser
@pytest.mark.parametrize("width", [360, 820, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_only_tables_scroll_sideways(shown, results, width, dark):
    shown.open(results / "index.html", width, 740, dark)
    shown.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    shown.wait_for("document.getElementById('explorer').dataset.ready")
    choose(shown, "head", f"{HOSTILE} L1H0")
    assert shown.run("document.querySelector('#explorer-chart svg').clientWidth") <= width
    assert shown.run(
        "[innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth]"
    ) == [width, 0]
    assert shown.run(
        "(table => table.scrollWidth > table.clientWidth)(document.querySelector('details .scroll'))"
    )
    background = shown.run("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", background)[0]) < 128) == dark
