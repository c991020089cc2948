"""What ``./run_all.sh --update`` writes over the committed files, and that a run which is refused changes
none of them."""

import re
import shutil
import zlib

import nbformat
import pandas as pd
import pytest
from PIL import Image

from selfrepair.analysis.rules import VERDICTS
from selfrepair.errors import UserError
from selfrepair.paths import FIGURES, NOTEBOOKS, REPOSITORY
from selfrepair.run import committed, notebooks, page_figures
from selfrepair.run.study import Study

README, CLAIMS_PAGE = (
    f"# Title\n\n{begin}old\n{end}after\n" for begin, end in (committed.FINDINGS, committed.CLAIMS)
)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    out = tmp_path / "results" / "pocket"
    (out / "figures").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(out / "figures" / "01_a.png")
    (out / "figures" / "claims.md").write_text("| claim |\n")
    shutil.copy(FIGURES / "pocket" / "claims.csv", out / "figures")
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "claims.md").write_text(CLAIMS_PAGE)
    for module in (notebooks, page_figures):
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    for name, value in (("FIGURES", "figures"), ("README", "README.md"), ("CLAIMS_PAGE", "docs/claims.md")):
        monkeypatch.setattr(committed, name, tmp_path / value)
    return tmp_path


def update(repository, refuse=None):
    study = Study.of("pocket", out_dir=repository / "results" / "pocket")

    def summarise():
        before = {path.read_text() for path in (repository / "notebooks").iterdir()}
        assert not any('"execution_count": 1' in text for text in before), "the tree is still clean"
        if refuse is not None:
            raise UserError(refuse)
        (study.out_dir / "index.html").write_text(study.profile.name)

    committed.update_committed(study, summarise)


def write(repository, name, source):
    """A notebook, and what its run left of it: with a cell of the run's own parameters, and other metadata."""
    v4 = nbformat.v4
    cells = [v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}), v4.new_markdown_cell("text")]
    notebook = v4.new_notebook(cells=[*cells, v4.new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, repository / "notebooks" / f"{name}.ipynb")
    own = v4.new_code_cell("out_dir = 1", metadata={"tags": ["injected-parameters"]}, execution_count=2)
    output = v4.new_output("execute_result", data={"text/plain": "5"}, execution_count=3)
    notebook.cells[0].execution_count, notebook.cells[2].execution_count = 1, 3
    notebook.cells[2].outputs = [output, v4.new_output("stream", text="5 heads\n")]
    notebook.cells[2].metadata["papermill"] = {"duration": 2}
    notebook.cells.insert(1, own)
    (repository / "results" / "pocket" / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, repository / "results" / "pocket" / "notebooks" / f"{name}.ipynb")


def test_everything_is_refreshed_from_the_run(repository):
    write(repository, "01_works", "2 + 3")
    figures = repository / "figures" / "pocket"
    figures.mkdir(parents=True)
    (figures / "01_of_before.png").write_bytes(b"old")
    run = repository / "results" / "pocket"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    update(repository)
    assert {file.name for file in figures.iterdir()} == {"01_a.png", "claims.md", "claims.csv", "index.html"}
    cells = nbformat.read(repository / "notebooks" / "01_works.ipynb", 4).cells
    assert [cell.source for cell in cells] == ["seed = 0", "text", "2 + 3"]
    assert [cell.execution_count for cell in cells if cell.cell_type == "code"] == [1, 2]
    result, text = cells[2].outputs
    assert (result.data["text/plain"], result.execution_count, text.text) == ("5", 2, "5 heads\n")
    assert not cells[2].metadata
    assert Image.open(figures / "01_a.png").size == (4, 4)
    assert 'href="../../notebooks/01_works.ipynb"' in (figures / "index.html").read_text()
    assert (repository / "docs" / "claims.md").read_text() == CLAIMS_PAGE.replace("old\n", "| claim |\n")
    findings = committed.findings_table(FIGURES / "pocket" / "claims.csv")
    assert (repository / "README.md").read_text() == README.replace("old\n", findings)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_is_refused_changes_nothing(repository):
    write(repository, "01_works", "print(1)")
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="no finished run"):
        update(repository, refuse="no finished run")
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["README.md", "docs/claims.md"])
def test_a_page_without_the_place_to_write_is_said(repository, name):
    (repository / name).write_text("# Title\n")
    with pytest.raises(UserError, match=rf"{name}: has no line '<!-- (findings|claims)"):
        update(repository)


def test_findings_are_verdicts_alone():
    claims = pd.read_csv(FIGURES / "pocket" / "claims.csv", dtype={"notebook": str})
    _, _, *rows = committed.findings_table(FIGURES / "pocket" / "claims.csv").splitlines()
    cells = [row.removesuffix(" |").split(" | ") for row in rows]
    of_prose = {name for name in claims["claim"] if name.endswith("-prose")}
    assert len({claim for _, claim, *_ in cells}) == len(rows) == claims["claim"].nunique() - len(of_prose)
    said = [part.removeprefix("on prose: ") for _, _, ours, _ in cells for part in ours.split("<br>")]
    said_of_published = [published for *_, published in cells if published]
    assert len(said) == claims["claim"].nunique() and said_of_published
    for verdict, _, counted in (one.partition(", ") for one in (*said, *said_of_published)):
        counts, _, control = counted.partition("; ")
        found = re.fullmatch(r"(\d+)(?: yes, (\d+) no,)? of (\d+)", counts or "0 of 0")
        yes, no, models = (int(number or 0) for number in found.groups())
        assert verdict in VERDICTS and (yes == models > 0) == (verdict == "reproduced")
        assert yes + no <= models and (not control or "the control alone lies in the range" in control)


def test_a_refresh_adds_no_more_than_the_guide_says():
    """As Git keeps files, where every figure is drawn again."""
    guide = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (megabytes,) = re.findall(r"It adds up to ([\d.]+) MB to the history", guide)
    files = [*NOTEBOOKS.glob("*.ipynb"), *(FIGURES / "pocket").iterdir()]
    assert len(files) > 50
    added = sum(len(zlib.compress(file.read_bytes())) for file in files) / 1e6
    assert 0.8 * float(megabytes) < added < float(megabytes)
