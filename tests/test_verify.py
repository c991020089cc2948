"""verify finds what no longer agrees in what a run left: a table of everything that can be lost or falsified."""

import json
import os
import re
import shutil
from importlib import metadata

import numpy as np
import pytest
import zarr
from families import random_tokens, save_family
from finished_run import MEASURED, NAME, finish, one_notebook
from PIL import Image
from tasks import heads_task

from selfrepair import __version__
from selfrepair.cli.main import main
from selfrepair.measure.measurement import measurement_names
from selfrepair.models.loading import load_model
from selfrepair.run import recomputed, verify
from selfrepair.run.marks import mark, say_done
from selfrepair.run.page import write_page
from selfrepair.store import stores
from selfrepair.store.files import hash_file, write_atomically
from selfrepair.store.manifest import manifest_of
from selfrepair.store.stores import open_store

pytestmark = pytest.mark.slow("what was changed or lost in a finished run is found, and what was not is not")

#: Attributes that writing a store gives it.
OF_THE_STORE = ("format", stores.CHECKSUM, stores.CHECKSUMS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with one_notebook(tmp_path_factory.mktemp("notebooks")):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    """A folder with a finished run, and its model."""
    folder = tmp_path_factory.mktemp("run")
    finish(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """The same, to be spoilt."""
    return shutil.copytree(finished / "results", tmp_path / "results")


def found(run):
    """Findings by what they are of; of two of the same, the one that differs."""
    findings = {}
    for finding in verify.verify(run, "cpu", seed=1):
        if findings.get(finding.what) is None or findings[finding.what].agrees is not False:
            findings[finding.what] = finding
    return findings


def saying(run):
    """What is said of a run, as it is found."""
    return map(str, verify.verify(run, "cpu", seed=1))


def computed_again(findings):
    return [finding for finding in findings.values() if ", shard" in finding.what]


# --- falsifying -------------------------------------------------------------------------------------------


def store_of(run, label):
    (store,) = run.glob(f"measured/{NAME}-{label}-????????????.zarr")
    return store


def write_again(store, data, **attributes):
    """Writes a store once more, checksums and all."""
    own = {name: value for name, value in data.attrs.items() if name not in OF_THE_STORE}
    stores.write_store([data.drop_attrs(deep=False).assign_attrs(own | attributes)], store)


def spoil(store, change, name=None):
    """Other values under right checksums, by default in all variables that hold numbers to change."""
    data = open_store(store).load()
    for variable in [name] if name else data.data_vars:
        if data[variable].dtype.kind in "fi":
            data[variable] = data[variable].copy(data=change(data[variable].values))
    write_again(store, data)


def edit_json(path, **changes):
    """Other values; where one is a function, of the old value."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content[name] = value(content[name]) if callable(value) else value
    write_atomically(path, json.dumps(content, indent=1).encode())


def edit(file, old=None, new=None):
    """Another text in a file, or one byte more at its end."""
    content = file.read_bytes()
    assert old is None or old.encode() in content
    file.write_bytes(content + b"\n" if old is None else content.replace(old.encode(), new.encode()))


def cover_up(run, *what):
    """What somebody may renew who falsifies: stores' ``manifests``, their and files' ``checksums`` in the run's
    manifest, its ``page``, the last ``mark``. All of them: nothing but the value itself can tell."""
    noted = json.loads((run / "manifest.json").read_text())
    for note in noted["stores"].values():
        store = run / "measured" / note["store"]
        attributes = open_store(store).attrs
        if "manifests" in what:
            own = {name: value for name, value in attributes.items() if name != "format"}
            edit_json(manifest_of(store), **own)
        if "checksums" in what:
            kept = json.loads(manifest_of(store).read_text())
            note |= {name: kept[name] for name in note.keys() & kept.keys()}
            note |= {"sha256": attributes["sha256"], "manifest_sha256": hash_file(manifest_of(store))}
    if "page" in what:
        without = {name: part for name, part in noted.items() if name != "files"}
        (run / "manifest.json").write_text(json.dumps(without))
        write_page(run)
    if "checksums" in what:
        noted["files"] = {name: hash_file(run / name) for name in noted["files"] if (run / name).is_file()}
    (run / "manifest.json").write_text(json.dumps(noted))
    if "mark" in what:
        path = mark(run, "page")
        said = json.loads(path.read_text())
        left = [run / name for name in said["left"] if (run / name).exists()]
        say_done(path, left, run, key=said["key"])


EVERYTHING = ("manifests", "checksums", "page", "mark")


def covered(change, *what):
    """A change, and then the cover-up; by default of everything."""

    def tamper(run):
        change(run)
        cover_up(run, *(what or EVERYTHING))

    return tamper


def manifest_says(**changes):
    return lambda run: edit_json(run / "manifest.json", **changes)


def setting(**changes):
    return manifest_says(settings=lambda settings: settings | changes)


def of_note(label, **changes):
    """Of one store, in the run's manifest."""

    def change(notes):
        (name,) = (name for name in notes if name.endswith(f" {label}"))
        return notes | {name: notes[name] | changes}

    return manifest_says(stores=change)


def without_note(label):
    return manifest_says(
        stores=lambda notes: {name: note for name, note in notes.items() if not name.endswith(label)}
    )


def lost(label):
    return lambda run: shutil.rmtree(store_of(run, label))


def exchanged(one, other, suffixes=(".zarr", ".manifest.json")):
    def tamper(run):
        places = [[store_of(run, label).with_suffix(suffix) for suffix in suffixes] for label in (one, other)]
        for a, b in zip(*places, strict=True):
            aside = a.with_name("aside")
            a.rename(aside)
            b.rename(a)
            aside.rename(b)

    return tamper


def times(factor):
    return lambda values: values[::-1] if values.dtype.kind == "i" else values * factor


def spoilt(label, change=times(1.01), name=None):  # noqa: B008
    return lambda run: spoil(store_of(run, label), change, name)


def one_is(value):
    """In the last prompt, which may be in no shard that is computed again."""

    def change(values):
        values = values.copy()
        values[..., -1, -1] = value
        return values

    return change


def attribute(label, **changes):
    def tamper(run):
        write_again(store_of(run, label), open_store(store_of(run, label)).load(), **changes)

    return tamper


def chunk_of(run, label):
    return max(
        (file for file in store_of(run, label).rglob("c*") if file.is_file()), key=lambda f: f.stat().st_size
    )


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def copied(run):
    store = store_of(run, "cosines")
    other = store.with_name(f"{NAME}-cosines-000000000000.zarr")
    shutil.copytree(store, other)
    shutil.copy(manifest_of(store), manifest_of(other))


def renamed(run):
    store = store_of(run, "cosines")
    other = store.with_name(f"{NAME}-cosines-000000000000.zarr")
    store.rename(other)
    manifest_of(store).rename(manifest_of(other))
    of_note("cosines", store=other.name)(run)


#: What is done to a run → the beginning of what is said of it, as a regular expression.
TAMPERING = {
    # Files.
    "page edited": (lambda run: edit(run / "index.html"), r"index.html: changed since the run"),
    "page replaced by one word": (
        lambda run: (run / "index.html").write_text("word"),
        r"index.html: changed",
    ),
    "page missing": (lambda run: (run / "index.html").unlink(), r"index.html: missing"),
    "page edited with its checksum": (
        covered(lambda run: edit(run / "index.html"), "checksums"),
        r"done/page.done: .*index.html",
    ),
    "page edited with all checksums": (
        covered(lambda run: edit(run / "index.html", "Means over", "Sums over"), "checksums", "mark"),
        r"index.html: is not what follows",
    ),
    "figure edited": (lambda run: edit(run / "figures/01_one.png"), r"figures/01_one.png: changed"),
    "figure missing": (lambda run: (run / "figures/01_one.png").unlink(), r"figures/01_one.png: missing"),
    "figure added": (
        lambda run: shutil.copy(run / "figures/01_one.png", run / "figures/02_two.png"),
        r"figures/02_two.png: not in the manifest",
    ),
    "figure replaced with its checksum": (
        covered(lambda run: Image.new("RGB", (8, 8)).save(run / "figures/01_one.png"), "checksums"),
        r"done/page.done: .*figures/01_one.png",
    ),
    "figure replaced with all checksums": (
        covered(lambda run: Image.new("RGB", (8, 8)).save(run / "figures/01_one.png"), "checksums", "mark"),
        r"index.html: is not what follows",
    ),
    "table of heads edited": (
        lambda run: edit(run / "heads_mean.csv", "0.0", "0.1"),
        r"heads_mean.csv: changed",
    ),
    "table of heads missing": (lambda run: (run / "heads_mean.csv").unlink(), r"heads_mean.csv: missing"),
    "table of heads edited with everything that hangs on it": (
        covered(lambda run: edit(run / "heads_mean.csv", "0.0", "0.1")),
        r"heads_mean.csv: is not what follows from the stores",
    ),
    "tokens of heads edited with everything that hangs on them": (
        covered(lambda run: edit(run / "head_tokens.json", "0.", "0.9")),
        r"head_tokens.json: is not what follows",
    ),
    "table of comparison added": (
        lambda run: (run / "comparison.csv").write_text("model,quantity\na,b\n"),
        r"comparison.csv: not in the manifest",
    ),
    "claims edited": (lambda run: edit(run / "claims/01.csv"), r"claims/01.csv: changed"),
    "claims missing": (lambda run: (run / "claims/01.csv").unlink(), r"claims/01.csv: missing"),
    "claims edited with everything that hangs on them": (
        covered(
            lambda run: [
                edit(file, "0.", "0.9") for file in (run / "claims/01.csv", run / "figures/claims.csv")
            ]
        ),
        r"(claims/01.csv: is not what its notebook shows|figures/claims.md: is not what follows)",
    ),
    "all claims in one edited with everything that hangs on them": (
        covered(lambda run: edit(run / "figures/claims.csv", "0.", "0.9")),
        r"figures/claims.csv: is not what follows",
    ),
    "all claims in words missing": (
        lambda run: (run / "figures/claims.md").unlink(),
        r"figures/claims.md: missing",
    ),
    **{
        f"{what} {how}": (lambda run, file=file, spoil=spoil: spoil(run / file), rf"{file}: {said}")
        for what, file in (
            ("executed notebook", "notebooks/01_one.ipynb"),
            ("notebook as HTML", "notebooks/01_one.html"),
        )
        for how, spoil, said in (
            ("edited", edit, "changed"),
            ("missing", os.unlink, "missing"),
        )
    },
    "notebook as HTML edited with all checksums": (
        covered(lambda run: edit(run / "notebooks/01_one.html", "measured", "mesured"), "checksums", "mark"),
        r"notebooks/01_one.html: is not what follows",
    ),
    "executed notebook edited with all checksums": (
        covered(lambda run: edit(run / "notebooks/01_one.ipynb", "measured", "mesured"), "checksums", "mark"),
        r"claims/01.csv: is not what its notebook shows",
    ),
    # The run's manifest.
    "manifest missing": (lambda run: (run / "manifest.json").unlink(), r"manifest.json: missing"),
    "manifest empty": (
        lambda run: (run / "manifest.json").write_text(""),
        r"manifest.json: .*not a manifest",
    ),
    "manifest of a list": (
        lambda run: (run / "manifest.json").write_text("[]"),
        r"manifest.json: .*not a manifest",
    ),
    "manifest of nothing": (
        lambda run: (run / "manifest.json").write_text("{}"),
        r"manifest.json: says nothing that can be read of profile, held_out_text_sha256",
    ),
    "manifest without settings": (
        lambda run: edit_json(run / "manifest.json", settings=None),
        r"manifest.json: says nothing that can be read of settings",
    ),
    "manifest names a file elsewhere": (
        manifest_says(files=lambda files: files | {"../small.yaml": "0"}),
        r"manifest.json: names \.\./small.yaml",
    ),
    **{
        f"manifest with false {name}": (manifest_says(**{name: value}), r"done/page.done: .*manifest.json")
        for name, value in {
            "settings": lambda settings: settings | {"fraction": 0.1},
            "seed": 7,
            "commit": "0" * 40,
            "library": "0" * 12,
            "packages": lambda packages: packages | {"torch": "1.0"},
            "seconds": 1.5,
        }.items()
    },
    **{
        f"manifest and mark with false {name}": (
            covered(setting(**{name: value}), "mark"),
            rf".*: by the run's settings, .*{name}.* should be different",
        )
        for name, value in {
            "n_prompts": 6,
            "prompt_len": 10,
            "fraction": 0.1,
            "layer_positions": "all",
        }.items()
    },
    "manifest, page and mark with false seed": (
        covered(manifest_says(seed=7), "page", "checksums", "mark"),
        r".* tokens: by the run's settings, .*seed.* should be different",
    ),
    "manifest, page and mark with false precision": (
        covered(setting(dtype="bfloat16"), "page", "checksums", "mark"),
        r".*: by the run's settings, .*dtype.* should be different",
    ),
    "manifest and mark with a kind of ablation less": (
        covered(setting(ablations=["resample"]), "mark"),
        r".* heads-mean: the manifest names a store that is not in the run's plan",
    ),
    "manifest and mark with a kind of ablation more": (
        covered(setting(ablations=["resample", "mean", "zero"]), "mark"),
        r".* heads-zero: is in the run's plan, but the manifest names no store of it",
    ),
    "manifest and mark with settings that are none": (
        covered(setting(n_prompts="many"), "mark"),
        r"manifest.json: its settings are not those of a run",
    ),
    "manifest and mark with a setting that is unknown": (
        covered(setting(patience=3), "mark"),
        r"manifest.json: its settings are not those of a run",
    ),
    "manifest and mark of another profile's name": (
        covered(manifest_says(profile="paper"), "mark"),
        r"manifest.json: is of paper, its settings of small",
    ),
    "manifest and mark with another hash of the text": (
        covered(manifest_says(held_out_text_sha256="0" * 64), "mark"),
        r"manifest.json: its held-out text is not the one that is here",
    ),
    "manifest and mark with another notebook's key": (
        covered(manifest_says(notebooks={"01_one": "0" * 12}), "mark"),
        r"done/notebooks/01.done: missing, or not of the manifest's key",
    ),
    **{
        f"manifest and mark with false {name}": (
            covered(manifest_says(**{name: value}), "mark"),
            rf"index.html: does not show the manifest's {name}",
        )
        for name, value in {
            "commit": "0" * 40,
            "library": "0" * 12,
            "version": "99.1",
            "python": "2.7.18",
            "command": "selfrepair nothing",
            "finished": "1999-01-01T00:00:00+00:00",
            "packages": lambda packages: packages | {"torch": "77.1"},
            "machine": lambda machine: machine | {"processor": "abacus"},
        }.items()
    },
    "manifest and mark with a store's false checksum": (
        covered(of_note("heads-mean", sha256="0" * 64), "mark"),
        r".* heads-mean: the run's manifest says otherwise of sha256",
    ),
    "manifest and mark with a store's false weights": (
        covered(of_note("heads-mean", weights_sha256="0" * 64), "mark"),
        r".* heads-mean: the run's manifest says otherwise of weights_sha256",
    ),
    "manifest and mark with a store's false time": (
        covered(of_note("heads-mean", seconds=1e9), "mark"),
        r".* heads-mean: the run's manifest says otherwise of seconds",
    ),
    "manifest and mark without a store": (
        covered(without_note("heads-mean"), "mark"),
        r".* heads-mean: is in the run's plan, but the manifest names no store of it",
    ),
    "store put outside of the plan": (
        covered(
            lambda run: [
                without_note("cosines")(run),
                manifest_says(outside_the_plan=[f"measured/{store_of(run, 'cosines').name}"])(run),
            ],
            *EVERYTHING,
        ),
        r".* cosines: is in the run's plan, but the manifest names no store of it",
    ),
    # Marks.
    "last mark missing": (lambda run: mark(run, "page").unlink(), r"done/page.done: missing"),
    "last mark damaged": (lambda run: mark(run, "page").write_text("{"), r"done/page.done: missing, damaged"),
    "last mark that answers for nothing": (
        lambda run: edit_json(mark(run, "page"), left={}),
        r"done/page.done: missing, damaged or of another run",
    ),
    "notebook's mark missing": (
        lambda run: mark(run, "notebooks", "01").unlink(),
        r"done/notebooks/01.done: missing",
    ),
    "notebook's mark of another key": (
        lambda run: edit_json(mark(run, "notebooks", "01"), key="0"),
        r"done/notebooks/01.done: missing, or not of",
    ),
    "marks missing": (lambda run: shutil.rmtree(run / "done"), r"done/page.done: missing"),
    # What was measured.
    "everything measured missing": (
        lambda run: shutil.rmtree(run / "measured"),
        r".* heads-mean: the store that the manifest names is missing",
    ),
    **{
        f"{label} missing": (lost(label), rf".* {label}: the store that the manifest names is missing")
        for label in MEASURED
    },
    "store with a damaged value": (
        lambda run: flip_a_bit(chunk_of(run, "layers-resample")),
        r".* layers-resample: .* is damaged",
    ),
    "store without a part": (lambda run: chunk_of(run, "tokens").unlink(), r".* tokens: .* is damaged"),
    "store without its description": (
        lambda run: (store_of(run, "tokens") / "zarr.json").unlink(),
        r".* tokens: .* is damaged",
    ),
    "store's value set without its checksum": (
        lambda run: zarr.open_group(store_of(run, "heads-resample"), mode="r+")["sigma_clean"].__setitem__(
            (0, 0), 3
        ),
        r".* heads-resample: .* is damaged",
    ),
    "store's manifest missing": (
        lambda run: manifest_of(store_of(run, "facts")).unlink(),
        r".* facts: .*manifest.json is not the one that the run left",
    ),
    "store's manifest damaged": (
        lambda run: manifest_of(store_of(run, "facts")).write_text("{"),
        r".* facts: .*manifest.json is not the one that the run left",
    ),
    **{
        f"store's manifest with false {name}": (
            lambda run, name=name, value=value: edit_json(
                manifest_of(store_of(run, "facts")), **{name: value}
            ),
            r".* facts: .*manifest.json is not the one that the run left",
        )
        for name, value in {"seed": 7, "commit": "0" * 40, "seconds": 1e9, "command": "x"}.items()
    },
    "store's manifest with false seed, with everything that hangs on it": (
        covered(
            lambda run: edit_json(manifest_of(store_of(run, "facts")), seed=7), "checksums", "page", "mark"
        ),
        rf"{NAME}-facts-.*: its manifest says otherwise of seed",
    ),
    "stores exchanged with their manifests": (
        exchanged("heads-resample", "heads-mean"),
        r".* heads-mean: .*manifest.json is not the one that the run left",
    ),
    "stores exchanged without their manifests": (
        exchanged("heads-resample", "heads-mean", (".zarr",)),
        r".* heads-mean: the run's manifest says otherwise of ablation",
    ),
    "stores exchanged with everything that hangs on them": (
        covered(exchanged("heads-resample", "heads-mean")),
        rf"{NAME}-heads-resample-.*: by what determines it, its name should be {NAME}-heads-mean-",
    ),
    "store under a name of its own beside it": (
        copied,
        rf"{NAME}-cosines-000000000000.zarr: not in the manifest",
    ),
    "store renamed with everything that hangs on it": (
        covered(renamed),
        rf"{NAME}-cosines-000000000000.zarr: by what determines it, its name should be {NAME}-cosines-",
    ),
    "store's attribute changed with its checksum": (
        attribute("probabilities", n_prompts=6),
        r".* probabilities: the run's manifest says otherwise of sha256",
    ),
    "store's attribute changed with everything that hangs on it": (
        covered(attribute("probabilities", n_prompts=6)),
        r".* probabilities: by the run's settings, n_prompts should be different",
    ),
    "store's name does not follow from its attributes": (
        covered(attribute("probabilities", inputs={"tokens": "others"})),
        rf"{NAME}-probabilities-.*: by what determines it, its name should be",
    ),
    **{
        f"{value} with its checksum": (
            spoilt("heads-resample", one_is(value), "logit_change"),
            r".* heads-resample: the run's manifest says otherwise of sha256",
        )
        for value in (np.nan, np.inf)
    },
    **{
        f"{value} everywhere, with everything that hangs on it": (
            covered(
                spoilt(
                    "heads-resample", lambda values, value=value: np.full_like(values, value), "logit_change"
                )
            ),
            r".*-heads-resample-.*, shard \d+: logit_change is not finite where it should be",
        )
        for value in (np.nan, np.inf)
    },
    "value changed with its checksum": (
        spoilt("cosines"),
        r".* cosines: the run's manifest says otherwise of sha256",
    ),
    "value changed with its store's checksum and manifest": (
        covered(spoilt("cosines"), "manifests"),
        r".* cosines: .*manifest.json is not the one that the run left",
    ),
    "value changed with every checksum but the last": (
        covered(spoilt("cosines"), "manifests", "checksums"),
        r"done/page.done: .*manifest.json",
    ),
    **{
        f"{label} changed with everything that hangs on it": (
            covered(spoilt(label)),
            rf".*-{label}-.*, shard \d+: .*(computed again, largest relative difference|is of another shape)",
        )
        for label in MEASURED
    },
}


def test_at_least_42_kinds_of_tampering_are_tried_with_every_measurement():
    assert len(TAMPERING) >= 42
    assert {label.partition("-")[0] for label in MEASURED} == {*measurement_names()}


@pytest.mark.slow(
    "everything that can be lost or falsified in a run is found, whatever checksum was renewed with it"
)
@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_found(run, monkeypatch, name):
    tamper, wanted = TAMPERING[name]
    monkeypatch.setattr(recomputed, "SHARE_OF_SHARDS", 1)
    tamper(run)
    said = []
    assert any(said.append(line) or re.match(f"DIFFERS: {wanted}", line) for line in saying(run)), said


@pytest.mark.slow("other weights or another tokenizer than those that a run measured are found")
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_another_model_under_the_same_name_is_found(finished, run, file):
    path = finished / NAME / file
    content = path.read_bytes()
    try:
        path.write_bytes(content + b" " if file != "model.safetensors" else content[:-1] + b"x")
        assert any("by the run's settings, model_files should be different" in line for line in saying(run))
    finally:
        path.write_bytes(content)


@pytest.mark.slow("a sample of every measurement is computed again, and how much is said")
def test_an_untouched_run_agrees_and_says_how_much_was_computed_again(run, capsys):
    findings = found(run)
    assert [str(finding) for finding in findings.values() if finding.agrees is not True] == []
    again = computed_again(findings)
    labels = {re.sub("-[0-9a-f]{12}.zarr.*", "", one.what).removeprefix(f"{NAME}-") for one in again}
    assert labels <= {*MEASURED}
    assert {label.partition("-")[0] for label in labels} == {label.partition("-")[0] for label in MEASURED}
    assert all(float(finding.detail.split()[-1]) < 1e-5 for finding in again)
    said = findings["computed again"].detail
    assert said.startswith(f"{len(again)} of ")
    assert all(name.partition("-")[0] in said for name in MEASURED)
    assert main(["verify", str(run), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all that was checked agrees"


def test_the_manifests_own_checksum_is_said_to_be_kept_elsewhere(run):
    said = next(line for line in map(str, verify.verify(run, "cpu")) if "its sha256" in line)
    assert said.endswith(hash_file(run / "manifest.json"))


def test_a_run_can_be_moved(run):
    moved = run.rename(run.with_name("moved")) / "results"
    shutil.copytree(moved.parent, moved.parent.with_name("elsewhere") / "results")
    records = verify.check_record(moved.parent.with_name("elsewhere") / "results")
    assert [str(finding) for finding in records if finding.agrees is not True] == []


def test_other_code_is_not_computed_again(run, monkeypatch):
    monkeypatch.setattr("selfrepair.measure.task.code_version", lambda *_, **__: "other")
    findings = found(run)
    assert computed_again(findings) == []
    whole = [finding for finding in findings.values() if finding.what.endswith(".zarr")]
    assert whole and all(finding.agrees is None and "other code" in finding.detail for finding in whole)
    assert findings["computed again"].agrees is None
    assert findings["computed again"].detail.startswith("0 of 0")


def test_what_other_code_would_make_otherwise_is_not_called_wrong(run, monkeypatch):
    monkeypatch.setattr("selfrepair.run.verify.code_version", lambda *_, **__: "other")
    edit(run / "figures/claims.csv", "0.", "0.9")
    cover_up(run, *EVERYTHING)
    record = [finding for finding in verify.check_record(run) if finding.agrees is not True]
    assert {finding.what: finding.agrees for finding in record} == dict.fromkeys(
        ("manifest.json", "figures/claims.csv", "index.html"), None
    )
    assert "made by other library" in str(record[0])


def test_verify_writes_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    found(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


# --- stores alone, as a sweep leaves them ------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("sweeps")
    model = load_model(str(save_family("gpt2", folder / "tiny")), "cpu")
    np.save(folder / "tokens.npy", random_tokens(8).numpy())
    for ablation in ("zero", "resample"):
        heads_task(folder / "tiny", folder / "tokens.npy", folder / "out", ablation=ablation).merge([model])
    return folder / "out"


@pytest.fixture
def sweeps(swept, tmp_path):
    return shutil.copytree(swept, tmp_path / "sweeps")


def sweep_of(folder, ablation):
    (store,) = folder.glob(f"*-heads-{ablation}-*.zarr")
    return store


def test_manifest_says_what_made_the_store(sweeps):
    store = sweep_of(sweeps, "zero")
    noted = json.loads(manifest_of(store).read_text())
    attributes = {name: value for name, value in open_store(store).attrs.items() if name != "format"}
    assert {name: noted[name] for name in attributes} == attributes
    assert noted["version"] == __version__ and noted["packages"]["torch"] == metadata.version("torch")
    assert noted["source"].endswith("tiny") and noted["machine"]["cores"] >= 1 and noted["seconds"] >= 0
    assert set(noted["packages"]) >= {"transformer_lens", "transformers", "xarray", "zarr"}


def test_sweeps_need_no_manifest_of_a_run(sweeps):
    findings = found(sweeps)
    assert all(finding.agrees for finding in findings.values()) and "manifest.json" not in findings
    assert len(computed_again(findings)) == 2  # of heads and of tokens


def test_notebooks_run_by_hand_need_none_either(sweeps, tmp_path):
    """What was measured is checked; what the notebooks show is said not to be."""
    by_hand = tmp_path / "by hand"
    for name in ("notebooks", "figures", "claims"):
        (by_hand / name).mkdir(parents=True)
        (by_hand / name / "01.csv").touch()
    sweeps.rename(by_hand / "measured")
    findings = found(by_hand)
    of_notebooks = findings.pop("notebooks, figures, claims")
    assert of_notebooks.agrees is None and "made by hand" in of_notebooks.detail
    assert all(finding.agrees for finding in findings.values()) and len(computed_again(findings)) == 2
    spoil(sweep_of(by_hand / "measured", "zero"), one_is(np.nan), "logit_change")
    assert any(finding.agrees is False for finding in found(by_hand).values())


#: What is done to sweeps, and what is said of it.
OF_SWEEPS = {
    "value changed with its checksum": (
        lambda store: spoil(store, one_is(np.nan), "logit_change"),
        "its manifest says otherwise of .*sha256",
    ),
    "manifest missing": (lambda store: manifest_of(store).unlink(), "not a manifest"),
    "manifest says otherwise": (
        lambda store: edit_json(manifest_of(store), seed=7),
        "says otherwise of seed",
    ),
    "attributes and manifest say otherwise": (
        lambda store: [
            write_again(store, open_store(store).load(), seed=7),
            edit_json(manifest_of(store), seed=7, sha256=open_store(store).attrs["sha256"]),
        ],
        "its name should be",
    ),
    "attributes that are none": (
        lambda store: [
            write_again(store, open_store(store).load(), measurement="dreams"),
            edit_json(manifest_of(store), measurement="dreams", sha256=open_store(store).attrs["sha256"]),
        ],
        "its attributes are not those of a measurement",
    ),
}


@pytest.mark.parametrize("name", OF_SWEEPS)
def test_tampering_with_sweeps_is_found(sweeps, name):
    store = sweep_of(sweeps, "zero")
    tamper, wanted = OF_SWEEPS[name]
    tamper(store)
    finding = found(sweeps)[store.name]
    assert finding.agrees is False and re.search(wanted, finding.detail)


def test_a_share_of_the_shards_is_computed_again(sweeps, monkeypatch):
    monkeypatch.setattr(recomputed, "SHARE_OF_SHARDS", 0.75)
    of_heads = [finding for finding in computed_again(found(sweeps)) if "-heads-" in finding.what]
    assert len(of_heads) == 3


def test_a_model_is_loaded_once_for_all_of_its_shards(sweeps, monkeypatch):
    loaded = []
    load = recomputed.load_model
    monkeypatch.setattr(recomputed, "SHARE_OF_SHARDS", 1)
    monkeypatch.setattr(recomputed, "load_model", lambda *about: [loaded.append(about), load(*about)][1])
    assert len(computed_again(found(sweeps))) > 2
    assert len(loaded) == len(set(loaded)) == 1


def test_unfinished_work_is_said_and_its_shards_are_checked(sweeps, tmp_path):
    np.save(tmp_path / "ids.npy", random_tokens(8).numpy())
    task = heads_task(save_family("gpt2", tmp_path / "tiny"), tmp_path / "ids.npy", sweeps, ablation="mean")
    task.compute([load_model(task.model_name, "cpu")], task.shards[:1])
    said = f"unfinished: 1 of {len(task.shards)} shards"
    finding = found(sweeps)[task.shard_folder.name]
    assert finding.agrees and finding.detail.startswith(said)
    shutil.copytree(task.shard_folder, tmp_path / "alone" / task.shard_folder.name)
    assert f"agrees: {task.shard_folder.name}: {said}" in next(saying(tmp_path / "alone"))
    chunk = next(task.shard_folder.glob("*.zarr/logit_change/c*"))
    chunk.write_bytes(chunk.read_bytes()[:-4] + b"\1\2\3\4")
    finding = found(sweeps)[task.shard_folder.name]
    assert finding.agrees is False and finding.detail.endswith("000000.zarr are damaged")


def test_nothing_to_verify_is_one_line(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nothing to verify" in said
