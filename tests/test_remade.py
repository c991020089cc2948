"""What an edit makes again, and what it keeps: names of stores, keys of notebooks and page, and the run itself."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from houses import Planner, copy_house, environment, results

from selfrepair.measure.measurement import measurement_names
from selfrepair.paths import PACKAGE

GPT2, PYTHIA = MODELS = ("pocket-gpt2", "pocket-pythia-small")


#: Measurements → their kinds of ablation here; the others have none.
KINDS = {"heads": ("resample", "mean"), "constants": ("mean",)}
KINDS |= dict.fromkeys(
    ("neurons", "earlier_input", "self_feeding", "layers", "layers_on_prose"), ("resample",)
)


def labels(*names):
    """Of measurements by name, the stores of one model, as :attr:`selfrepair.measure.task.Task.label` has them."""
    return {f"{name}-{kind}" if kind else name for name in names for kind in KINDS.get(name, ("",))}


EVERYTHING = set(measurement_names()) - {"layers_over_training"}  # no model here has checkpoints
#: What is measured on prompts of the held-out text, and, of that, what the ablation of heads has a part in.
ON_PROMPTS = EVERYTHING - {"facts", "layers"}
ABLATING = {"heads", "neurons", "earlier_input", "self_feeding"}


def appended(text="\n# edited\n"):
    return lambda content: content + text.encode()


def replaced(old, new):
    def edit(content):
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return edit


def last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


#: File → how it is edited, and of what it then changes the identity: measurements, of these models, and notebooks by number.
#: The page's changes with that of any notebook.
EDITS = {
    "shared/selfrepair/engine/head_ablation.py": (appended(), ABLATING, MODELS, "12345"),
    "shared/selfrepair/engine/direct_effect.py": (
        appended(),
        ON_PROMPTS - {"tokens"} | {"layers"},
        MODELS,
        "123456",
    ),
    "shared/selfrepair/measure/self_feeding.py": (appended(), {"self_feeding"}, MODELS, "5"),
    "shared/selfrepair/measure/tokens.py": (appended(), ON_PROMPTS, MODELS, "123456"),
    "shared/selfrepair/text/facts.yaml": (appended(), {"facts", "layers", "layers_on_prose"}, MODELS, "6"),
    "shared/selfrepair/statistics.py": (
        appended(),
        {"neurons", "earlier_input", "self_feeding"},
        MODELS,
        "123456",
    ),
    "shared/selfrepair/analysis/layernorm.py": (appended(), set(), (), "3"),
    "shared/selfrepair/analysis/estimates.py": (appended(), set(), (), "123456"),
    "shared/selfrepair/analysis/claims.yaml": (replaced("at_least: ", "at_least: 0"), set(), (), "123456"),
    "shared/selfrepair/plots/layernorm.py": (appended(), set(), (), "3"),
    "shared/selfrepair/plots/style.py": (appended(), set(), (), "123456"),
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
    "shared/text/nature.txt": (replaced("the ", "then "), ON_PROMPTS, MODELS, "123456"),
    "shared/text/README.md": (appended(), set(), (), ""),
    "shared/published/published_head_breakdown_top2pct.csv": (replaced("1", "2"), set(), (), "1235"),
    "shared/published/published_self_feeding_heads.csv": (replaced("1", "2"), set(), (), "1235"),
    f"shared/models/{GPT2}/model.safetensors": (last_byte, EVERYTHING, (GPT2,), "123456"),
    f"shared/models/{PYTHIA}/tokenizer.json": (appended(" "), EVERYTHING, (PYTHIA,), "123456"),
    f"shared/models/{PYTHIA}/README.md": (appended(), set(), (), ""),
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A copy of the repository, what plans a run in it, and what that plan was at first."""
    house = copy_house(tmp_path_factory.mktemp("planned") / "house", MODELS)
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


def test_nothing_changes_without_an_edit(planned):
    _, planner, before = planned
    assert planner() == before


def test_released_tables_are_read_in_one_place():
    """Keys of notebooks count them wherever that module has a part."""
    imports = re.compile(r"^from selfrepair.paths import .*\bPUBLISHED\b", re.MULTILINE)
    files = (file for file in PACKAGE.rglob("*.py") if imports.search(file.read_text(encoding="utf-8")))
    readers = {file.relative_to(PACKAGE).as_posix() for file in files}
    assert readers == {"analysis/published.py", "run/workflow.py"}


# --- the run itself ----------------------------------------------------------------------------------------

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
    counts = {"prompts": 1, "shards": 4, "measured": 2, "notebooks": 2, "summary": 1}
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
    assert noted[0]["stores"].keys() == noted[1]["stores"].keys() == STORES - {f"{PYTHIA} constants-mean"}


@pytest.mark.slow("a run makes again what is lost, damaged or of other code, and nothing else")
def test_a_run_makes_again_what_is_lost_or_edited_and_nothing_else(house):
    out = house.folder / "out"
    before = results(out)
    assert house.run() == (["nothing to do: the results are there already"], set())
    house.edit("shared/selfrepair/plots/layernorm.py", appended())
    assert house.run()[1] == {"03", "page"}
    (out / "figures" / "04_overlaps.png").unlink()
    (store,) = out.glob(f"measured/{PYTHIA}-cosines-*.zarr")
    shutil.rmtree(store)
    assert house.run()[1] == {"04", f"{PYTHIA} cosines", "page"}
    (out / "notebooks" / "03_layernorm_share.ipynb").unlink()
    assert house.run()[1] == {"03", "page"}
    (out / "notebooks" / "03_layernorm_share.html").unlink()
    assert house.run()[1] == {"page"}
    (out / "index.html").write_text("word")
    assert house.run()[1] == {"page"}
    assert results(out) == before
    assert house.run() == (["nothing to do: the results are there already"], set())
