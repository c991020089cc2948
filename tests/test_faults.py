"""What breaks or kills a run: afterwards a rerun has the bytes of an undisturbed one, and computes nothing that was finished again."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from selfrepair.paths import MODELS
from selfrepair.store.manifest import add_to_manifest, manifest_of
from selfrepair.store.stores import open_store, write_store

pytestmark = pytest.mark.slow(
    "no kill, damaged file, full disk, second run or clock set back loses or changes a result"
)

#: What is measured here, and the shards of it in the order in which a run computes them.
MEASURED = ["cosines", "heads", "neurons"]
NEEDED = ["tokens:0", "constants-mean:0"]
OF_COSINES, OF_HEADS, OF_NEURONS = (
    [f"{label}:{first}" for first in (0, 4, 8)] for label in ("cosines", "heads-mean", "neurons-mean")
)
SHARDS = [NEEDED[0], *OF_COSINES, NEEDED[1], *OF_HEADS, *OF_NEURONS]
LABELS = {shard.partition(":")[0] for shard in SHARDS}
YEAR = 365 * 24 * 3600


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """The file of a profile of one tiny model."""
    folder = tmp_path_factory.mktemp("profile")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODELS / "pocket-gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=2,
        n_head=2,
        n_embd=8,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    content = {"models": [str(folder / "tiny")], "ablations": ["mean"], "n_prompts": 24, "prompt_len": 12}
    (folder / "tiny.yaml").write_text(json.dumps(content))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def run(profile):
    """``run(out, stage, *more, **fault)``: what came of one command; ``run.at_once(...)``: of several, each given as
    such a tuple."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(Path(__file__).with_name("fault_runs.py"))]
    server = subprocess.Popen(
        script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    model = json.loads(profile.read_text())["models"][0]

    def described(out, stage, *more, **fault):
        arguments = [stage, "--profile", str(profile), "--out", str(out), *more]
        if stage == "measure":
            arguments += ["--device", "cpu", "--model", model]
            fault = {"only": MEASURED, **fault}
        return {"arguments": arguments, **fault}

    def at_once(*runs):
        print(json.dumps(runs), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    def one(*described_by, **fault):
        return at_once(described(*described_by, **fault))[0]

    one.heads = lambda store: at_once({"arguments": ["heads", str(store), "--fraction", "0.1"]})[0]
    one.at_once = lambda *runs: at_once(*(described(*described_by) for described_by in runs))
    yield one
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run):
    """The results folder of a run that nothing befell."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(out, "measure")
    assert (done["status"], done["computed"]) == (0, SHARDS), done
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, run):
    """A results folder where all shards are computed, and what other measurements need is merged."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    done = run(out, "measure", "--units", *OF_COSINES, *OF_HEADS, *OF_NEURONS)
    assert (done["status"], done["computed"]) == (0, SHARDS)
    assert {label: len(files) for label, files in shards_in(out).items()} == {"cosines": 3, "neurons-mean": 3}
    return out


@pytest.fixture
def copy_of(tmp_path):
    return lambda out: shutil.copytree(out, tmp_path / "out")


def label_of(path: Path) -> str:
    """What a store, or a folder of shards, is of: ``heads-mean``."""
    return re.fullmatch(r"tiny-(.+)-[0-9a-f]{12}", path.stem)[1]


def stores_in(out: Path) -> dict[str, Path]:
    """The stores of a results folder by what they are of."""
    return {label_of(store): store for store in (out / "measured").glob("[!.]*.zarr")}


def shards_in(out: Path) -> dict[str, list[Path]]:
    """Shards that are there, by what they are of."""
    folders = (out / "measured").glob("*.shards")
    return {label_of(folder): sorted(folder.glob("[0-9]*.zarr")) for folder in folders}


def finished(out: Path) -> list[str]:
    """The shards whose numbers are on the disk, in stores or by themselves."""
    whole = stores_in(out)
    apart = {f"{label}:{int(file.stem)}" for label, files in shards_in(out).items() for file in files}
    return [shard for shard in SHARDS if shard.partition(":")[0] in whole or shard in apart]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def contents(out: Path, labels: set[str] = LABELS) -> dict[str, dict[str, bytes]]:
    """All bytes of some stores."""
    return {store.name: content(store) for label, store in stores_in(out).items() if label in labels}


def measured_again(run, out, undisturbed, *, computing, labels=LABELS, **fault):
    """Measures; asserts what was computed and that nothing tells the stores from an undisturbed run's."""
    done = run(out, "measure", **fault)
    assert (done["status"], done["computed"]) == (0, computing), done
    assert contents(out) == contents(undisturbed, labels)
    assert not list((out / "measured").glob("*.shards")) and not list((out / "measured").glob(".*"))


def flip_a_bit(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def largest_chunk(store: Path) -> Path:
    """Of a whole store, or of a shard; what lies along the prompts, not the prompts' numbers."""
    return max((file for file in store.rglob("c*") if file.is_file()), key=lambda file: file.stat().st_size)


# --- killed -------------------------------------------------------------------------------------------------------------


def without(out: Path, label: str) -> Path:
    """A results folder, less one store."""
    for left in (out / "measured").glob(f"tiny-{label}-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return out


def test_killed_at_20_random_moments_loses_no_finished_shard(tmp_path, run, undisturbed):
    """In the midst of three measurements, of whole ones and of shards alone."""
    moments, whole, found = random.Random(0), {}, []
    kinds = {"cosines": OF_COSINES, "heads": OF_HEADS, "neurons": OF_NEURONS}
    for number in range(60):  # a run may end before its moment, which was drawn from how long another took
        if len(found) == 20:
            break
        (name, shards), more = list(kinds.items())[number % 3], number % 2
        out = without(shutil.copytree(undisturbed, tmp_path / str(number)), shards[0].partition(":")[0])
        if name not in whole:
            whole[name] = run(shutil.copytree(out, tmp_path / name), "measure", only=[name])["seconds"]
        stage = ["measure", *(["--units", *shards] if more else [])]
        killed = run(out, *stage, only=[name], kill_after=moments.uniform(0, 1) * whole[name])
        if killed["status"] == 0:
            continue
        assert killed["status"] == -signal.SIGKILL
        kept = [shard for shard in shards if shard in finished(out)]
        assert set(killed["computed"][:-1]) <= set(
            kept
        )  # at most the last one was computed and not yet saved
        found.append((name, len(kept)))
        measured_again(run, out, undisturbed, computing=shards[len(kept) :], only=[name])
    assert len(found) == 20 and {name for name, _ in found} == kinds.keys() and len(set(found)) > 3, found


@pytest.mark.parametrize(
    ("shard", "moment"),
    [
        (OF_COSINES[1], "kill_before_shard"),
        (OF_HEADS[1], "kill_after_shard"),
        (OF_NEURONS[1], "kill_before_shard"),
        (OF_NEURONS[2], "kill_after_shard"),
    ],
)
def test_killed_amid_any_measurement_loses_no_finished_shard(tmp_path, run, undisturbed, shard, moment):
    """Also of the measurements that it needs, and of those before it."""
    out, kept = tmp_path / "out", SHARDS[: SHARDS.index(shard)]
    killed = run(out, "measure", **{moment: shard})
    assert killed["status"] == -signal.SIGKILL and finished(out) == kept
    assert killed["computed"] == kept + [shard] * (moment == "kill_after_shard")
    measured_again(run, out, undisturbed, computing=SHARDS[len(kept) :])


def test_killed_while_prompts_are_drawn(tmp_path, run, undisturbed):
    whole = run(tmp_path / "whole", "measure", "--stage", "0", only=["tokens"])["seconds"]
    statuses = []
    for number, share in enumerate((0.3, 0.6, 0.9, 0.99)):
        out = tmp_path / str(number)
        fault = {"only": ["tokens"], "kill_after": share * whole}
        statuses.append(run(out, "measure", "--stage", "0", **fault)["status"])
        assert run(out, "measure", "--stage", "0", only=["tokens"])["status"] == 0
        assert contents(out) == contents(undisturbed, {"tokens"})
    assert -signal.SIGKILL in statuses


# --- damaged ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["cosines", "neurons-mean"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_damaged_shard_is_computed_again_and_no_other(run, sharded, undisturbed, copy_of, label, damage):
    out = copy_of(sharded)
    damage(largest_chunk(shards_in(out)[label][1]))
    measured_again(run, out, undisturbed, computing=[f"{label}:4"])


def folder_in_place_of_chunk(store: Path) -> None:
    chunk = largest_chunk(store)
    chunk.unlink()
    chunk.mkdir()


def future_format(store: Path) -> None:
    group = json.loads((store / "zarr.json").read_text())
    group["attributes"]["format"] = 99
    (store / "zarr.json").write_text(json.dumps(group))


#: Damage to a store, and what is said of it.
DAMAGE = {
    "truncated": (lambda store: truncate(largest_chunk(store)), "damaged"),
    "bit": (lambda store: flip_a_bit(largest_chunk(store)), "damaged"),
    "folder": (folder_in_place_of_chunk, "damaged"),
    "emptied": (lambda store: (store / "zarr.json").write_bytes(b""), "damaged"),
    "future": (future_format, "format 99"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_unreadable_store_is_one_line_and_made_again(run, undisturbed, copy_of, kind):
    out, (damage, said) = copy_of(undisturbed), DAMAGE[kind]
    store = stores_in(out)["heads-mean"]
    damage(store)
    read = run.heads(store)
    assert read["status"] == 1 and read["stdout"] == [] and len(read["stderr"]) == 1
    assert str(store) in read["stderr"][0] and said in read["stderr"][0]
    measured_again(run, out, undisturbed, computing=OF_HEADS)


def test_damaged_stores_of_every_measurement_are_made_again_and_no_other(tmp_path, run):
    """What was made of one is kept, as it comes out the same."""
    out = tmp_path / "out"
    everything = run(out, "measure", only=EVERY_MEASUREMENT)
    assert everything["status"] == 0
    whole, stores = contents(out, EVERY_LABEL), stores_in(out)
    assert stores.keys() == EVERY_LABEL
    for number, (label, store) in enumerate(sorted(stores.items())):
        damage, _ = list(DAMAGE.values())[number % len(DAMAGE)]
        damage(store)
        measured = "heads" if label == "constants-mean" else label.removesuffix("-mean")
        again = run(out, "measure", only=[measured])
        wanted = [shard for shard in everything["computed"] if shard.partition(":")[0] == label]
        assert (again["status"], again["computed"]) == (0, wanted), (label, again)
        assert contents(out, EVERY_LABEL) == whole, label
    assert run(out, "measure", only=EVERY_MEASUREMENT)["computed"] == []


#: All that can be measured of a model that knows no facts and has no training checkpoints.
EVERY_MEASUREMENT = [
    *("alignment", "cosines", "earlier_input", "heads", "neurons", "probabilities", "self_feeding", "tokens"),
]
EVERY_LABEL = {
    *("tokens", "constants-mean", "heads-mean", "alignment", "cosines", "probabilities"),
    *("earlier_input-mean", "neurons-mean", "self_feeding-mean"),
}


def test_what_is_made_of_other_numbers_is_made_again(run, sharded, undisturbed, copy_of):
    """Shards and stores of neurons follow the heads that they were chosen by; what does not read those stays."""
    out = copy_of(sharded)
    heads = stores_in(out)["heads-mean"]
    other = open_store(heads).load().drop_encoding().drop_attrs(deep=False)
    other = other.assign_attrs({k: v for k, v in open_store(heads).attrs.items() if k != "sha256"})
    other["direct_effect"] = other["direct_effect"].copy(data=other["direct_effect"].values[:, ::-1])
    write_store([other], heads)
    add_to_manifest(manifest_of(heads), sha256=open_store(heads).attrs["sha256"])
    done = run(out, "measure")
    assert (done["status"], done["computed"]) == (0, OF_NEURONS), done
    neurons = content(stores_in(out)["neurons-mean"])
    assert neurons != content(stores_in(undisturbed)["neurons-mean"])
    assert contents(out, {"cosines"}) == contents(undisturbed, {"cosines"})
    assert run(out, "measure")["computed"] == []
    shutil.rmtree(heads)
    measured_again(run, out, undisturbed, computing=OF_HEADS + OF_NEURONS)


# --- two at once --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [[], ["--units", *OF_COSINES, *OF_HEADS, *OF_NEURONS]], ids=["whole", "shards"]
)
def test_two_at_once_compute_each_shard_once(tmp_path, run, undisturbed, more):
    out = tmp_path / "out"
    done = run.at_once((out, "measure", *more), (out, "measure", *more))
    assert [one["status"] for one in done] == [0, 0], done
    assert sorted(done[0]["computed"] + done[1]["computed"]) == sorted(SHARDS)
    measured_again(run, out, undisturbed, computing=[])


# --- clock --------------------------------------------------------------------------------------------------------------


def set_times(folder: Path, moment: float) -> None:
    for file in folder.rglob("*"):
        os.utime(file, (moment, moment))


def test_clock_set_back_makes_nothing_again(tmp_path, run, undisturbed):
    out = tmp_path / "out"
    assert run(out, "measure", "--units", *OF_HEADS[:2])["computed"] == [*NEEDED, *OF_HEADS[:2]]
    set_times(out, time.time() + YEAR)
    rest = OF_COSINES + OF_HEADS[2:] + OF_NEURONS
    measured_again(run, out, undisturbed, computing=rest, backwards=True)
    for manifest in (out / "measured").glob("*.manifest.json"):
        assert 0 <= json.loads(manifest.read_text())["seconds"] < 60
    set_times(out, time.time() + YEAR)
    measured_again(run, out, undisturbed, computing=[], backwards=True)


# --- disk full ----------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A small file system with a file that takes up as much of it as is wanted."""

    def __init__(self, folder: Path):
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self, leave: int) -> None:
        """Leaves so many bytes free."""
        self.ballast.write_bytes(bytes(max(0, shutil.disk_usage(self.folder).free - leave)))

    def free(self) -> None:
        self.ballast.unlink()


@pytest.fixture
def disk(small_disk):
    return SmallDisk(small_disk(8))


@pytest.mark.parametrize("leave", [0, 32 << 10])
def test_disk_full_while_merging(run, sharded, undisturbed, disk, leave):
    out = shutil.copytree(sharded, disk.folder / "out")
    disk.fill(leave)
    full = run(out, "measure")
    (error,) = [line for line in full["stderr"] if line.startswith("selfrepair: error: ")]
    assert full["status"] == 1 and "disk full" in error and full["stderr"][-1] == error
    assert "Traceback" not in "".join(full["stderr"])
    assert full["computed"] == [] and finished(out) == SHARDS
    disk.free()
    measured_again(run, out, undisturbed, computing=[])


# --- notebooks ----------------------------------------------------------------------------------------------------------

#: A figure of 3 MB, the same every time; before, a file that says which process is about to write it.
FIGURE = """
import os, time, random
from pathlib import Path
folder = Path(out_dir, "figures"); folder.mkdir(exist_ok=True)
Path(folder / f"{name}.new").write_text(str(os.getpid())); os.replace(folder / f"{name}.new", folder / f"{name}.begun")
time.sleep(seconds)
(folder / f"{name}.png").write_bytes(random.Random(0).randbytes(3 << 20))
print("drawn")
"""


def write_notebook(folder: Path, name: str, seconds: float = 0) -> None:
    cells = [
        nbformat.v4.new_code_cell("profile = None\nout_dir = None", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"name, seconds = {name!r}, {seconds}"),
        nbformat.v4.new_code_cell(FIGURE),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb"
    )


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder


def outputs(out: Path, name: str) -> list[str]:
    """What the cells of an executed notebook printed, and the hash of its figure."""
    cells = nbformat.read(out / "notebooks" / f"{name}.ipynb", as_version=4).cells
    printed = [output.text for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return [*printed, hashlib.sha256((out / "figures" / f"{name}.png").read_bytes()).hexdigest()]


def states(out: Path, name: str) -> list[tuple[int, int]]:
    """Other ones if a file of the notebook was written to."""
    files = [(out / "notebooks" / f"{name}.ipynb").stat(), (out / "figures" / f"{name}.png").stat()]
    return [(file.st_ino, file.st_mtime_ns) for file in files]


def ends(process: int, within: float = 20) -> bool:
    """Whether a process is gone, or a zombie, before so many seconds are over."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_killed_notebook_is_run_whole_and_the_others_stay(tmp_path, run, sources):
    out, begun = tmp_path / "out", tmp_path / "out" / "figures" / "02_second.begun"
    write_notebook(sources, "01_first")
    assert run(out, "notebooks", "--only", "01", notebooks=str(sources))["status"] == 0
    wanted, before = outputs(out, "01_first"), states(out, "01_first")
    write_notebook(sources, "02_second", seconds=60)
    killed = run(out, "notebooks", "--only", "02", notebooks=str(sources), kill_when=str(begun))
    assert killed["status"] == -signal.SIGKILL and not begun.with_suffix(".png").exists()
    assert ends(int(begun.read_text())), "the killed run's kernel would write into the results of the next"
    write_notebook(sources, "02_second")
    assert run(out, "notebooks", "--only", "02", notebooks=str(sources))["status"] == 0
    assert outputs(out, "02_second") == wanted
    assert states(out, "01_first") == before


@pytest.mark.parametrize("leave", [0, 1 << 20], ids=["notebook", "figure"])
def test_disk_full_while_a_notebook_or_its_figure_is_written(tmp_path, run, sources, disk, leave):
    write_notebook(sources, "01_first")
    assert run(tmp_path / "roomy", "notebooks", "--only", "01", notebooks=str(sources))["status"] == 0
    out = disk.folder / "out"
    (out / "notebooks").mkdir(parents=True)
    disk.fill(leave)
    full = run(out, "notebooks", "--only", "01", notebooks=str(sources))
    errors = [line for line in full["stderr"] if line.startswith("selfrepair: error: ")]
    assert (
        full["status"] == 1
        and len(errors) == 1
        and "disk full" in errors[0]
        and full["stderr"][-1] == errors[0]
    ), full
    assert list(out.glob("figures/*.begun")) == ([out / "figures" / "01_first.begun"] if leave else [])
    disk.free()
    assert run(out, "notebooks", "--only", "01", notebooks=str(sources))["status"] == 0
    assert outputs(out, "01_first") == outputs(tmp_path / "roomy", "01_first")
