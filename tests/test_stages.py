"""The manifest of a run names what this run measured, and nothing that an earlier one left in the same folder."""

import dataclasses
import json

import pytest
from PIL import Image

from selfrepair.errors import UserError
from selfrepair.models.loading import load_model
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.run import verify
from selfrepair.run.study import Study
from selfrepair.run.workflow import merge_shards, plan, summarise
from selfrepair.store.datasets import open_store
from selfrepair.store.manifest import manifest_of
from selfrepair.text.corpora import hash_documents, read_documents

MODEL = "pocket-pythia-small"


def study(folder, n_prompts):
    settings = Study.of(model=MODEL, n_prompts=n_prompts, ablation="zero", device="cpu", out_dir=folder)
    return dataclasses.replace(settings, profile=settings.profile.changed(prompt_len=12))


@pytest.fixture
def run(tmp_path):
    """A finished run without notebooks, its store, and the store of an earlier run of other prompts."""
    earlier, store = (merge_shards(study(tmp_path, n_prompts), MODEL, "zero") for n_prompts in (6, 4))
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "figures" / "01_one.png")
    said = summarise(study(tmp_path, 4), "tiny")
    return tmp_path, earlier, store, said


def test_manifest_of_a_run_names_its_sweeps_and_what_they_were_made_from(run):
    folder, earlier, store, said = run
    noted = json.loads((folder / "manifest.json").read_text())
    assert said.endswith(str(folder / "index.html")) and (folder / "index.html").is_file()
    assert list(noted["sweeps"]) == [f"{MODEL} zero"]
    made_from = noted["sweeps"][f"{MODEL} zero"]
    assert made_from["store"] == store.name != earlier.name
    attributes = open_store(store).attrs
    assert {name: made_from[name] for name in ("weights_sha256", "tokens_sha256")} == {
        name: attributes[name] for name in ("weights_sha256", "tokens_sha256")
    }
    assert noted["held_out_text_sha256"] == hash_documents(read_documents(HELD_OUT_TEXT))
    assert noted["settings"]["n_prompts"] == 4 and noted["profile"] == "tiny" and noted["seed"] == 0
    assert set(noted["files"]) == {"figures/01_one.png"}


def test_of_two_equal_sweeps_the_last_counts(run):
    """As after the weights of a model's folder have changed."""
    folder, _, store, _ = run
    other = folder / "sweeps" / f"{MODEL}-zero-000000000000.zarr"
    note = json.loads(manifest_of(store).read_text())
    for finished, wanted in (("1999-01-01T00:00:00+00:00", store), ("2999-01-01T00:00:00+00:00", other)):
        manifest_of(other).write_text(json.dumps(note | {"finished": finished}))
        summarise(study(folder, 4), "tiny")
        assert json.loads((folder / "manifest.json").read_text())["sweeps"][f"{MODEL} zero"]["store"] == wanted.name


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"sweeps": 3}', b"\xff"])
def test_a_damaged_manifest_is_one_line(run, content):
    folder, _, store, _ = run
    manifest_of(store).write_bytes(content)
    with pytest.raises(UserError, match=rf"{manifest_of(store).name}: not .* delete it.* and run again$"):
        summarise(study(folder, 4), "tiny")
    assert {finding.what for finding in verify.verify(folder, "cpu", seed=0) if not finding.agrees} >= {store.name}


def test_a_lost_store_is_found(run):
    folder, _, store, _ = run
    assert all(finding.agrees for finding in verify.verify(folder, "cpu", seed=0))
    store.rename(folder / "elsewhere.zarr")
    lost = [finding for finding in verify.verify(folder, "cpu", seed=0) if not finding.agrees]
    assert [finding.what for finding in lost] == [f"{MODEL} zero"] and "missing" in lost[0].detail


def test_memory_that_jobs_ask_for(run):
    """A model's weights twice; notebooks hold what was measured on all models twice over, or one model's in four parts."""
    folder, _, store, _ = run
    on_disk = sum(values.nbytes for values in open_store(store).variables.values() if values.ndim == 4) / 1e6
    profile = study(folder, 4).profile
    of_one = plan(profile)["models"][MODEL]["mem_mb"]
    weights = 4 * load_model(MODEL, "cpu").hf.num_parameters() / 1e6
    assert 2 * weights < of_one - 2500 < 3 * weights  # embeddings count twice, as they do where they are not tied
    more = {n: plan(profile.changed(n_prompts=n))["notebook_mem_mb"] for n in (4, 4_000_000)}
    assert more[4_000_000] - more[4] == pytest.approx(4 * on_disk * 1e6, rel=1e-5)
    both = plan(profile.changed(models=[MODEL, "pocket-gpt2"], n_prompts=4_000_000))
    of_gpt2 = 6 / 4 * on_disk  # it has as many heads in each of six layers, not four
    assert both["notebook_mem_mb"] - more[4_000_000] == pytest.approx(1e6 * 4 * (of_gpt2 - on_disk), rel=1e-3)
