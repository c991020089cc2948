"""What an edit makes again, and what it keeps: names of stores, keys of notebooks and page, and the run itself."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from finished_run import finish, one_notebook
from houses import ROOT, Planner, copy_house, environment, results

from selfrepair.measure.measurement import measurement_names
from selfrepair.paths import PACKAGE
from selfrepair.run.marks import changed_since, forget_stale, mark
from selfrepair.run.notebooks import DATA_OF
from selfrepair.run.record import summarise
from selfrepair.run.workflow import measure, plan
from selfrepair.store.files import hash_files
from selfrepair.store.manifest import manifest_of

pytestmark = pytest.mark.slow("what is lost, damaged or cut short of a run is made again, and nothing else")

GPT2, PYTHIA = MODELS = ("pocket-gpt2", "pocket-pythia-small")


#: Measurements → their kinds of ablation here; the others have none.
KINDS = {"heads": ("resample", "mean"), "constants": ("mean",)}
KINDS |= dict.fromkeys(
    (
        *("neurons", "earlier_input", "self_feeding", "layers", "layers_on_prose"),
        *("head_growth", "joint_ablation"),
    ),
    ("resample",),
)


def labels(*names):
    """Of measurements by name, the stores of one model, as :attr:`selfrepair.measure.task.Task.label` has them."""
    return {f"{name}-{kind}" if kind else name for name in names for kind in KINDS.get(name, ("",))}


#: No model here has checkpoints, the profile asks for no other donors, and no ablation here learns.
EVERYTHING = set(measurement_names()) - {"layers_over_training", "donor_draws", "unseen_tokens"}
#: What is measured on prompts of the held-out text, and, of that, what the ablation of heads has a part in.
ON_PROMPTS = EVERYTHING - {"facts", "layers"}
#: And what would read text if its ablation learnt from it.
READS_TEXT = ON_PROMPTS | {"layers"}
ABLATING = {"heads", "neurons", "earlier_input", "self_feeding", "head_growth", "joint_ablation"}


def appended(text="\n# edited\n"):
    return lambda content: content + text.encode()


def replaced(old, new):
    def edit(content):
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return edit


def last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


#: Files of the held-out text.
TEXTS = ("argument", "dialogue", "history", "instructions", "letters", "nature", "stories", "technical")
#: A notebook that reads no store: it computes of models and text by itself.
BY_HAND = """from selfrepair.models.loading import load_model
from selfrepair.text.corpora import load_tokens
"""
#: File → how it is edited, and of what it then changes the identity: measurements, of these models, and notebooks by number.
#: The page's changes with that of any notebook.
EDITS = {
    "shared/selfrepair/engine/head_ablation.py": (appended(), ABLATING, MODELS, "012345789"),
    "shared/selfrepair/engine/direct_effect.py": (
        appended(),
        ON_PROMPTS - {"tokens"} | {"layers"},
        MODELS,
        "0123456789",
    ),
    "shared/selfrepair/engine/fast/switch.py": (appended(), EVERYTHING, MODELS, "0123456789"),
    "shared/selfrepair/engine/fast/linear_maps.py": (appended(), EVERYTHING, MODELS, "0123456789"),
    "shared/selfrepair/engine/fast/low_rank.py": (appended(), ABLATING, MODELS, "012345789"),
    "shared/selfrepair/models/loading.py": (appended(), EVERYTHING, MODELS, "0123456789"),
    "shared/selfrepair/measure/self_feeding.py": (appended(), {"self_feeding"}, MODELS, "5"),
    "shared/selfrepair/measure/tokens.py": (appended(), READS_TEXT, MODELS, "0123456789"),
    "shared/selfrepair/text/facts.yaml": (appended(), {"facts", "layers", "layers_on_prose"}, MODELS, "68"),
    "shared/selfrepair/statistics.py": (
        appended(),
        {"neurons", "earlier_input", "self_feeding", "head_growth", "joint_ablation"},
        MODELS,
        "0123456789",
    ),
    "shared/selfrepair/text/corpora.py": (appended(), READS_TEXT | {"facts"}, MODELS, "0123456789"),
    "shared/selfrepair/models/support.py": (appended(), EVERYTHING, MODELS, "0123456789"),
    "shared/selfrepair/analysis/layernorm.py": (appended(), set(), (), "37"),
    "shared/selfrepair/analysis/estimates.py": (appended(), set(), (), "123456789"),
    "shared/selfrepair/analysis/claims.yaml": (replaced("at_least: ", "at_least: 0"), set(), (), "123456789"),
    **{
        f"shared/selfrepair/plots/{name}.py": (appended(), set(), (), notebooks)
        for name, notebooks in {
            "across_models": "1",
            "token_variation": "2",
            "layernorm": "37",
            "neurons": "4",
            "top_neurons": "4",
            "self_feeding": "5",
            "iterative": "5",
            "layers": "6",
            "layer_compensation": "6",
            "worked_prompt": "6",
            "by_hand": "0",
            "tokens_in_context": "0245",
            "counting": "7",
            "arms": "8",
            "who_repairs": "9",
            "panels": "0123456789",
            "style": "0123456789",
        }.items()
    },
    "shared/selfrepair/plots/forest.py": (appended(), set(), (), None),
    "shared/selfrepair/run/page.html": (appended("<!-- edited -->"), set(), (), None),
    "shared/selfrepair/run/notebook_page.html": (appended("<!-- edited -->"), set(), (), None),
    "shared/selfrepair/run/verify.py": (appended(), set(), (), ""),
    "shared/selfrepair/training/loop.py": (appended(), set(), (), ""),
    "notebooks/04_neuron_anti_erasure.ipynb": (
        replaced("# NBVAL_CHECK_OUTPUT", "#  NBVAL_CHECK_OUTPUT"),
        set(),
        (),
        "4",
    ),
    **{
        f"shared/text/{name}.txt": (replaced("the ", "then "), ON_PROMPTS, MODELS, "0123456789")
        for name in TEXTS
    },
    "shared/text/README.md": (appended(), set(), (), ""),
    "shared/published/published_head_breakdown_top2pct.csv": (replaced("1", "2"), set(), (), "12357"),
    "shared/published/published_head_breakdown_all_tokens.csv": (replaced("1", "2"), set(), (), "12357"),
    "shared/published/published_self_feeding_heads.csv": (replaced("1", "2"), set(), (), "12357"),
    f"shared/models/{GPT2}/model.safetensors": (last_byte, EVERYTHING, (GPT2,), "0123456789"),
    f"shared/models/{PYTHIA}/tokenizer.json": (appended(" "), EVERYTHING, (PYTHIA,), "0123456789"),
    f"shared/models/{PYTHIA}/README.md": (appended(), set(), (), ""),
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A copy of the repository, what plans a run in it, and what that plan was at first."""
    house = copy_house(tmp_path_factory.mktemp("planned") / "house", MODELS)
    by_hand = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BY_HAND)])
    nbformat.write(by_hand, house / "notebooks" / "00_by_hand.ipynb")
    planner = Planner(house)
    yield house, planner, planner()
    planner.close()


@pytest.mark.slow("an edited file changes the identity of what it has a part in, and of nothing else")
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_the_identity_of_what_it_has_a_part_in(planned, name):
    house, planner, before = planned
    edit, measurements, models, notebooks = EDITS[name]
    content = (house / name).read_bytes()
    (house / name).write_bytes(edit(content))
    after = planner()
    (house / name).write_bytes(content)
    changed = {what for what in before if after[what] != before[what]}
    assert after.keys() == before.keys()
    assert {what for what in changed if "pocket" not in what} == {
        *(f"notebooks/0{number}" for number in notebooks or ""),
        *(["page"] if notebooks != "" else []),
    }
    for model in MODELS:
        of_model = labels(*measurements) if model in models else set()
        assert {what.removeprefix(f"{model} ") for what in changed if what.startswith(model)} == of_model
        assert (f"key of {model}" in changed) == bool(of_model)


def test_every_text_table_figure_and_template_is_edited_above():
    """So that another one is not forgotten."""
    files = (
        *ROOT.glob("shared/text/*.txt"),
        *ROOT.glob("shared/published/*.csv"),
        *PACKAGE.glob("plots/[!_]*.py"),
    )
    assert {file.relative_to(ROOT).as_posix() for file in (*files, *PACKAGE.rglob("*.html"))} <= EDITS.keys()


def test_nothing_changes_without_an_edit(planned):
    _, planner, before = planned
    assert planner() == before


def test_keys_of_notebooks_know_who_reads_data_of_the_repository():
    """Data that a measurement reads is in its store's name; a run's own modules make no numbers."""
    imports = re.compile(r"^from selfrepair.paths import .*\b(PUBLISHED|ARMS|HELD_OUT_TEXT)\b", re.MULTILINE)
    files = (file for file in PACKAGE.rglob("*.py") if imports.search(file.read_text(encoding="utf-8")))
    readers = {file.relative_to(PACKAGE) for file in files}
    assert {file.as_posix() for file in readers if file.parts[0] not in ("measure", "run", "training")} == {
        *DATA_OF
    }


# --- the run itself ----------------------------------------------------------------------------------------

#: Stores that are lost or damaged, and made again.
LOST = ("cosines", "constants-mean", "probabilities", "alignment")
STORES = {f"{PYTHIA} {label}" for label in labels(*EVERYTHING)}


class House:
    """A copy of the repository with a tiny profile of one model and two notebooks: the real command runs in it."""

    def __init__(self, folder):
        self.folder = copy_house(folder, [PYTHIA])
        for notebook in (self.folder / "notebooks").glob("0[!34]*.ipynb"):
            notebook.unlink()
        self.state = {}

    def run(self, out="out", units_per_job=0):
        """What the user saw, and what was made by it."""
        where = [
            "--workflow-profile",
            self.folder / "workflow" / "default",
            "--cores",
            "2",
            "--logger",
            "selfrepair",
        ]
        command = [sys.executable, "-m", "snakemake", "--snakefile", self.folder / "Snakefile", *where]
        process = subprocess.run(
            [*command, "--config", "profile=small", f"out={out}", f"units_per_job={units_per_job}"],
            cwd=self.folder,
            env=environment(self.folder),
            stderr=subprocess.PIPE,
            text=True,
        )
        logs = "\n".join(f"{log}\n{log.read_text()}" for log in (self.folder / out / "logs").rglob("*.log"))
        assert process.returncode == 0, f"{process.stderr}\n{logs}"
        return process.stderr.splitlines()[1:], self.made(out)

    def made(self, out):
        """Stores, notebooks and page that are not those of the last time."""
        before = self.state.get(out, {})
        places = [
            *(self.folder / out).glob("measured/*.zarr"),
            *(self.folder / out).glob("notebooks/*.ipynb"),
        ]
        self.state[out] = {
            place: place.stat().st_mtime_ns for place in (*places, self.folder / out / "index.html")
        }
        return {name_of(place) for place, time in self.state[out].items() if before.get(place) != time}

    def edit(self, name, how):
        (self.folder / name).write_bytes(how((self.folder / name).read_bytes()))


def name_of(place):
    """``pocket-gpt2 heads-mean`` of a store, ``03`` of a notebook, ``page``."""
    if place.suffix == ".zarr":
        return f"{PYTHIA} {place.stem.rpartition('-')[0].removeprefix(f'{PYTHIA}-')}"
    return "page" if place.name == "index.html" else place.name[:2]


def stages(said):
    """Of each stage, the last that was said of its jobs."""
    return dict(line.split(",")[0].split(": ") for line in said[:-1])


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """After a run from nothing, in which the model was one job."""
    made = House(tmp_path_factory.mktemp("run") / "house")
    said, done = made.run()
    assert done == {*STORES, "03", "04", "page"}
    assert stages(said) == {"measured": "1 of 1", "notebooks": "2 of 2", "summary": "1 of 1"}
    return made


@pytest.mark.slow(
    "a run in many jobs gives the bytes of a run in few: the real plan, the real Snakefile, the real commands"
)
def test_many_jobs_give_the_bytes_of_few(house):
    said, done = house.run("many", units_per_job=5)
    counts = {"prompts": 1, "shards": 4, "measured": 3, "notebooks": 2, "summary": 1}
    assert stages(said) == {stage: f"{n} of {n}" for stage, n in counts.items()}
    assert done == {*STORES, "03", "04", "page"}
    few, many = (results(house.folder / out) for out in ("out", "many"))
    assert few.keys() == many.keys()
    assert [name for name in few if few[name] != many[name]] == []
    assert {name.split("/")[0] for name in few} >= {
        "measured",
        "figures",
        "claims",
        "notebooks",
        "breakdown_by_layer.csv",
    }
    noted = [json.loads((house.folder / out / "manifest.json").read_text()) for out in ("out", "many")]
    assert noted[0]["stores"].keys() == noted[1]["stores"].keys() == STORES


@pytest.mark.slow("a run makes again what is lost, damaged or of other code, and nothing else")
def test_a_run_makes_again_what_is_lost_or_edited_and_nothing_else(house):
    out = house.folder / "out"
    before = results(out)
    assert house.run() == (["nothing to do: the results are there already"], set())
    house.edit("shared/selfrepair/plots/layernorm.py", appended())
    assert house.run()[1] == {"03", "page"}
    (out / "figures" / "04_overlaps.png").unlink()
    store = {name: next(out.glob(f"measured/{PYTHIA}-{name}-*.zarr")) for name in LOST}
    shutil.rmtree(store["cosines"])
    assert house.run()[1] == {"04", f"{PYTHIA} cosines", "page"}
    (out / "notebooks" / "03_layernorm_share.ipynb").unlink()
    shutil.rmtree(store["constants-mean"])
    max((file for file in store["probabilities"].rglob("c*") if file.is_file()), key=os.path.getsize).unlink()
    manifest_of(store["alignment"]).unlink()
    assert house.run()[1] == {"03", "page", *(f"{PYTHIA} {name}" for name in LOST if name != "cosines")}
    (out / "notebooks" / "03_layernorm_share.html").unlink()
    assert house.run()[1] == {"page"}
    (out / "breakdown_by_layer.csv").unlink()
    (out / "index.html").write_text("word")
    assert house.run()[1] == {"03", "page"}
    (out / "manifest.json").unlink()
    assert house.run()[1] == {"page"}
    assert results(out) == before
    assert house.run() == (["nothing to do: the results are there already"], set())


# --- what a run left ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, made in this process, and its plan."""
    with one_notebook(tmp_path_factory.mktemp("notebooks")):
        study = finish(tmp_path_factory.mktemp("finished"))
        yield study, plan(study)


@pytest.fixture
def left(finished, tmp_path):
    """Another copy of it, to be spoilt."""
    study, _ = finished
    return dataclasses.replace(study, out_dir=shutil.copytree(study.out_dir, tmp_path / "results"))


#: What is lost or damaged → the marks that no longer hold, so that it is made again.
MISSED = {
    "index.html": ("page",),
    "manifest.json": ("page",),
    "figures/claims.csv": ("page",),
    "figures/claims.md": ("page",),
    **dict.fromkeys(
        ("figures/01_one.png", "heads_mean.csv", "claims/01.csv", "notebooks/01_one.ipynb"),
        ("notebooks/01", "page"),
    ),
    **dict.fromkeys(
        (
            *("measured/*-tokens-*.zarr", "measured/*-facts-*.zarr", "measured/*-constants-mean-*.zarr"),
            *(
                "measured/*-heads-mean-*.zarr",
                "measured/*-layers-*.zarr",
                "measured/*-cosines-*.manifest.json",
            ),
        ),
        (f"measured/{PYTHIA}-all", "page"),
    ),
}
DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a byte changed": lambda file: file.write_bytes(last_byte(file.read_bytes())),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("what", MISSED)
def test_what_is_not_there_whole_is_made_again(finished, left, what, how):
    out, (_, planned) = left.out_dir, finished
    assert forget_stale(out, planned) == [], "of a copy, nothing is to be made again"
    place = next(out.glob(what))
    files = [file for file in place.rglob("c*") if file.is_file()] if place.is_dir() else [place]
    DAMAGES[how](max(files, key=os.path.getsize))
    stale = forget_stale(out, planned)
    assert {path.relative_to(out / "done").with_suffix("").as_posix() for path in stale} == {*MISSED[what]}


def test_no_file_that_a_run_left_can_be_lost_unnoticed(left, tmp_path):
    out, last = left.out_dir, mark(left.out_dir, "page")
    files = [file for file in out.rglob("*") if file.is_file() and file.suffix != ".lock"]
    files = [file for file in files if file.relative_to(out).parts[0] != "done"]
    stores = {
        file.relative_to(out).parts[1]: file for file in files if file.relative_to(out).parts[0] == "measured"
    }
    some = [file for file in files if file.relative_to(out).parts[0] != "measured"] + list(stores.values())
    unnoticed = []
    for file in some:
        shutil.move(file, tmp_path / "aside")
        if changed_since(last, out) == []:
            unnoticed.append(file)
        shutil.move(tmp_path / "aside", file)
    assert unnoticed == [] and len(some) > 30 and changed_since(last, out) == []


def test_claims_of_all_notebooks_are_put_together_again(finished, left):
    out, (_, planned) = left.out_dir, finished
    together = [out / "figures" / name for name in ("claims.csv", "claims.md")]
    before = [file.read_bytes() for file in together]
    for file in together:
        file.unlink()
    summarise(left, planned["notebooks"], planned["page"])
    assert [file.read_bytes() for file in together] == before


@pytest.mark.parametrize("what", ["measured/*-cosines-*.zarr", "measured/*-cosines-*.manifest.json"])
def test_a_store_without_its_manifest_is_no_result(left, what):
    (place,) = left.out_dir.glob(what)
    (store,) = left.out_dir.glob("measured/*-cosines-*.zarr")
    whole = hash_files(store, ("**/*",))
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    (model,) = left.profile.models
    measure(left, model)
    assert hash_files(store, ("**/*",)) == whole and manifest_of(store).is_file()


# --- a run, its tests, and notebooks by hand -----------------------------------------------------------------


@pytest.fixture(scope="module")
def small_pocket(tmp_path_factory):
    """The repository with one small model, few prompts and two notebooks in the place of those of the pocket profile."""
    house = copy_house(tmp_path_factory.mktemp("small") / "house", [PYTHIA])
    (house / "profiles" / "small.yaml").replace(house / "profiles" / "pocket.yaml")
    for notebook in (house / "notebooks").glob("*.ipynb"):
        if notebook.name[:2] in ("01", "03"):
            notebook.write_text(notebook.read_text().replace("NBVAL_CHECK_OUTPUT", "of other models"))
        else:
            notebook.unlink()
    for name in ("run_all.sh", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, house / name)
    (house / "tests").mkdir()
    marked = (
        f'@pytest.mark.{kind}("x")\ndef test_{kind}(): pass\n' for kind in ("slow", "slurm", "after_run")
    )
    (house / "tests" / "test_marks.py").write_text("import pytest\n" + "".join(marked))
    (house / ".venv").mkdir()  # the environment of these tests, set up as run_all.sh would have done it
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith("selfrepair-"):
            (house / ".venv" / part.name).symlink_to(part)
    digest = hashlib.sha256()
    for name in ("requirements.lock", "pyproject.toml"):
        digest.update((house / name).read_bytes())
    digest.update(os.fsencode(house) + b"\0%d.%d" % sys.version_info[:2])
    (house / ".venv" / "selfrepair-lock.sha256").write_text(digest.hexdigest())
    return house


@pytest.mark.slow("tests and notebooks run by hand leave a finished run as it is")
def test_a_run_then_its_tests_then_notebooks_by_hand_then_verify_all_agree(small_pocket):
    run = small_pocket / "results" / "pocket"
    hidden = ("SELFREPAIR_USE_ACTIVE", "VIRTUAL_ENV", "CONDA_PREFIX")
    around = {name: value for name, value in environment(small_pocket).items() if name not in hidden}

    def done(*command):
        made = subprocess.run(command, cwd=small_pocket, env=around, capture_output=True, text=True)
        assert made.returncode == 0, f"{command}: {made.stdout[-5000:]} {made.stderr[-5000:]}"
        return made

    def of_the_run():
        files = (path for path in run.rglob("*") if path.is_file() and path.suffix not in (".lock", ".log"))
        return {path: path.read_bytes() for path in files if path.name != "plan.json"}

    done("./run_all.sh", "--jobs", "1")
    before = of_the_run()
    assert run / "index.html" in before and run / "figures" / "03_scale_ratios.png" in before
    done("./run_all.sh", "--test", "--jobs", "1")
    by_hand = ("jupyter", "execute", "--inplace", "notebooks/03_layernorm_share.ipynb")  # as in JupyterLab
    done(*by_hand)
    done("selfrepair", "notebooks", "--only", "01", "--model", PYTHIA)
    assert of_the_run() == before
    folders = {path.name: path for path in (small_pocket / "results" / "by-hand").iterdir()}
    (of_model,) = folders.keys() - {"pocket"}
    assert of_model.startswith(f"pocket-{PYTHIA}-")
    assert (folders["pocket"] / "breakdown_by_layer.csv").is_file()
    assert (folders[of_model] / "notebooks" / "01_self_repair_across_models.ipynb").is_file()
    assert not [*small_pocket.glob("results/by-hand/*/measured")], "it was measured already"
    assert done("selfrepair", "verify", "results/pocket").stdout.endswith("all that was checked agrees\n")
    assert "nothing to do: the results are there already" in done("./run_all.sh", "--jobs", "1").stderr
