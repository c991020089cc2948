"""The manifest of a run names what this run measured, and nothing that an earlier one left in the same folder."""

import dataclasses
import json
import shutil

import nbformat
import pytest
from PIL import Image

from selfrepair.errors import UserError
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.run.record import summarise
from selfrepair.run.study import Study
from selfrepair.run.verify import verify
from selfrepair.store.manifest import manifest_of
from selfrepair.store.stores import open_store
from selfrepair.text.corpora import hash_documents, read_documents

MODEL = "pocket-pythia-small"
HEADS = f"{MODEL} heads-zero"


def study(folder, n_prompts):
    settings = Study.of(model=MODEL, n_prompts=n_prompts, ablation="zero", device="cpu", out_dir=folder)
    return dataclasses.replace(settings, profile=settings.profile.changed(prompt_len=12))


#: Keys of what notebooks show.
NOTEBOOKS = {"01_one": "the key of 01"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run without notebooks, its store, and the store of an earlier run of other prompts."""
    folder = tmp_path_factory.mktemp("run")
    models = study(folder, 4).load(MODEL)
    earlier, store = (study(folder, n).task("heads", MODEL).merge(models) for n in (6, 4))
    (folder / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "figures" / "01_one.png")
    (folder / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(), folder / "notebooks" / "01_one.ipynb")
    return folder, earlier.name, store.name, summarise(study(folder, 4), NOTEBOOKS, "the key")


@pytest.fixture
def run(finished, tmp_path):
    """The same in a folder of its own, to be spoilt."""
    folder, earlier, store, said = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / "measured" / earlier, tmp_path / "measured" / store, said


def test_manifest_of_a_run_names_its_stores_and_what_they_were_made_from(run):
    folder, earlier, store, said = run
    noted = json.loads((folder / "manifest.json").read_text())
    assert said.endswith("/index.html") and (folder / "index.html").is_file()
    assert set(noted["stores"]) == {HEADS, f"{MODEL} tokens"} and noted["notebooks"] == NOTEBOOKS
    made_from = noted["stores"][HEADS]
    assert made_from["store"] == store.name != earlier.name
    attributes = open_store(store).attrs
    same = ("weights_sha256", "code", "model", "measurement", "ablation", "dtype")
    assert {name: made_from[name] for name in same} == {name: attributes[name] for name in same}
    kept = json.loads(manifest_of(store).read_text())
    assert {name: made_from[name] for name in ("seconds", "finished")} == {
        name: kept[name] for name in ("seconds", "finished")
    }
    assert noted["seconds"] == pytest.approx(
        sum(note["seconds"] for note in noted["stores"].values()), abs=0.1
    )
    assert noted["held_out_text_sha256"] == hash_documents(read_documents(HELD_OUT_TEXT))
    assert noted["settings"]["n_prompts"] == 4 and noted["profile"] == "pocket" and noted["seed"] == 0
    of_the_notebook = {f"notebooks/01_one.{ending}" for ending in ("ipynb", "html")}
    assert set(noted["files"]) == {"figures/01_one.png", "index.html", *of_the_notebook}
    done = json.loads((folder / "done" / "page.done").read_text())
    assert done["key"] == "the key"
    assert set(done["left"]) == {"index.html", "notebooks/01_one.html", "manifest.json"}


def test_of_two_equal_measurements_that_of_the_models_weights_counts(run):
    """As after the weights of a model's folder have changed: the other may even have been made later."""
    folder, _, store, _ = run
    other = store.with_name(f"{MODEL}-heads-zero-000000000000.zarr")
    shutil.copytree(store, other)
    note = json.loads(manifest_of(store).read_text())
    for finished in ("1999-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"):
        manifest_of(other).write_text(json.dumps(note | {"finished": finished}))
        summarise(study(folder, 4), NOTEBOOKS)
        assert json.loads((folder / "manifest.json").read_text())["stores"][HEADS]["store"] == store.name


@pytest.mark.slow("a damaged manifest is one line")
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"stores": 3}', b"\xff"])
def test_a_damaged_manifest_is_one_line(run, content):
    folder, _, store, _ = run
    manifest_of(store).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{manifest_of(store).name}: not .* delete it.* and run again$"
    ) as error:
        summarise(study(folder, 4), NOTEBOOKS)
    assert "\n" not in str(error.value)
    assert {finding.what for finding in verify(folder, "cpu", seed=0) if finding.agrees is False} >= {
        store.name
    }


def test_a_lost_store_is_found(run):
    folder, _, store, _ = run
    assert all(finding.agrees for finding in verify(folder, "cpu", seed=0))
    store.rename(folder / "elsewhere.zarr")
    lost = [finding for finding in verify(folder, "cpu", seed=0) if not finding.agrees]
    assert [finding.what for finding in lost] == [HEADS] and "missing" in lost[0].detail


def test_a_run_without_figures_is_not_summed_up(run):
    folder = run[0]
    (folder / "figures" / "01_one.png").unlink()
    with pytest.raises(UserError, match="holds no figures; run 'selfrepair notebooks' into it first"):
        summarise(study(folder, 4), NOTEBOOKS)
