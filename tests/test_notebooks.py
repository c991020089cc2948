"""The notebooks run on other models and seeds, and what is committed is what was run."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import papermill
import pytest
import yaml
from test_arms import CONFIG

from selfrepair.analysis.arms import CURVES
from selfrepair.analysis.claims import read_claims, to_markdown
from selfrepair.analysis.rules import load_claims
from selfrepair.cli.main import main
from selfrepair.measure.measurement import find_measurement, measurement_names
from selfrepair.models.checkpoints import model_identity
from selfrepair.paths import FIGURES, HELD_OUT_TEXT, MODELS, README, REPOSITORY
from selfrepair.run.committed import CLAIMS, CLAIMS_PAGE, FINDINGS, findings_table
from selfrepair.run.notebooks import Notebook, all_notebooks, notebook_keys, run_notebook_of
from selfrepair.run.study import Study

PARAMETERS = {"model", "profile", "n_prompts", "seed", "device", "ablation", "fraction", "out_dir"}
ALL = all_notebooks()
of_each = pytest.mark.parametrize("notebook", ALL, ids=lambda notebook: notebook.stem)


def makes_claims(notebook):
    """Not all do: 00 teaches how the others measure."""
    return f'claims_table("{notebook.number}"' in notebook.code


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@of_each
def test_committed_notebook_was_run_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not any(
            output.output_type == "error" or output.get("name") == "stderr" for output in cell.outputs
        )
        assert not cell.source.lstrip().startswith(("!", "%"))
    assert any("NBVAL_CHECK_OUTPUT" in cell.source for cell in cells)


@of_each
def test_committed_notebook_is_below_a_megabyte(notebook):
    """With its pictures: everybody who clones the repository gets every version of it."""
    assert notebook.path.stat().st_size < 1_000_000


@of_each
def test_parameters_have_the_same_names_everywhere(notebook):
    assert set(papermill.inspect_notebook(str(notebook.path))) >= PARAMETERS
    tagged = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1


@of_each
def test_code_that_is_shown_is_read_without_scrolling(notebook):
    shown = [cell for cell in code_cells(notebook) if "remove-input" not in cell.metadata.get("tags", [])]
    assert [line for cell in shown for line in cell.source.splitlines() if len(line) > 88] == []


@of_each
def test_what_a_notebook_asks_for_is_measured(notebook):
    """By names that are written out: the plan reads them."""
    assert notebook.code.count(".measured(") >= len(notebook.measurements) > 0
    assert set(notebook.measurements) <= set(measurement_names())


def test_every_claim_has_a_notebook_that_judges_it():
    assert {claim.notebook for claim in load_claims()} == {
        notebook.number for notebook in filter(makes_claims, ALL)
    }


def test_nothing_is_measured_that_no_notebook_reads():
    read = {name for notebook in ALL for name in notebook.measurements}
    assert read == {name for name in measurement_names() if not find_measurement(name).on_demand}


def test_a_name_that_the_plan_cannot_read_is_an_error(tmp_path):
    cells = [
        nbformat.v4.new_code_cell("study.measured(kind + 's')"),
        nbformat.v4.new_markdown_cell("study.measured('no')"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01_a.ipynb")
    with pytest.raises(ValueError, match="malformed"):
        Notebook(tmp_path / "01_a.ipynb").measurements  # noqa: B018


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One results folder of all notebooks, in which each finds what others have measured."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.slow(
    "notebooks run on another model, seed, ablation, fraction of tokens and head than those of the committed ones"
)
@of_each
def test_runs_on_another_model_and_seed(notebook, results, tmp_path):
    """And with another ablation, fraction of tokens and, where it has that parameter, head."""
    parameters = {
        "model": "pocket-pythia-small",
        "n_prompts": 8,
        "seed": 1,
        "ablation": "zero",
        "fraction": 0.1,
    }
    parameters["out_dir"] = str(results)
    if "head" in papermill.inspect_notebook(str(notebook.path)):
        parameters["head"] = [1, 2]
    done = papermill.execute_notebook(
        str(notebook.path),
        str(tmp_path / notebook.path.name),
        parameters=parameters,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(tmp_path),
    )
    assert not any(output.output_type == "error" for cell in done.cells for output in cell.get("outputs", []))
    for suffix in ("png", "pdf"):
        figures = list((results / "figures").glob(f"{notebook.number}_*.{suffix}"))
        assert figures and all(figure.stat().st_size > 1000 for figure in figures)
    if makes_claims(notebook):
        claims = read_claims(results / "claims" / f"{notebook.number}.csv")
        of_dropout = {name for name, curve in CURVES.items() if curve.dose == "head_dropout"}
        assert set(claims["model"]) >= (of_dropout if notebook.number == "08" else {"pocket-pythia-small"})


def test_committed_claims_are_those_of_the_notebooks_and_the_readme():
    """One long table; what README, ``docs/claims.md``, ``claims.md`` and the notebooks show is made of it."""
    table = read_claims(FIGURES / "pocket" / "claims.csv")
    claims = (FIGURES / "pocket" / "claims.md").read_text(encoding="utf-8")
    assert claims == to_markdown(table) + "\n"
    page, readme = (file.read_text(encoding="utf-8") for file in (CLAIMS_PAGE, README))
    assert claims.join(CLAIMS) in page
    assert findings_table(FIGURES / "pocket" / "claims.csv").join(FINDINGS) in readme
    shown = {}
    for notebook in filter(makes_claims, ALL):
        outputs = [
            output.get("data", {}).get("text/markdown", "")
            for cell in code_cells(notebook)
            for output in cell.outputs
        ]
        (shown[notebook.number],) = [text for text in outputs if text.startswith("| claim |")]
    assert shown == {number: to_markdown(of_one) for number, of_one in table.groupby("notebook")}


@pytest.mark.slow("the committed page shows what today's code and notebooks make, from a clean commit")
def test_the_committed_page_is_of_these_notebooks_and_of_a_clean_commit():
    """Else ``./run_all.sh --update`` makes it so; commit what it changes."""
    page = (FIGURES / "pocket" / "index.html").read_text(encoding="utf-8")
    noted = dict(re.findall(r"<dt>([^<]+)</dt>\n<dd>\s*([^<]+?)\s*</dd>", page))
    assert re.fullmatch("[0-9a-f]{40}", noted["commit"])
    keys = notebook_keys(Study.of("pocket"))
    assert {stem: noted[stem] for stem in keys} == keys


def test_the_committed_page_links_its_figures():
    """No picture is committed twice for it, and none only for printing."""
    page = FIGURES / "pocket" / "index.html"
    assert page.stat().st_size <= 400_000
    shown = set(re.findall(r'<img src="([^"]+)"', page.read_text(encoding="utf-8")))
    assert shown == {file.name for file in page.parent.glob("*.png")}
    assert {file.suffix for file in page.parent.iterdir()} == {".png", ".csv", ".md", ".html"}


@pytest.mark.after_run("the numbers that are committed and shown in README and docs are those of a run")
def test_a_run_makes_the_committed_claims_again():
    """Numbers to a thousandth or a millionth, because machines round differently.

    An advantage is an estimate less its control: it is off by as much as these, however small it is itself.
    """
    made, committed = (
        read_claims(folder / "claims.csv")
        for folder in (REPOSITORY / "results" / "pocket" / "figures", FIGURES / "pocket")
    )
    advantages = ["advantage_low", "advantage_high"]
    rest = committed.drop(columns=advantages)
    pd.testing.assert_frame_equal(made.drop(columns=advantages), rest, rtol=1e-3, atol=1e-6)
    allowed = 1e-3 * committed[["estimate", "control"]].abs().max(axis=1) + 1e-6
    for column in advantages:
        near = (made[column] - committed[column]).abs() <= allowed
        assert (near | made[column].isna() & committed[column].isna()).all()


@of_each
def test_text_is_finished_and_figures_are_committed(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search("TO-?DO", text) and "**Question.**" in text and "**What it does not show.**" in text
    saved = set(re.findall(rf'"({notebook.number}_\w+)"\)', notebook.code))
    assert saved
    for name in saved:
        assert (FIGURES / "pocket" / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "99"], "no notebook begins with 99"),
        (["--profile", "none"], "no such profile"),
        (["--jobs", "0"], "jobs"),
        (["--model", "/no/such/folder"], "no such folder"),
    ],
)
def test_bad_requests_are_one_line(tmp_path, capsys, arguments, said):
    assert main(["notebooks", "--out", str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert list(tmp_path.iterdir()) == []


def written(folder, sources):
    """Notebooks of a cell each behind one of parameters."""
    for name, source in sources.items():
        cells = [
            nbformat.v4.new_code_cell(
                "profile = None\nmodel = None\nout_dir = None\nseed = 3\ndevice = None",
                metadata={"tags": ["parameters"]},
            ),
            nbformat.v4.new_code_cell(source),
        ]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")


@pytest.mark.slow("a failing cell is named, and the other notebooks run")
def test_failing_cell_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    in_pieces = "import time\nprint(seed, flush=True)\ntime.sleep(0.5)\nprint(seed)"
    written(tmp_path, {"01_breaks": "1 / 0", "02_works": in_pieces})
    monkeypatch.setattr("selfrepair.run.notebooks.NOTEBOOKS", tmp_path)
    assert main(["notebooks", "--only", "0", "--out", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "01_breaks: cell 3 failed with ZeroDivisionError" in last
    done = json.loads((tmp_path / "out" / "notebooks" / "02_works.ipynb").read_text())
    assert [output["text"] for output in done["cells"][-1]["outputs"]] == [["3\n", "3\n"]]


def test_a_widget_is_not_kept_and_the_picture_that_it_changes_is(tmp_path, monkeypatch):
    """Without its kernel, a widget would be an error message in a reader's browser."""
    source = "import ipywidgets\nfrom IPython.display import HTML, display\n"
    source += "display(ipywidgets.Dropdown(options=[1, 2]))\nshown = display(HTML('<b>a picture</b>'), display_id=True)"
    written(tmp_path, {"01_has_a_widget": source})
    monkeypatch.setattr("selfrepair.run.notebooks.NOTEBOOKS", tmp_path)
    assert main(["notebooks", "--only", "01", "--out", str(tmp_path / "out")]) == 0
    done = nbformat.read(tmp_path / "out" / "notebooks" / "01_has_a_widget.ipynb", as_version=4)
    assert [output["data"].get("text/html") for output in done.cells[-1].outputs] == ["<b>a picture</b>"]
    assert "widgets" not in done.metadata and "widget-view" not in nbformat.writes(done)


def test_what_a_notebook_left_is_its_own(tmp_path):
    code = 'table.to_csv(out / "one.csv")\nstyle.save(figure, out, "03_a")\nwrite_heads(table, kind, out)'
    code += '\nstyle.save_of_model(figure, out, "03_m", name)'
    written(tmp_path, {"03_one": code})
    (tmp_path / "out").mkdir()
    for name in (
        "notebooks/03_one.ipynb",
        "notebooks/04_two.ipynb",
        "claims/03.csv",
        "claims/04.csv",
        "one.csv",
        "two.csv",
        "heads_zero.csv",
        "heads_mean.csv",
    ):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).touch()
    of_models = ("03_m-pocket-gpt2.png", "03_m-of_before.png")
    for name in ("03_a.png", "03_a.pdf", *of_models, "03_of_before.png", "04_a.png", "claims.csv"):
        (tmp_path / "out" / "figures").mkdir(exist_ok=True)
        (tmp_path / "out" / "figures" / name).touch()
    left = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in Notebook(tmp_path / "03_one.ipynb").left(
            Study.of(ablation="zero", out_dir=tmp_path / "out")
        )
    }
    assert left == {
        "notebooks/03_one.ipynb",
        "claims/03.csv",
        "one.csv",
        "heads_zero.csv",
        "figures/03_a.png",
        "figures/03_a.pdf",
        "figures/03_m-pocket-gpt2.png",
    }


#: Says what a notebook understood, in the file ``said``.
SAYS = """import json
from pathlib import Path
from selfrepair.measure.task import Task
from selfrepair.run.study import Study

study = Study.of(profile, model, out_dir=out_dir)
(task,) = (study.task("tokens", name) for name in study.profile.models)
said = {"models": study.profile.models, "out": str(study.out_dir), "files": task.determined_by["model_files"]}
Path(SAID).write_text(json.dumps(said))
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with a model and two profiles, and a hub cache with another model of the same name."""
    folder, hub = tmp_path / "elsewhere", tmp_path / "hub"
    folder.mkdir()
    snapshot = hub / "models--my--model" / "snapshots" / "0123456789abcdef"
    for place, model in ((folder / "my" / "model", "pocket-pythia-small"), (snapshot, "pocket-gpt2")):
        shutil.copytree(MODELS / model, place)
    (hub / "models--my--model" / "refs").mkdir()
    (hub / "models--my--model" / "refs" / "main").write_text(snapshot.name)
    amount = "ablations: [zero]\nn_prompts: 4\nprompt_len: 16\nfraction: 0.1\n"
    (folder / "mini.yaml").write_text(f"models: [my/model]\n{amount}")
    (folder / "pocket.yaml").write_text(f"models: [pocket-gpt2]\n{amount}")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow("paths given to a command are those of where it was called")
@pytest.mark.parametrize(
    "given",
    [
        ["--model", "my/model"],
        ["--profile", "mini.yaml"],
        ["--profile", "pocket.yaml", "--model", "my/model"],
    ],
)
def test_relative_paths_are_those_of_the_command(elsewhere, tmp_path, monkeypatch, given):
    """Kernels work in another folder, from where the name is that of a hub model."""
    (tmp_path / "notebooks").mkdir()
    written(tmp_path / "notebooks", {"01_says": SAYS.replace("SAID", repr(str(tmp_path / "said")))})
    monkeypatch.setattr("selfrepair.run.notebooks.NOTEBOOKS", tmp_path / "notebooks")
    assert main(["notebooks", "--only", "01", *given, "--out", "out/here"]) == 0
    said = json.loads((tmp_path / "said").read_text())
    assert said == {
        "models": [str(elsewhere / "my" / "model")],
        "out": str(elsewhere / "out" / "here"),
        "files": model_identity(str(MODELS / "pocket-pythia-small")),
    }
    assert (elsewhere / "out" / "here" / "notebooks" / "01_says.ipynb").is_file()


@pytest.mark.parametrize("file", ["manifest.json", "done/plan.json"])
def test_a_folder_of_a_run_is_not_for_notebooks_by_hand(tmp_path, capsys, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    assert main(["notebooks", "--only", "01", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "belongs to a run of the workflow; give another --out" in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / file]


def test_what_a_run_of_a_notebook_left_before_goes(tmp_path, monkeypatch):
    """A figure that is not drawn this time would be shown as one of this run."""
    written(tmp_path, {"01_one": 'if seed: print("01_once")\n# "mine.csv"'})
    monkeypatch.setattr("selfrepair.run.notebooks.NOTEBOOKS", tmp_path)
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    for name in (
        "figures/01_once.png",
        "mine.csv",
        "figures/01_other.png",
        "figures/02_once.png",
        "yours.csv",
    ):
        (out / name).touch()
    run_notebook_of(Study.of(out_dir=out), "pocket", "01", "the key")
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there - {"notebooks/01_one.lock"} == {
        *("notebooks/01_one.ipynb", "done/notebooks/01.done"),
        *("figures/01_other.png", "figures/02_once.png", "yours.csv"),
    }
    assert json.loads((out / "done" / "notebooks" / "01.done").read_text())["left"].keys() == {
        "notebooks/01_one.ipynb"
    }


@pytest.mark.slow("the commands of README and docs do what they say from any folder, with relative paths")
def test_commands_of_the_readme_from_elsewhere(elsewhere):
    """With a small model in the place of those, and few prompts."""
    commands = [
        command
        for page in (README, REPOSITORY / "docs" / "running.md")
        for command in re.findall(
            r"^    \.venv/bin/selfrepair (.*?)(?:  +#.*)?$", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    assert [command.split()[0] for command in commands] == [
        "notebooks",
        "notebooks",
        "sweep",
        "heads",
        "train",
        "arms",
        "verify",
    ]
    assert commands[0] == commands[1]
    (elsewhere / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"name": "tiny"}))
    arms = [{"group": "tiny", "config": CONFIG, "vary": {"head_dropout": [0.0]}}]
    (elsewhere / "arms.yaml").write_text(yaml.safe_dump({"trained": arms}))
    *made, verified = commands[1:]
    instead = {
        "--model EleutherAI/pythia-160m": "--profile mini.yaml --model my/model",
        "--model pocket-pythia": "--model my/model",
        "--n-prompts 128": "--n-prompts 4",
        "pocket-pythia-heads": "model-heads",
        "shared/models/configs/pocket-gpt2.yaml": "tiny.yaml",
        "shared/models/arms/arms.yaml": "arms.yaml",
        "--text FOLDER": f"--text {shlex.quote(str(HELD_OUT_TEXT))}",
    }
    python = shlex.quote(sys.executable)
    for command in (*made, verified.replace("results/pocket", "results/mine")):
        for name, other in instead.items():
            command = command.replace(name, other)
        run = f"{python} -m selfrepair.cli.main {command}"
        done = subprocess.run(["bash", "-c", run], cwd=elsewhere, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (elsewhere / "heads.csv").read_text().startswith("model,layer,head,")
    assert (elsewhere / "results" / "pythia-160m" / "figures" / "01_self_repair_by_depth.png").is_file()
    assert (elsewhere / "results" / "pocket-gpt2" / "model.safetensors").is_file()
    assert len(pd.read_csv(elsewhere / "arms.csv")) == 1
    left = [
        path
        for out in ("mine", "pythia-160m")
        for path in elsewhere.glob(f"results/{out}/**/*.manifest.json")
    ]
    sources = {json.loads(path.read_text())["source"] for path in left}
    assert sources == {str(elsewhere / "my" / "model")}
