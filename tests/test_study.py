"""What the notebooks share: settings with the reader's changes, and measurements kept on disk that would come out again."""

import json

import numpy as np
import pytest
import xarray as xr

from selfrepair.engine.fast import fast_path
from selfrepair.errors import UserError
from selfrepair.measure.measurement import Measurement, find_measurement, measurement_names
from selfrepair.paths import MODELS
from selfrepair.run.study import N_FACTS, Study
from selfrepair.run.verify import verify
from selfrepair.store.manifest import manifest_of
from selfrepair.store.stores import open_store

MODEL = "pocket-pythia-small"
MEASURED = [name for name in measurement_names() if find_measurement(name).applies_to(MODEL)]


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
    (finding,) = [finding for finding in verify(tmp_path, "cpu", seed=0) if finding.agrees is not True]
    assert finding.what == store.name and finding.agrees is False and "manifest" in finding.detail


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
    kinds = whole.profile.ablations
    assert len(kinds) == 3 and len(whole.profile.models) == 5
    assert list(whole.each("heads")) == [(model, kind) for model in whole.profile.models for kind in kinds]
    assert list(whole.each("cosines")) == [(model, kinds[0]) for model in whole.profile.models]
    assert list(whole.each("layers_over_training")) == [("pocket-pythia", kinds[0])]
    labels = [task.label for task in whole.tasks(MODEL)]
    assert len(labels) == len(set(labels)) and {f"heads-{kind}" for kind in kinds} < set(labels)
    assert not any(find_measurement(label.split("-")[0]).on_demand for label in labels)


def test_the_readers_changes_go_before_the_profile(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        f"models: [pocket-gpt2, {{name: {MODEL}, n_prompts: 6, dtype: bfloat16}}]\nablations: [zero, mean]\nn_prompts: 8\n"
    )
    plain = Study.of(str(file))
    assert plain.wanted(MODEL, "mean") | {"n_prompts": 6, "dtype": "bfloat16"} == plain.wanted(MODEL, "mean")
    assert plain.wanted("pocket-gpt2", "mean")["n_prompts"] == 8 and plain.head is None
    assert plain.wanted(MODEL, "mean")["n_facts"] == N_FACTS and plain.out_dir.name == "own"
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
