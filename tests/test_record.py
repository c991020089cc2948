"""The manifest of a run names what this run measured, and nothing that an earlier one left in the same folder."""

import dataclasses
import json
import re
import shutil

import nbformat
import pytest
from PIL import Image

from selfrepair.analysis.claims import read_claims
from selfrepair.analysis.rules import VERDICTS
from selfrepair.cli.main import main
from selfrepair.errors import UserError
from selfrepair.paths import FIGURES, HELD_OUT_TEXT
from selfrepair.run import marks, notebooks
from selfrepair.run import study as study_module
from selfrepair.run.record import _found, summarise
from selfrepair.run.study import Study
from selfrepair.run.verify import verify
from selfrepair.store.manifest import manifest_of
from selfrepair.store.stores import open_store
from selfrepair.text.corpora import hash_documents, read_documents

pytestmark = pytest.mark.slow("the manifest of a run names all that it left, and nothing else")

MODEL = "pocket-pythia-small"
HEADS = f"{MODEL} heads-zero"


def study(folder, n_prompts):
    settings = Study.of(model=MODEL, n_prompts=n_prompts, ablation="zero", device="cpu", out_dir=folder)
    return dataclasses.replace(settings, profile=settings.profile.changed(prompt_len=12))


#: Keys of what notebooks show.
NOTEBOOKS = {"01_one": "the key of 01"}
#: What the notebook leaves: its figure, its table of heads.
CODE = 'style.save(figure, out, "01_one")\nwrite_heads(table, "zero", out)'


@pytest.fixture(scope="module")
def one_notebook(tmp_path_factory):
    """A repository of one notebook, whose runs measure heads and tokens alone."""
    folder = tmp_path_factory.mktemp("notebooks")
    cells = [nbformat.v4.new_code_cell(CODE)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "01_one.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "NOTEBOOKS", folder)
        patch.setattr(study_module, "measurement_names", lambda: ["tokens", "heads"])
        yield


def left_by_the_notebook(folder, kind="zero", model=MODEL):
    """As the notebook's job leaves them, marked."""
    (folder / "figures").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / "figures" / "01_one.png")
    (folder / f"heads_{kind}.csv").write_text(f"model,layer,head,self_repair\n{model},0,0,0.5\n")
    left = [folder / "figures" / "01_one.png", folder / f"heads_{kind}.csv"]
    marks.say_done(marks.mark(folder, "notebooks", "01"), left, folder, key=NOTEBOOKS["01_one"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_notebook):
    """A finished run of one notebook, its store, and the store of an earlier run of other prompts."""
    folder = tmp_path_factory.mktemp("run")
    models = study(folder, 4).load(MODEL)
    earlier, store = (study(folder, n).task("heads", MODEL).merge(models) for n in (6, 4))
    left_by_the_notebook(folder)
    (folder / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(), folder / "notebooks" / "01_one.ipynb")
    return folder, earlier.name, store.name, summarise(study(folder, 4), NOTEBOOKS, "the key")


@pytest.fixture
def run(finished, tmp_path):
    """The same in a folder of its own, to be spoilt."""
    folder, earlier, store, said = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / "measured" / earlier, tmp_path / "measured" / store, said


def findings(folder, agrees):
    return [finding.what for finding in verify(folder, "cpu", seed=0) if finding.agrees is agrees]


def test_manifest_of_a_run_names_its_stores_and_what_they_were_made_from(run):
    folder, earlier, store, said = run
    noted = json.loads((folder / "manifest.json").read_text())
    *_, page, then = said.splitlines()
    assert (
        page.endswith("/index.html") and page.startswith("page: ") and then.startswith("next: open the page")
    )
    assert (folder / "index.html").is_file()
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
    assert set(noted["files"]) == {
        "figures/01_one.png",
        "heads_zero.csv",
        "index.html",
        "head_tokens.json",
        *of_the_notebook,
    }
    tokens = {one.name for one in store.parent.glob("*-tokens-*.zarr")}
    (tokens,) = tokens - {noted["stores"][f"{MODEL} tokens"]["store"]}
    assert noted["outside_the_plan"] == [f"measured/{name}" for name in sorted((earlier.name, tokens))]
    assert json.loads((folder / "done" / "page.done").read_text())["key"] == "the key"


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
    assert findings(folder, agrees=False) == []
    store.rename(folder / "elsewhere.zarr")
    lost = [finding for finding in verify(folder, "cpu", seed=0) if finding.agrees is False]
    assert "missing" in {finding.what: finding.detail for finding in lost}[HEADS]


@pytest.mark.slow("what another profile left in a folder is named and left out")
def test_what_another_profile_left_is_named_and_left_out(run, capsys):
    """The profile changes in models and ablations, and runs in the same folder again."""
    folder, earlier, store, _ = run
    Image.new("RGB", (4, 4)).save(folder / "figures" / "01_of_before.png")
    changed = study(folder, 4)
    profile = changed.profile.changed(models=["pocket-gpt2"], ablations=["resample"])
    changed = dataclasses.replace(changed, profile=profile)
    changed.task("heads", "pocket-gpt2").merge(changed.load("pocket-gpt2"))
    left_by_the_notebook(folder, "resample", "pocket-gpt2")
    summarise(changed, NOTEBOOKS)
    noted = json.loads((folder / "manifest.json").read_text())
    outside = {
        "heads_zero.csv",
        "figures/01_of_before.png",
        *(f"measured/{s.name}" for s in (earlier, store)),
    }
    assert set(noted["outside_the_plan"]) >= outside and not outside & noted["files"].keys()
    assert all(name.startswith("pocket-gpt2 ") for name in noted["stores"])
    page = (folder / "index.html").read_text()
    assert "<summary>pocket-gpt2: 1 heads</summary>" in page and f"<summary>{MODEL}:" not in page
    assert page.count("<figure>") == 1 and "zero ablation" not in page
    assert all(name in page for name in outside), "they are named"
    assert main(["verify", str(folder), "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert {f"not checked: {name}: not in the run's plan: left out" for name in outside} <= {*said}
    assert not any(line.startswith("agrees") and MODEL in line for line in said)
    (folder / "heads_mean.csv").write_text("model\n")
    assert "heads_mean.csv" in findings(folder, agrees=False), "nobody knows whose this is"


@pytest.mark.parametrize("made", ["nothing", "other settings", "a figure is gone", "a store is gone"])
def test_a_folder_that_does_not_hold_this_run_is_not_summed_up(run, made):
    folder, _, store, _ = run
    before = (folder / "manifest.json").read_bytes()
    wanted, said = NOTEBOOKS, "holds no finished run of pocket as it is now .01_one is missing, or of other"
    if made == "nothing":
        marks.mark(folder, "notebooks", "01").unlink()
    elif made == "other settings":
        wanted = {"01_one": "another key"}
    elif made == "a figure is gone":
        (folder / "figures" / "01_one.png").unlink()
    else:
        shutil.rmtree(store)
        said = f"{store.name}: is missing; measure {MODEL} again first"
    with pytest.raises(UserError, match=said):
        summarise(study(folder, 4), wanted)
    assert (folder / "manifest.json").read_bytes() == before


def test_what_a_model_cannot_be_measured_on_is_not_missing(run):
    folder, _, store, _ = run
    shutil.rmtree(store)
    place = marks.mark(folder, "measured", f"{MODEL}-all")
    marks.say_done(place, [], folder, not_measured=["heads-zero: not of this model"])
    summarise(study(folder, 4), NOTEBOOKS)
    assert HEADS not in json.loads((folder / "manifest.json").read_text())["stores"]


def test_the_command_refuses_a_profile_of_which_the_folder_is_no_run(run, tmp_path, capsys):
    folder = run[0]
    profile = tmp_path / "other.yaml"
    profile.write_text("models: [pocket-gpt2]\nablations: [zero]\nn_prompts: 4\n")
    assert main(["summary", "--profile", str(profile), "--out", str(folder)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "holds no finished run of other as it is now" in said
    assert json.loads((folder / "manifest.json").read_text())["profile"] == "pocket"


def test_a_run_without_figures_is_not_summed_up(run):
    folder = run[0]
    (folder / "figures" / "01_one.png").unlink()
    marks.say_done(marks.mark(folder, "notebooks", "01"), [], folder, key=NOTEBOOKS["01_one"])
    with pytest.raises(UserError, match="holds no figures; run its profile again"):
        summarise(study(folder, 4), NOTEBOOKS)


def test_what_a_run_found_is_said_in_a_line(tmp_path):
    assert _found(tmp_path) == ""
    shutil.copytree(FIGURES / "pocket", tmp_path / "figures", ignore=shutil.ignore_patterns("*.png"))
    line = _found(tmp_path)
    number, *counts = map(int, re.findall(r"\d+", line))
    assert number == read_claims(tmp_path / "figures" / "claims.csv")["claim"].nunique() == sum(counts)
    assert line.startswith(f"found: of {number} claims, ") and line.count("\n") == 1
    assert [name for name in VERDICTS if f" {name}" in line] and "not reproduced" in line
