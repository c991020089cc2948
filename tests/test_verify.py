"""Manifests say what made a result; verify finds what no longer agrees."""

import json
from importlib import metadata

import numpy as np
import pytest
import zarr
from families import random_tokens, save_family

from selfrepair import __version__
from selfrepair.store import datasets as results
from selfrepair.run import verify
from selfrepair.measure import heads as sweep_module
from selfrepair.cli import main
from selfrepair.text.corpora import Prompts
from selfrepair.errors import UserError
from selfrepair.store.manifest import hash_files, manifest_of, write_manifest
from selfrepair.models.loading import load_model
from selfrepair.store.datasets import open_store
from selfrepair.measure.heads import sweep

PROMPTS = Prompts(random_tokens(8).numpy(), "random")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A results folder with two sweeps, a file and its manifest."""
    monkeypatch.setattr(results, "SHARD_PAIRS", 2)
    model = load_model(str(save_family("gpt2", tmp_path / "tiny")), "cpu")
    out = tmp_path / "results"
    for kind in ("resample", "mean"):
        sweep(model, PROMPTS, kind, out / "sweeps", progress=False)
    (out / "heads_resample.csv").write_text("model\n")
    write_manifest(out / "manifest.json", 1, files=hash_files(out))
    return out


def found(run):
    return {finding.what: finding for finding in verify.verify(run, "cpu", seed=1)}


def test_an_untouched_run_agrees(run, capsys):
    findings = found(run)
    assert {finding.agrees for finding in findings.values()} == {True} and len(findings) == 4
    (again,) = [finding.detail for finding in findings.values() if "computed again" in finding.detail]
    assert float(again.split()[-1]) < 1e-5
    assert main(["verify", str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and printed[-1] == "all that was checked agrees"


def test_manifest_says_what_made_the_store(run):
    (store,) = run.glob("sweeps/*-mean-*.zarr")
    noted = json.loads(manifest_of(store).read_text())
    attributes = open_store(store).attrs
    assert {name: noted[name] for name in attributes if name != "format"} == {n: v for n, v in attributes.items() if n != "format"}
    assert noted["version"] == __version__ and noted["packages"]["torch"] == metadata.version("torch")
    assert noted["source"].endswith("tiny") and noted["machine"]["cores"] >= 1 and noted["seconds"] >= 0
    assert set(noted["packages"]) >= {"transformer_lens", "transformers", "xarray", "zarr"}


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


def test_a_wrong_number_with_a_right_checksum_is_found(run):
    """What only computing it again can find: values that were changed with their checksum."""
    for store in run.glob("sweeps/*.zarr"):
        array = zarr.open_group(store, mode="r+")["logit_change"]
        array[:] = array[:] * 1.01
        array.attrs["sha256"] = results._checksum(array)
    again = [finding for finding in found(run).values() if "computed again" in finding.detail]
    assert len(again) == 1 and again[0].agrees is False


def test_a_damaged_store_and_other_weights_are_found(run, tmp_path):
    damaged, other = sorted(run.glob("sweeps/*.zarr"))
    array = zarr.open_group(damaged, mode="r+")["sigma_clean"]
    array[0, 0] = 3
    save_family("llama", tmp_path / "tiny")
    findings = found(run)
    assert findings[damaged.name].agrees is False and "damaged" in findings[damaged.name].detail
    (again,) = [finding for finding in findings.values() if ", shard" in finding.what]
    assert again.what.startswith(other.name) and again.agrees is False and "weights" in again.detail


def test_other_code_is_not_computed_again(run, monkeypatch):
    monkeypatch.setattr(verify, "code_version", lambda *_: "other")
    (again,) = [finding for finding in found(run).values() if ", shard" in finding.what]
    assert again.agrees is None and "other code" in again.detail


def test_a_hundredth_of_the_shards_is_computed_again(run, monkeypatch):
    monkeypatch.setattr(verify, "SHARE_OF_SHARDS", 0.75)
    assert len([finding for finding in found(run).values() if ", shard" in finding.what]) == 3


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


def test_store_values_are_read_by_nobody_else(run):
    """The parts of a shard computed again lie where the store has them."""
    (store,) = run.glob("sweeps/*-resample-*.zarr")
    model = load_model(json.loads(manifest_of(store).read_text())["source"], "cpu")
    work = sweep_module.Sweep(model, PROMPTS, "resample", store.parent)
    for part in work.computed_again(2):
        np.testing.assert_allclose(part.logit_change, open_store(store).logit_change.isel(prompt=part.prompt.values), atol=1e-5)
