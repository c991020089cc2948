"""Manifests say what made a result; verify finds what no longer agrees, in whatever was measured."""

import json
import shutil
from importlib import metadata

import numpy as np
import pytest
import zarr
from families import random_tokens, save_family
from tasks import of_prompts

from selfrepair import __version__
from selfrepair.cli.main import main
from selfrepair.errors import UserError
from selfrepair.measure import pairs
from selfrepair.measure.task import Task
from selfrepair.models.loading import load_model
from selfrepair.run import verify
from selfrepair.run.marks import RESULTS
from selfrepair.store import stores
from selfrepair.store.files import hash_files
from selfrepair.store.manifest import manifest_of, write_manifest
from selfrepair.store.stores import open_store

#: What a small random model can be measured on, and for which ablation.
MEASURED = dict.fromkeys(of_prompts(), ("resample",)) | {"heads": ("resample", "mean")}
#: Attributes that writing a store gives it.
OF_THE_STORE = ("format", stores.CHECKSUM, stores.CHECKSUMS)
#: Beside them, what these need.
NEEDED = ("tokens", "constants")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A results folder with every measurement of prompts, a file and its manifest."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "SHARD_PAIRS", 2)
        model = load_model(str(save_family("gpt2", folder / "tiny")), "cpu")
        np.save(folder / "tokens.npy", random_tokens(8).numpy())
        out = folder / "results"
        amount = {
            "n_prompts": 8,
            "prompt_len": 12,
            "seed": 0,
            "dtype": "float32",
            "fraction": 0.2,
            "head": None,
            "layer_positions": "last",
        }
        source = {"tokens": str(folder / "tokens.npy"), "text": None, "dataset": None}
        for name, kinds in MEASURED.items():
            for kind in kinds:
                Task(
                    name, str(folder / "tiny"), amount | source | {"ablation": kind}, out / "measured"
                ).merge([model])
    (out / "heads_resample.csv").write_text("model\n")
    write_manifest(out / "manifest.json", 1, files=hash_files(out, RESULTS))
    return folder


@pytest.fixture
def run(finished, monkeypatch):
    """The same, to be spoilt: put back afterwards, because the names of stores say where the model lies."""
    monkeypatch.setattr(pairs, "SHARD_PAIRS", 2)
    shutil.copytree(finished, finished.with_name("kept"))
    yield finished / "results"
    shutil.rmtree(finished)
    finished.with_name("kept").rename(finished)


def found(run):
    return {finding.what: finding for finding in verify.verify(run, "cpu", seed=1)}


def computed_again(findings):
    return [finding for finding in findings.values() if ", shard" in finding.what]


def spoil(store, name, change):
    """Writes a store once more, checksums and all, with other values: only computing them again can find
    it."""
    data = open_store(store).load()
    data[name] = data[name].copy(data=change(data[name].values))
    stores.write_store(
        [
            data.drop_attrs(deep=False).assign_attrs(
                {k: v for k, v in data.attrs.items() if k not in OF_THE_STORE}
            )
        ],
        store,
    )


@pytest.mark.slow("a sample of every measurement is computed again, and how much is said")
def test_an_untouched_run_agrees_and_says_how_much_was_computed_again(run, capsys):
    findings = found(run)
    assert [str(finding) for finding in findings.values() if finding.agrees is not True] == []
    n_stores = sum(map(len, MEASURED.values())) + len(NEEDED)
    again = computed_again(findings)
    assert len(findings) == 1 + n_stores + len(again) + 1 and len(again) == len(MEASURED) + len(NEEDED)
    assert all(float(finding.detail.split()[-1]) < 1e-5 for finding in again)
    said = findings["computed again"].detail
    assert said.startswith(f"{len(again)} of ") and all(name in said for name in (*MEASURED, *NEEDED))
    assert main(["verify", str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(findings) + 1 and printed[-1] == "all that was checked agrees"


def test_manifest_says_what_made_the_store(run):
    (store,) = run.glob("measured/*-heads-mean-*.zarr")
    noted = json.loads(manifest_of(store).read_text())
    attributes = {name: value for name, value in open_store(store).attrs.items() if name not in OF_THE_STORE}
    assert {name: noted[name] for name in attributes} == attributes
    assert noted["version"] == __version__ and noted["packages"]["torch"] == metadata.version("torch")
    assert noted["source"].endswith("tiny") and noted["machine"]["cores"] >= 1 and noted["seconds"] >= 0
    assert set(noted["packages"]) >= {"transformer_lens", "transformers", "xarray", "zarr"}


@pytest.mark.slow("every changed file of a run is named")
def test_changed_files_are_named(run, capsys):
    (run / "heads_resample.csv").write_text("model\nx\n")
    (run / "heads_mean.csv").write_text("model\n")
    findings = found(run)
    assert findings["heads_resample.csv"].detail == "changed since the run"
    assert findings["heads_mean.csv"].detail == "not in the manifest"
    assert findings["files"].agrees is False
    assert main(["verify", str(run), "--device", "cpu"]) == 1
    assert "heads_resample.csv" in capsys.readouterr().out
    (run / "heads_resample.csv").unlink()
    assert found(run)["heads_resample.csv"].detail == "missing"


@pytest.mark.slow("wrong numbers under right checksums are found")
@pytest.mark.parametrize(
    ("measurement", "variable"),
    [
        *(("heads-resample", "logit_change"), ("probabilities", "probability"), ("self_feeding", "after")),
        *(("earlier_input", "earlier"), ("cosines", "layers"), ("alignment", "gradient"), ("constants", "z")),
        *(("neurons", "total"), ("neurons", "change_by_neuron"), ("tokens", "token")),
    ],
)
def test_wrong_numbers_with_right_checksums_are_found(run, measurement, variable):
    for store in run.glob(f"measured/*-{measurement}*.zarr"):
        spoil(store, variable, lambda values: values[::-1] if values.dtype.kind == "i" else values * 1.01)
    wrong = [finding for finding in found(run).values() if finding.agrees is False]
    assert any(measurement in finding.what and "computed again" in finding.detail for finding in wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_found_whatever_its_checksum(run, value):
    for store in run.glob("measured/*-heads-*.zarr"):
        spoil(store, "logit_change", lambda values: np.full_like(values, value))
    (again,) = [finding for finding in computed_again(found(run)) if "-heads-" in finding.what]
    assert again.agrees is False and "logit_change is not finite" in again.detail


def test_a_damaged_store_and_other_weights_are_found(run):
    (damaged,) = run.glob("measured/*-heads-resample-*.zarr")
    zarr.open_group(damaged, mode="r+")["sigma_clean"][0, 0] = 3
    save_family("llama", run.parent / "tiny")
    findings = found(run)
    assert findings[damaged.name].agrees is False and "damaged" in findings[damaged.name].detail
    assert all(finding.agrees is False for finding in findings.values() if finding.what.endswith(".zarr"))


def test_stores_that_change_places_are_found(run):
    one, other = sorted(run.glob("measured/*-heads-*.zarr"))
    for a, b in ((one, other), (manifest_of(one), manifest_of(other))):
        aside = a.with_name("aside")
        a.rename(aside)
        b.rename(a)
        aside.rename(b)
    wrong = [finding for finding in found(run).values() if finding.agrees is False]
    assert {one.name, other.name} <= {finding.what for finding in wrong}
    assert all(
        "its name should be" in finding.detail for finding in wrong if finding.what in (one.name, other.name)
    )


def test_a_manifest_that_is_missing_or_says_otherwise_is_found(run):
    one, other = sorted(run.glob("measured/*-heads-*.zarr"))
    manifest_of(one).unlink()
    noted = json.loads(manifest_of(other).read_text())
    manifest_of(other).write_text(json.dumps(noted | {"seed": 7}))
    findings = found(run)
    assert findings[one.name].agrees is False and "manifest" in findings[one.name].detail
    assert findings[other.name].agrees is False and "seed" in findings[other.name].detail


def test_other_code_is_not_computed_again(run, monkeypatch):
    monkeypatch.setattr("selfrepair.measure.task.code_version", lambda *_, **__: "other")
    findings = found(run)
    assert computed_again(findings) == []
    whole = [finding for finding in findings.values() if finding.what.endswith(".zarr")]
    assert whole and all(finding.agrees is None and "other code" in finding.detail for finding in whole)
    assert findings["computed again"].agrees is None and findings["computed again"].detail.startswith(
        "0 of 0"
    )


def test_a_share_of_the_shards_is_computed_again(run, monkeypatch):
    monkeypatch.setattr(verify, "SHARE_OF_SHARDS", 0.75)
    of_heads = [finding for finding in computed_again(found(run)) if "-heads-" in finding.what]
    assert len(of_heads) == 3


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"'])
def test_bad_manifests_and_empty_folders_are_one_line(run, tmp_path, content, capsys):
    (run / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="not a manifest") as error:
        found(run)
    assert "\n" not in str(error.value)
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_verify_writes_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    found(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
