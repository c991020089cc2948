"""What the notebooks share: settings with the reader's changes, and measurements kept on disk that would come out again."""

import json

import jaxtyping
import numpy as np
import pytest
import xarray as xr

from selfrepair.cli.main import main
from selfrepair.engine.fast import fast_path
from selfrepair.errors import NotMeasurable, UserError
from selfrepair.measure.measurement import Measurement, find_measurement, measurement_names
from selfrepair.measure.task import Task
from selfrepair.paths import BY_HAND, MODELS, PROFILES, RUNS
from selfrepair.run import profiles
from selfrepair.run import study as study_module
from selfrepair.run.profiles import Profile
from selfrepair.run.study import N_FACTS, Study
from selfrepair.run.verify import verify
from selfrepair.store.manifest import manifest_of
from selfrepair.store.stores import open_store

MODEL = "pocket-pythia-small"
SETTINGS = {"model_name": MODEL, "donor_draws": 2}
MEASURED = [name for name in measurement_names() if find_measurement(name).applies_to(SETTINGS)]


def study(folder, fraction=0.05):
    return Study.of(
        model=MODEL, n_prompts=4, device="cpu", ablation="mean", fraction=fraction, out_dir=folder, n_facts=4
    )


@pytest.fixture(scope="module")
def models():
    return study("unused").load(MODEL)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder that measurements are kept in, so that what they need is measured once."""
    return tmp_path_factory.mktemp("measured")


@pytest.mark.slow("what a notebook reads from the disk is what was measured")
@pytest.mark.parametrize("name", MEASURED)
def test_kept_measurements_are_what_was_measured(name, measured, models, monkeypatch):
    here = study(measured)
    task = here.task(name, MODEL)
    first = here.measured(name)[MODEL].load()
    with fast_path(models[0]) as quick:
        wanted = [
            task.measurement.compute(quick, task.settings, task.inputs(), shard) for shard in task.shards
        ]
    monkeypatch.setattr(type(task.measurement), "compute", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(Study, "load", lambda *_: pytest.fail("loaded again"))
    again = study(measured).measured(name)[MODEL]
    xr.testing.assert_identical(again.load(), first)
    for shard, one in zip(task.shards, wanted, strict=True):
        kept = task.of_shard(first, shard)
        for variable, values in one.variables.items():
            assert kept[variable].dims == values.dims and kept[variable].dtype == values.dtype
            np.testing.assert_allclose(kept[variable].values, values.values, rtol=1e-4, atol=1e-6)
    assert {key: first.attrs[key] for key in wanted[0].attrs} == wanted[0].attrs


def broken(store):
    """Cuts the largest file of a store short."""
    file = max((file for file in store.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.slow("other settings, and damage, are measured again")
def test_other_settings_and_damage_are_measured_again(tmp_path):
    def of_stores():
        found = [finding for finding in verify(tmp_path, "cpu", seed=0) if finding.what.endswith(".zarr")]
        return sorted(finding.agrees for finding in found if "earlier_input" in finding.what)

    few, many = (
        study(tmp_path, fraction).measured("earlier_input")[MODEL].load() for fraction in (0.05, 0.5)
    )
    assert few.sizes != many.sizes or not np.array_equal(few["earlier"], many["earlier"])
    assert of_stores() == [True, True]
    for store in tmp_path.glob("measured/*-earlier_input-*.zarr"):
        broken(store)
    assert of_stores() == [False, False]
    again = study(tmp_path).measured("earlier_input")[MODEL]
    np.testing.assert_allclose(again["earlier"], few["earlier"], rtol=1e-5, atol=1e-7)
    assert of_stores() == [False, True]


@pytest.mark.slow("what a notebook measures has a manifest")
def test_a_measurement_has_a_manifest(tmp_path, models):
    study(tmp_path).measured("earlier_input")
    (store,) = tmp_path.glob("measured/*-earlier_input-*.zarr")
    (tokens,) = tmp_path.glob("measured/*-tokens-*.zarr")
    noted = json.loads(manifest_of(store).read_text())
    wanted = {"source": MODEL, "measurement": "earlier_input", "ablation": "mean", "fraction": 0.05}
    wanted |= {"n_prompts": 4, "seed": 0, "weights_sha256": models[0].weights_sha256}
    assert {name: noted[name] for name in wanted} == wanted
    assert noted["inputs"]["tokens"] == tokens.stem
    assert noted["inputs_sha256"]["tokens"] == open_store(tokens).attrs["sha256"]
    manifest_of(store).unlink()
    wrong = {finding.what: finding for finding in verify(tmp_path, "cpu", seed=0) if not finding.agrees}
    assert wrong[store.name].agrees is False and "manifest" in wrong[store.name].detail


def test_every_model_that_a_measurement_applies_to_by_its_short_name(tmp_path):
    both = Study.of(n_prompts=4, device="cpu", out_dir=tmp_path)
    both = Study(both.profile.changed(models=[MODEL, str(MODELS / "pocket-gpt2")]), 0, "cpu", tmp_path)
    found = both.measured("tokens")
    assert list(found) == [MODEL, "pocket-gpt2"]
    assert [data.attrs["model"] for data in found.values()] == [MODEL, "pocket-gpt2"]
    assert both.measured("layers_over_training") == {}
    for name in (str(MODELS / "pocket-gpt2"), "pocket-gpt2"):
        assert both.tokenizer(name).vocab_size == both.tokenizer(MODEL).vocab_size


def test_a_measurement_is_made_once_or_for_every_kind_of_ablation():
    whole = Study.of("pocket")
    kinds, models = whole.profile.ablations, whole.profile.models
    more = ["pocket-gpt2", MODEL]
    own = {model: [*kinds, *(["optimal"] if model in more else [])] for model in models}
    assert len(kinds) == 3 and set(more) < set(models) and whole.profile.kinds == [*kinds, "optimal"]
    assert list(whole.each("heads")) == [(model, kind) for model in models for kind in own[model]]
    assert list(whole.each("donor_draws")) == [(model, kinds[0]) for model in more]
    assert list(whole.each("cosines")) == [(model, kinds[0]) for model in whole.profile.models]
    assert list(whole.each("layers_over_training")) == [("pocket-pythia", kinds[0])]
    labels = [task.label for task in whole.tasks(MODEL)]
    assert len(labels) == len(set(labels)) and {f"heads-{kind}" for kind in own[MODEL]} < set(labels)
    assert not any(find_measurement(label.split("-")[0]).on_demand for label in labels)


def test_what_some_models_alone_have_is_measured_of_these(tmp_path, monkeypatch):
    file = tmp_path / "own.yaml"
    own = f"{{name: {MODEL}, ablations: [zero, mean], donor_draws: 3}}"
    file.write_text(
        f"models: [pocket-gpt2, {own}]\nablations: [zero]\nn_prompts: 4\nprompt_len: 12\nfraction: 0.1\n"
    )
    both = Study.of(str(file), out_dir=tmp_path)
    monkeypatch.setattr(Study, "load", lambda self, name: [])
    monkeypatch.setattr("selfrepair.measure.task.Task.merge", lambda self, models: self.path)
    monkeypatch.setattr(study_module, "open_store", lambda path: xr.Dataset())
    assert list(both.measured("heads", "mean")) == [MODEL]
    assert list(both.measured("heads", "zero")) == ["pocket-gpt2", MODEL]
    assert list(both.measured("heads", "resample")) == ["pocket-gpt2", MODEL]  # a kind that none has
    assert list(both.measured("donor_draws")) == [MODEL] == [model for model, _ in both.each("donor_draws")]
    assert both.wanted(MODEL, "zero")["donor_draws"] == 3
    one_kind = Study.of(str(file), ablation="mean", out_dir=tmp_path)
    assert list(one_kind.measured("heads", "mean")) == ["pocket-gpt2", MODEL]
    assert one_kind.profile.kinds == ["mean"]


def test_a_model_that_cannot_be_measured_is_left_out_of_several(tmp_path, monkeypatch, capsys):
    """Such as one that answers no facts; of one model alone it is an error."""
    none_knows = ["pocket-gpt2"]

    def merge(task, models):
        if task.model_name in none_knows:
            raise NotMeasurable(f"{task.model_name}: answers 0 of 600 facts")

    monkeypatch.setattr(Study, "load", lambda self, name: [])
    monkeypatch.setattr(study_module.Task, "merge", merge)
    monkeypatch.setattr(study_module, "open_store", lambda path: xr.Dataset())
    settings = {"ablations": ["zero"], "n_prompts": 2}
    several = Study(Profile(["pocket-gpt2", MODEL], **settings), 0, "cpu", tmp_path)
    assert list(several.measured("layers")) == [MODEL]
    assert capsys.readouterr().out == "left out of layers: pocket-gpt2: answers 0 of 600 facts\n"
    none_knows.append(MODEL)
    with pytest.raises(NotMeasurable, match=r"^pocket-gpt2: answers 0"):
        several.measured("layers")


def test_the_readers_changes_go_before_the_profile(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        f"models: [pocket-gpt2, {{name: {MODEL}, n_prompts: 6, dtype: bfloat16}}]\nablations: [zero, mean]\nn_prompts: 8\n"
    )
    plain = Study.of(str(file))
    assert plain.wanted(MODEL, "mean") | {"n_prompts": 6, "dtype": "bfloat16"} == plain.wanted(MODEL, "mean")
    assert plain.wanted("pocket-gpt2", "mean")["n_prompts"] == 8 and plain.head is None
    assert plain.wanted(MODEL, "mean")["n_facts"] == N_FACTS and plain.run_folder == RUNS / "own"
    changed = Study.of(
        str(file),
        MODEL,
        4,
        seed=3,
        ablation="resample",
        fraction=0.5,
        out_dir=tmp_path,
        head=[1, 2],
        facts="x.json",
        n_facts=9,
    )
    assert (
        changed.profile.models == [MODEL]
        and changed.profile.ablations == ["resample"]
        and changed.head == (1, 2)
    )
    wanted = {
        "n_prompts": 4,
        "seed": 3,
        "fraction": 0.5,
        "head": [1, 2],
        "facts": "x.json",
        "n_facts": 9,
        "dtype": "bfloat16",
    }
    assert changed.wanted(MODEL, "mean") | wanted == changed.wanted(MODEL, "mean")
    assert json.loads(json.dumps(changed.wanted(MODEL, "mean"))) == changed.wanted(MODEL, "mean")


def test_every_setting_that_a_measurement_uses_is_there():
    there = Study.of("pocket").wanted(MODEL, "zero").keys() | {"model_name"}
    for name in measurement_names():
        measurement: Measurement = find_measurement(name)
        assert set(measurement.uses) <= there, name


def test_two_folders_of_the_same_name_are_refused(tmp_path):
    """Their results would be pooled: tables and stores are by name."""
    for folder in ("a", "b"):
        (tmp_path / folder / "mine").mkdir(parents=True)
        (tmp_path / folder / "mine" / "config.json").write_text("{}")
    file = tmp_path / "twins.yaml"
    file.write_text(f"models: [{tmp_path}/a/mine, {tmp_path}/b/mine/]\nablations: [zero]\nn_prompts: 4\n")
    with pytest.raises(UserError, match="another model of the profile is called mine too; rename"):
        Study.of(str(file))
    assert Study.of(str(file), model=f"{tmp_path}/a/mine").profile.models == [f"{tmp_path}/a/mine"]
    file.write_text(f"models: [{MODEL}, {MODELS / MODEL}]\nablations: [zero]\nn_prompts: 4\n")
    with pytest.raises(UserError, match=f"called {MODEL} too"):
        Study.of(str(file))
    (tmp_path / "org--mine").mkdir()
    file.write_text(f"models: [{tmp_path}/org--mine, org/mine]\nablations: [zero]\nn_prompts: 4\n")
    with pytest.raises(UserError, match="called org--mine too"):  # so would their files be
        Study.of(str(file))


def test_two_folders_of_the_same_name_are_one_line_before_anything_is_made(tmp_path, capsys):
    for folder in ("runA", "runB"):
        (tmp_path / folder / "ckpt").mkdir(parents=True)
        (tmp_path / folder / "ckpt" / "config.json").write_text('{"model_type": "gpt2"}')
    file = tmp_path / "twins.yaml"
    file.write_text("models: [runA/ckpt, runB/ckpt]\nablations: [zero]\nn_prompts: 4\n")
    for command in ("plan", "notebooks", "summary"):
        assert main([command, "--profile", str(file), "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "another model of the profile is called ckpt too; rename" in said
    assert not (tmp_path / "out").exists()


def test_by_hand_each_set_of_changes_has_a_folder_outside_of_the_runs(tmp_path):
    """A run's folder belongs to the run."""
    assert Study.of().out_dir == Study.of("pocket", seed=0, device="cpu").out_dir == BY_HAND / "pocket"
    (tmp_path / "pocket.yaml").write_text(
        "models: [pocket-gpt2]\nablations: [zero]\nn_prompts: 4\nprompt_len: 64\n"
    )
    for folder in ("runA", "runB"):
        (tmp_path / folder / "ckpt").mkdir(parents=True)
    changes = [{}, {"profile": "paper"}, {"profile": str(tmp_path / "pocket.yaml")}, {"model": MODEL}]
    changes += [{"model": f"{tmp_path}/{folder}/ckpt"} for folder in ("runA", "runB")]
    changes += [{"n_prompts": 4}, {"seed": 1}, {"ablation": "zero"}, {"fraction": 0.5}, {"head": [1, 2]}]
    changes += [{"facts": "x.json"}, {"n_facts": 9}, {"n_facts": 9, "seed": 1}, {"model": "org/other"}]
    folders = [Study.of(**change).out_dir for change in changes]
    assert len({*folders}) == len(changes) and {folder.parent for folder in folders} == {BY_HAND}
    assert folders == [Study.of(**change).out_dir for change in changes]
    assert {folder.name[: len("pocket-org--other-")] for folder in folders} > {"pocket-org--other-"}


def test_what_the_run_has_measured_is_read_by_hand_and_its_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "RUNS", tmp_path)
    monkeypatch.setattr(study_module, "BY_HAND", tmp_path / "by-hand")
    file = tmp_path / "mini.yaml"
    file.write_text(f"models: [{MODEL}]\nablations: [zero]\nn_prompts: 4\nprompt_len: 12\nfraction: 0.1\n")
    run = Study.of(str(file), device="cpu", out_dir=tmp_path / "mini").measured("tokens")[MODEL].load()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mini").rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(Study, "load", lambda *_: pytest.fail("loaded again"))
        by_hand = Study.of(str(file), device="cpu").measured("tokens")[MODEL]
        with pytest.raises(
            pytest.fail.Exception
        ):  # elsewhere by the reader's wish: nothing is read from the run
            Study.of(str(file), device="cpu", out_dir=tmp_path / "other").measured("tokens")
    xr.testing.assert_identical(by_hand.load(), run)
    Study.of(str(file), device="cpu", seed=1).measured("tokens")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mini").rglob("*")} == before
    assert len([*tmp_path.glob("by-hand/*/measured/*-tokens-*.zarr")]) == 1


def test_names_of_files_are_resolved_once(tmp_path, monkeypatch):
    (tmp_path / "x.json").touch()
    monkeypatch.chdir(tmp_path)
    assert Study.of(facts="x.json").facts == str(tmp_path / "x.json")
    assert Study.of(facts="NeelNanda/counterfact-tracing").facts == "NeelNanda/counterfact-tracing"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"n_prompts": "4"}, "n_prompts must be a positive even number, not '4'"),
        ({"n_prompts": 4.0}, "n_prompts must be a positive even number, not 4.0"),
        ({"n_prompts": 5}, "n_prompts must be a positive even number, not 5"),
        ({"n_prompts": True}, "n_prompts must be a positive even number, not True"),
        ({"seed": "0"}, "seed must be a whole number that is not negative, not '0'"),
        ({"seed": -1}, "seed must be a whole number that is not negative, not -1"),
        ({"fraction": "0.1"}, "fraction must be a number above 0 and at most 1, not '0.1'"),
        ({"fraction": 2}, "fraction must be a number above 0 and at most 1, not 2"),
        (
            {"ablation": 3},
            "ablations must be a list of different ones of resample, mean, zero, optimal, not [3]",
        ),
        ({"ablation": ["zero"]}, "ablations must be a list of different ones of"),
        ({"model": ["pocket-gpt2"]}, "model must be the name of a model, or its folder"),
        ({"model": 3}, "model must be the name of a model, or its folder, not 3"),
        ({"profile": 7}, "profile must be the name of a profile or the path of a .yaml file, not 7"),
        ({"device": 0}, "device must be auto, cpu, cuda, cuda:1 …, not 0"),
        ({"out_dir": 1}, "out_dir must be the path of a folder, not 1"),
        ({"head": [-1, -1]}, "head must be [layer, head], two whole numbers that are not negative"),
        ({"head": 3}, "head must be [layer, head], two whole numbers that are not negative, not 3"),
        ({"head": "12"}, "head must be [layer, head]"),
        ({"head": [1]}, "head must be [layer, head]"),
        ({"head": [1, 2.0]}, "head must be [layer, head]"),
        ({"facts": 1}, "facts must be a CounterFact .json or a data set, not 1"),
        ({"n_facts": 1}, "n_facts must be a whole number of at least 2, not 1"),
        ({"n_facts": "9"}, "n_facts must be a whole number of at least 2, not '9'"),
    ],
)
def test_parameters_that_cannot_be_are_said(parameters, said, monkeypatch):
    """What a notebook's reader, or papermill, may give; each in one line that says what is wanted."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for readers
    with pytest.raises(UserError) as error:
        Study.of(**{"profile": "pocket", **parameters})
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow("a store under another's name is measured again")
def test_a_store_under_the_name_of_another_is_measured_again(tmp_path, models):
    """Stores swapped with their manifests: what a notebook reads is of the ablation that it asked for."""
    tasks = {kind: study(tmp_path).task("heads", MODEL, kind) for kind in ("resample", "zero")}
    for task in tasks.values():
        task.merge(models)
    wanted = {kind: open_store(task.path).load() for kind, task in tasks.items()}
    first, second = (task.path for task in tasks.values())
    for one, other in ((first, second), (manifest_of(first), manifest_of(second))):
        one.rename(tmp_path / "aside")
        other.rename(one)
        (tmp_path / "aside").rename(other)
    for kind, task in tasks.items():
        assert not task.is_done()
        found = study(tmp_path).measured("heads", kind)[MODEL]
        assert found.attrs["ablation"] == kind
        xr.testing.assert_equal(found.load(), wanted[kind])


@pytest.mark.parametrize(
    ("changes", "is_as_committed"),
    [
        ({}, True),
        ({"device": "cpu", "out_dir": "elsewhere"}, True),
        ({"n_prompts": 8}, False),
        ({"model": "pocket-gpt2"}, False),
        ({"seed": 1}, False),
        ({"head": [1, 2]}, False),
        ({"n_facts": 10}, False),
        ({"profile": "paper"}, False),
    ],
)
def test_only_the_pocket_profile_unchanged_is_what_committed_notebooks_describe(changes, is_as_committed):
    assert Study.of(**changes).is_as_committed == is_as_committed


def test_an_edited_pocket_profile_is_not_what_committed_notebooks_describe(tmp_path, monkeypatch):
    """If this fails at the pocket profile itself: read the notebooks' texts again, then note its identity."""
    assert Study.of("pocket").is_as_committed
    edited = (PROFILES / "pocket.yaml").read_text().replace("n_prompts: 128", "n_prompts: 64")
    (tmp_path / "pocket.yaml").write_text(edited)
    monkeypatch.setattr(profiles, "PROFILES", tmp_path)
    assert Study.of("pocket").profile.n_prompts == 64
    assert not Study.of("pocket").is_as_committed


@pytest.mark.parametrize("name", sorted(set(measurement_names()) - {"tokens", "unseen_tokens"}))
def test_what_a_model_computes_is_another_store_in_another_precision(tmp_path, name):
    """Tokens alone are the same."""
    settings = Study.of(model=MODEL, device="cpu", out_dir=tmp_path).wanted(MODEL, "resample")
    one, other = (
        Task(name, MODEL, settings | {"dtype": dtype}, tmp_path).path for dtype in ("float32", "float64")
    )
    assert one != other
