"""The notebooks run on other models and seeds, and what is committed is what was run."""

import json
import re

import nbformat
import papermill
import pytest

from selfrepair.cli import main
from selfrepair.paths import NOTEBOOKS, REPOSITORY

PARAMETERS = {"model", "profile", "n_prompts", "seed", "device", "ablation", "fraction", "out_dir"}
FIGURES = REPOSITORY / "figures"
ALL = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_committed_notebook_was_run_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in cell.outputs)
        assert not cell.source.lstrip().startswith(("!", "%"))
    assert any("NBVAL_CHECK_OUTPUT" in cell.source for cell in cells)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_parameters_have_the_same_names_everywhere(path):
    assert set(papermill.inspect_notebook(str(path))) >= PARAMETERS
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_runs_on_another_model_and_seed(path, tmp_path):
    """And with another ablation, fraction of tokens and, where it has that parameter, head."""
    parameters = {"model": "pocket-pythia-small", "n_prompts": 8, "seed": 1, "ablation": "zero", "fraction": 0.1}
    parameters["out_dir"] = str(tmp_path / "results")
    if "head" in papermill.inspect_notebook(str(path)):
        parameters["head"] = [1, 2]
    done = papermill.execute_notebook(
        str(path), str(tmp_path / path.name), parameters=parameters, kernel_name="python3", progress_bar=False, cwd=str(tmp_path)
    )
    assert not any(output.output_type == "error" for cell in done.cells for output in cell.get("outputs", []))
    for suffix in ("png", "pdf"):
        figures = list((tmp_path / "results" / "figures").glob(f"{path.stem[:2]}_*.{suffix}"))
        assert figures and all(figure.stat().st_size > 1000 for figure in figures)


def test_committed_claims_are_those_of_the_notebooks_and_the_readme():
    claims = (FIGURES / "pocket" / "claims.md").read_text()
    assert claims in (FIGURES.parent / "README.md").read_text()
    shown = [
        output.data["text/markdown"]
        for path in ALL
        for cell in code_cells(path)
        for output in cell.outputs
        if "text/markdown" in output.get("data", {}) and output.data["text/markdown"].startswith("| claim |")
    ]
    assert len(shown) == len(ALL)
    rows = [line for table in shown for line in table.splitlines()[2:]]
    assert claims.splitlines()[2:] == rows


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_text_is_finished_and_figures_are_committed(path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search("TO-?DO", text) and "**Question.**" in text and "**What it does not show.**" in text
    saved = set(re.findall(rf'"({path.stem[:2]}_\w+)"\)', "\n".join(cell.source for cell in code_cells(path))))
    assert saved
    for name in saved:
        for suffix in ("png", "pdf"):
            assert (FIGURES / "pocket" / f"{name}.{suffix}").stat().st_size > 1000


def test_bad_requests_are_one_line(tmp_path, capsys):
    for arguments, said in (
        (["--only", "99"], "no notebook begins with 99"),
        (["--profile", "none"], "no such profile"),
        (["--jobs", "0"], "jobs"),
    ):
        assert main(["notebooks", "--out", str(tmp_path), *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error


def test_failing_cell_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    from selfrepair.run import notebooks

    in_pieces = "import time\nprint(seed, flush=True)\ntime.sleep(0.5)\nprint(seed)"
    for name, source in (("01_breaks", "1 / 0"), ("02_works", in_pieces)):
        cells = [
            nbformat.v4.new_code_cell("profile = None\nout_dir = None\nseed = 3", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(source),
        ]
        notebook = nbformat.v4.new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        )
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    assert main(["notebooks", "--only", "0", "--out", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "01_breaks: cell 3 failed with ZeroDivisionError" in last
    done = json.loads((tmp_path / "out" / "notebooks" / "02_works.ipynb").read_text())
    assert [output["text"] for output in done["cells"][-1]["outputs"]] == [["3\n", "3\n"]]
