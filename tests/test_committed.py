"""What ``./run_all.sh --update`` writes over the committed files, and that a failing notebook changes none
of them."""

import nbformat
import pytest
from PIL import Image

from selfrepair.errors import UserError
from selfrepair.run import committed, notebooks, page
from selfrepair.run.study import Study

README = "# Title\n\n## Claims\n\nold\n\nThe rules behind the verdicts\nend\n"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    out = tmp_path / "results" / "pocket"
    (out / "figures").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(out / "figures" / "01_a.png")
    (out / "figures" / "claims.md").write_text("| claim |\n")
    (tmp_path / "README.md").write_text(README)
    for module in (notebooks, page):
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    for name, value in (("FIGURES", "figures"), ("README", "README.md")):
        monkeypatch.setattr(committed, name, tmp_path / value)
    return tmp_path


def update(repository):
    study = Study.of("pocket", out_dir=repository / "results" / "pocket")

    def summarise():
        before = {path.read_text() for path in (repository / "notebooks").iterdir()}
        assert not any('"execution_count": 1' in text for text in before), "the tree is still clean"
        (study.out_dir / "index.html").write_text(study.profile.name)

    committed.update_committed(study, summarise)


def write(repository, name, source):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source), nbformat.v4.new_markdown_cell("text")]
    )
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, repository / "notebooks" / f"{name}.ipynb")


def test_everything_is_refreshed(repository):
    write(repository, "01_works", "import os\nprint(2 + 3, os.path.basename(os.getcwd()))")
    figures = repository / "figures" / "pocket"
    figures.mkdir(parents=True)
    (figures / "01_of_before.png").write_bytes(b"old")
    update(repository)
    assert {file.name for file in figures.iterdir()} == {"01_a.png", "claims.md", "index.html"}
    cell = nbformat.read(repository / "notebooks" / "01_works.ipynb", 4).cells[0]
    assert cell.outputs[0].text == "5 notebooks\n" and cell.execution_count == 1 and not cell.metadata
    assert Image.open(figures / "01_a.png").size == (4, 4)
    assert 'href="../../notebooks/01_works.ipynb"' in (figures / "index.html").read_text()
    assert (repository / "README.md").read_text() == README.replace("old\n", "| claim |\n")


def test_a_failing_notebook_changes_nothing(repository):
    write(repository, "01_works", "print(1)")
    write(repository, "02_breaks", "1 / 0")
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="02_breaks: ZeroDivisionError"):
        update(repository)
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


def test_a_readme_without_claims_is_said(repository):
    (repository / "README.md").write_text("# Title\n")
    with pytest.raises(UserError, match="no section 'Claims'"):
        update(repository)
