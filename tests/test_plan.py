"""The plan of a run: stages of shards, what jobs need, and marks that are forgotten when something is lost."""

import json
import re

import pytest

from selfrepair.cli.main import main
from selfrepair.errors import NotMeasurable, UserError
from selfrepair.measure.task import Task
from selfrepair.models.loading import load_model
from selfrepair.run import notebooks, workflow
from selfrepair.run.marks import forget_stale, mark, say_done
from selfrepair.run.notebooks import all_notebooks
from selfrepair.run.study import Study, with_needs
from selfrepair.run.workflow import compute_units, measure, plan
from selfrepair.store.stores import open_store

MODEL = "pocket-pythia-small"


def study(folder, models=(MODEL,), n_prompts=4):
    made = Study.of(n_prompts=n_prompts, device="cpu", out_dir=folder)
    profile = made.profile.changed(
        models=list(models), prompt_len=12, ablations=["zero", "mean"], fraction=0.1
    )
    return Study(profile, 0, "cpu", folder)


@pytest.mark.slow("every shard is in one stage, after what it needs")
def test_every_shard_is_in_one_stage_after_what_it_needs(tmp_path):
    here = study(tmp_path, ["pocket-pythia", MODEL], n_prompts=40)
    planned = plan(here)
    assert list(planned["models"]) == here.profile.models
    assert list(planned["notebooks"]) == [notebook.stem for notebook in all_notebooks()]
    for model_name, of_model in planned["models"].items():
        stages = {
            label: i
            for i, units in enumerate(of_model["stages"])
            for label in {u.split(":")[0] for u in units}
        }
        units = [unit for units in of_model["stages"] for unit in units]
        assert len(units) == len(set(units))
        for task in here.tasks(model_name):
            assert [unit for unit in units if unit.startswith(f"{task.label}:")] == [
                f"{task.label}:{s}" for s in task.shards
            ]
            assert all(stages[needed.label] < stages[task.label] for needed in task.needed.values())
        assert of_model["stages"][0] == ["tokens:0"], "the network is needed by nothing else"
        assert {"heads-zero:0", "heads-zero:16", "constants-mean:0"} < set(of_model["stages"][1])
        assert {"heads-mean:0", "heads-mean:16", "layers-zero:0"} < set(of_model["stages"][2])
    assert ("layers_over_training" in str(planned["models"]["pocket-pythia"])) and (
        "layers_over_training" not in str(planned["models"][MODEL])
    )


@pytest.mark.slow("jobs ask a cluster for the memory that they take")
def test_memory_that_jobs_ask_for(tmp_path):
    """A model's weights twice; notebooks hold what was measured on all models twice over, or one model's in four parts."""
    models = study(tmp_path).load(MODEL)
    store = open_store(study(tmp_path).task("heads", MODEL).merge(models))
    on_disk = sum(values.nbytes for values in store.variables.values() if values.ndim == 4) / 1e6
    of_one = plan(study(tmp_path))["models"][MODEL]["mem_mb"]
    weights = 4 * load_model(MODEL, "cpu").hf.num_parameters() / 1e6
    assert (
        2 * weights < of_one - 2500 < 3 * weights
    )  # embeddings count twice, as they do where they are not tied
    few, many = (plan(study(tmp_path, n_prompts=n))["notebook_mem_mb"] for n in (4, 400_000))
    assert many - few == pytest.approx(4 * on_disk * 1e5, abs=2)
    both = plan(study(tmp_path, [MODEL, "pocket-gpt2"], n_prompts=400_000))["notebook_mem_mb"]
    of_gpt2 = 6 / 4 * on_disk  # it has as many heads in each of six layers, not four
    assert both - many == pytest.approx(1e5 * 4 * (of_gpt2 - on_disk), rel=1e-2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model measured by shards in some order, then stage by stage."""
    folder = tmp_path_factory.mktemp("measured")
    here = study(folder)
    with pytest.MonkeyPatch.context() as patch:
        one = here.load(MODEL)
        patch.setattr(Study, "load", lambda *_: one)
        compute_units(here, MODEL, ["heads-mean:0", "cosines:0"], "2-7")
        for stage in range(len(plan(here)["models"][MODEL]["stages"])):
            measure(here, MODEL, str(stage))
    return folder


@pytest.mark.slow("every stage leaves the stores that the plan names")
def test_stages_leave_what_the_plan_names_and_marks_that_answer_for_it(measured):
    here = study(measured)
    for stage, units in enumerate(plan(here)["models"][MODEL]["stages"]):
        said = json.loads(mark(measured, "measured", f"{MODEL}-{stage}").read_text())
        labels = {unit.split(":")[0] for unit in units}
        every = with_needs(list(here.tasks(MODEL)))
        wanted = [task for task in every if task.label in labels and workflow.stage_of(task) == stage]
        left = {measured / name for name in said["left"] if name.endswith(".zarr")}
        assert left == {task.path for task in with_needs(wanted)}
        assert all(task.is_done() for task in wanted)
    assert json.loads(mark(measured, "shards", MODEL, "2-7").read_text())["units"] == [
        "heads-mean:0",
        "cosines:0",
    ]
    assert list(measured.glob("measured/*.shards")) == []


@pytest.mark.slow("a run that goes on loads no model in vain")
def test_what_is_measured_is_not_measured_again(measured, monkeypatch):
    monkeypatch.setattr(Study, "load", lambda *_: pytest.fail("loaded again"))
    measure(study(measured), MODEL)
    compute_units(study(measured), MODEL, ["heads-mean:0", "heads-zero:0"], "1-1")


def test_the_stage_with_the_network_makes_all_that_needs_one(tmp_path, monkeypatch):
    """What others need on demand too: a cluster's nodes could not fetch it."""
    here = study(tmp_path)
    here = Study(here.profile.changed(ablations=["resample", "optimal"]), 0, "cpu", tmp_path)
    made = []
    monkeypatch.setattr(workflow, "make", lambda study, name, tasks, _: made.extend(tasks) or [])
    measure(here, MODEL, "0")
    planned = plan(here)["models"][MODEL]["stages"][0]
    assert planned == [f"{task.label}:0" for task in made] == ["tokens:0", "unseen_tokens:0"]


@pytest.mark.parametrize(
    "command", [["plan"], ["measure", "--model", "mine"], ["notebooks", "--only", "01"]], ids=lambda c: c[0]
)
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5"}, "architecture 't5' is not supported: an encoder-decoder"),
        (
            {"model_type": "gpt2", "n_positions": 64},
            "mine: prompts of 65 tokens do not fit its context: give",
        ),
        ({"model_type": "llama", "max_position_embeddings": 8}, r"\(prompt_len\) of 8 tokens or less"),
        ({}, "architecture 'None' is not supported"),
    ],
)
def test_what_no_stage_could_measure_is_said_before_any_begins(
    tmp_path, monkeypatch, capsys, command, config, said
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    profile = {"models": ["mine"], "ablations": ["zero"], "n_prompts": 4, "prompt_len": 65}
    (tmp_path / "p.yaml").write_text(json.dumps(profile))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Study, "of", lambda *_, **__: pytest.fail("began"))
    assert main([*command, "--profile", "p.yaml", "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        ("heads-zero", "heads-zero: not a shard; give label:number"),
        ("heads-zero:x", "heads-zero:x: not a shard"),
        (":3", ":3: not a shard"),
        ("heads-resample:0", f"{MODEL}: nothing called heads-resample is measured; there are alignment"),
        ("none:0", f"{MODEL}: nothing called none is measured"),
    ],
)
def test_shards_that_are_none_are_said(tmp_path, unit, said):
    with pytest.raises(UserError, match=said):
        compute_units(study(tmp_path), MODEL, [unit], "0-0")
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_cannot_be_measured_on_is_passed_over_and_what_fails_stops_nothing_else(
    tmp_path, monkeypatch, capsys
):
    """As a model of one layer, which has no layer before."""
    made = []

    class Made(Task):
        def __init__(self, label, error=None):
            self.label, self.error, self.path, self.needed = label, error, tmp_path / label, {}

        def is_done(self):
            return False

        def merge(self, models, progress):
            if self.error is not None:
                raise self.error
            made.append(self.label)

    monkeypatch.setattr(Study, "load", lambda *_: [])
    tasks = [
        Made("a", NotMeasurable("one layer")),
        Made("b", UserError("no room")),
        Made("c"),
    ]
    with pytest.raises(UserError, match=r"^no room$"):
        workflow.make(study(tmp_path), MODEL, tasks)
    assert made == ["c"]
    assert workflow.make(study(tmp_path), MODEL, [tasks[0], tasks[2]]) == ["a: one layer"]
    assert made == ["c", "c"] and capsys.readouterr().out == "a: one layer\n"


# --- marks -------------------------------------------------------------------------------------------------


@pytest.fixture
def marked(tmp_path):
    """A run's folder with marks that answer for a file each and a store, and the plan that they are of."""
    store = tmp_path / "measured" / "a.zarr"
    store.mkdir(parents=True)
    (store / "zarr.json").write_text("{}")
    (tmp_path / "figures").mkdir()
    for name in ("figures/01_a.png", "figures/02_a.png", "index.html", "measured/a.manifest.json"):
        (tmp_path / name).write_text(name)
    planned = {
        "models": {"some/a": {"slug": "a", "key": "m"}},
        "notebooks": {"01_first": "1", "02_second": "2"},
        "page": "p",
    }
    say_done(
        mark(tmp_path, "measured", "a-all"),
        [store, tmp_path / "measured/a.manifest.json"],
        tmp_path,
        key="m",
        not_measured=[],
    )
    say_done(mark(tmp_path, "shards", "a", "1-0"), [], tmp_path, units=["x:0"])
    for number in "12":
        say_done(
            mark(tmp_path, "notebooks", f"0{number}"),
            [tmp_path / f"figures/0{number}_a.png"],
            tmp_path,
            key=number,
        )
    say_done(mark(tmp_path, "page"), [tmp_path / "index.html"], tmp_path, key="p")
    return tmp_path, planned


def forgotten(marked):
    folder, planned = marked
    stale = forget_stale(folder, planned)
    assert not any(path.exists() for path in stale) and forget_stale(folder, planned) == []
    return {path.relative_to(folder / "done").with_suffix("").as_posix() for path in stale}


def test_marks_of_what_is_as_it_was_are_kept(marked):
    assert forgotten(marked) == set()
    assert len(list(marked[0].rglob("*.done"))) == 5


LOSSES = {
    "figures/01_a.png": "notebooks/01",
    "figures/02_a.png": "notebooks/02",
    "index.html": "page",
    "measured/a.manifest.json": "measured/a-all",
    "measured/a.zarr/zarr.json": "measured/a-all",
}


@pytest.mark.parametrize("how", ["lost", "replaced by a word", "emptied"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_mark_is_forgotten_with_what_it_answers_for(marked, name, how):
    file = marked[0] / name
    file.unlink()
    if how != "lost":
        file.write_text("word" if how == "replaced by a word" else "")
    assert forgotten(marked) == {LOSSES[name]}


def test_marks_of_another_key_are_forgotten(marked):
    folder, planned = marked
    assert forgotten((folder, planned | {"page": "q"})) == {"page"}
    of_models = {"some/a": {"slug": "a", "key": "n"}}
    assert forgotten((folder, planned | {"models": of_models})) == {"measured/a-all"}
    assert forgotten((folder, planned | {"notebooks": {"01_first": "1", "02_second": "3"}})) == {
        "notebooks/02"
    }


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"left": 3}', '{"left": {"index.html": 1}}', "\udcff"])
def test_damaged_marks_are_forgotten(marked, content):
    mark(marked[0], "page").write_bytes(content.encode(errors="surrogateescape"))
    assert forgotten(marked) == {"page"}


def test_a_run_that_left_no_marks_has_none_to_forget(tmp_path):
    assert forget_stale(tmp_path / "none", {"models": {}, "notebooks": {}, "page": ""}) == []


@pytest.mark.parametrize("given", [[], ["--key", "of the plan"]])
def test_the_job_of_a_notebook_finds_the_key_that_it_is_not_given(tmp_path, monkeypatch, given):
    ran = {}
    monkeypatch.setattr(notebooks, "notebook_keys", lambda _: {"01_one": "of today", "02_two": "other"})
    monkeypatch.setattr(
        notebooks, "run_notebook_of", lambda study, profile, number, key: ran.update(number=number, key=key)
    )
    main(["notebook", "--number", "01", "--out", str(tmp_path / "out"), *given])
    assert ran == {"number": "01", "key": given[-1] if given else "of today"}
