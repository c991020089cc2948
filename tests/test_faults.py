"""What breaks or kills a run: afterwards a rerun has the bytes of an undisturbed one, and computes nothing that was finished again."""

import hashlib
import json
import os
import random
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

STARTS = [0, 16, 32]  # first pairs of the three shards of 96 prompts
YEAR = 365 * 24 * 3600


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """The file of a profile of one tiny model."""
    folder = tmp_path_factory.mktemp("profile")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODELS / "pocket-gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_head=2, n_embd=8, n_positions=16)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    content = {"models": [str(folder / "tiny")], "ablations": ["mean"], "n_prompts": 96, "prompt_len": 12}
    (folder / "tiny.yaml").write_text(json.dumps(content))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def run(profile):
    """``run(out, stage, *more, **fault)``: what came of one command; ``run.at_once([...])``: of several, each such a tuple and a dict."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(Path(__file__).with_name("fault_runs.py"))]
    server = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    model = json.loads(profile.read_text())["models"][0]

    def described(out, stage, *more, **fault):
        arguments = [stage, "--profile", str(profile), "--out", str(out), *more]
        if stage in ("tokens", "shard", "merge"):
            arguments += ["--device", "cpu", "--model", model]
        if stage in ("shard", "merge"):
            arguments += ["--ablation", "mean"]
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
    done = run(out, "merge")
    assert (done["status"], done["computed"]) == (0, STARTS)
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, run):
    """A results folder between the stages shard and merge."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    done = run(out, "shard", "--first", *map(str, STARTS))
    assert (done["status"], done["computed"]) == (0, STARTS)
    return out


@pytest.fixture
def copy_of(tmp_path):
    return lambda out: shutil.copytree(out, tmp_path / "out")


def store_in(out: Path) -> Path:
    (store,) = (out / "sweeps").glob("*.zarr")
    return store


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def finished_shards(out: Path) -> list[int]:
    """All of them, if the store is there."""
    if list((out / "sweeps").glob("*.zarr")):
        return STARTS
    sums = sorted((out / "sweeps").glob("*.shards/[0-9]*.sha256"))
    return [int(sum.stem) for sum in sums if sum.read_text() == hashlib.sha256(sum.with_suffix(".npz").read_bytes()).hexdigest()]


def merged_again(run, out, undisturbed, *, computing, **fault):
    """Merges; asserts what was computed and that nothing tells the store from an undisturbed run's."""
    done = run(out, "merge", **fault)
    assert (done["status"], done["computed"]) == (0, computing), done
    assert store_in(out).name == store_in(undisturbed).name
    assert content(store_in(out)) == content(store_in(undisturbed))
    assert not list((out / "sweeps").glob("*.shards")) and not list((out / "sweeps").glob(".*"))


def flip_a_bit(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


# --- killed -------------------------------------------------------------------------------------------------------------


def test_killed_at_20_random_moments_loses_no_finished_shard(tmp_path, run, undisturbed):
    moments, kills, found = random.Random(0), 0, set()
    stages = (["merge"], ["shard", "--first", *map(str, STARTS)])
    whole = []
    for stage in stages:
        shutil.copytree(undisturbed / "tokens", tmp_path / stage[0] / "tokens")
        whole.append(run(tmp_path / stage[0], *stage)["seconds"])
    for number in range(60):  # a run may end before its moment, which was drawn from how long another took
        if kills == 20:
            break
        out = tmp_path / str(number)
        shutil.copytree(undisturbed / "tokens", out / "tokens")
        killed = run(out, *stages[number % 2], kill_after=moments.uniform(0, 1) * whole[number % 2])
        if killed["status"] == 0:
            continue
        assert killed["status"] == -signal.SIGKILL
        kills += 1
        finished = finished_shards(out)
        assert set(killed["computed"][:-1]) <= set(finished)  # at most the last one was computed and not yet saved
        found.add(len(finished))
        merged_again(run, out, undisturbed, computing=[start for start in STARTS if start not in finished])
    assert kills == 20 and len(found) > 1, (kills, found)


def test_killed_while_prompts_are_drawn(tmp_path, run, undisturbed):
    whole = run(tmp_path / "whole", "tokens")["seconds"]
    statuses = []
    for number, share in enumerate((0.3, 0.6, 0.9, 0.99)):
        out = tmp_path / str(number)
        statuses.append(run(out, "tokens", kill_after=share * whole)["status"])
        assert run(out, "tokens")["status"] == 0
        assert content(out / "tokens") == content(undisturbed / "tokens")
    assert -signal.SIGKILL in statuses


# --- damaged ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_damaged_shard_is_computed_again_and_no_other(run, sharded, undisturbed, copy_of, damage):
    out = copy_of(sharded)
    (shard,) = (out / "sweeps").glob("*.shards/000016.npz")
    damage(shard)
    merged_again(run, out, undisturbed, computing=[16])


def largest_chunk(store: Path) -> Path:
    return max((store / "logit_change" / "c").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)


def folder_in_place_of_chunk(store: Path) -> None:
    chunk = largest_chunk(store)
    chunk.unlink()
    chunk.mkdir()


def future_format(store: Path) -> None:
    group = json.loads((store / "zarr.json").read_text())
    group["attributes"]["format"] = 99
    (store / "zarr.json").write_text(json.dumps(group))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda store: truncate(largest_chunk(store)), "damaged"),
        (lambda store: flip_a_bit(largest_chunk(store)), "damaged"),
        (folder_in_place_of_chunk, "damaged"),
        (lambda store: (store / "zarr.json").write_bytes(b""), "damaged"),
        (future_format, "format 99"),
    ],
    ids=["truncated", "bit", "folder", "emptied", "future"],
)
def test_unreadable_store_is_one_line_and_made_again(run, undisturbed, copy_of, damage, said):
    out = copy_of(undisturbed)
    damage(store_in(out))
    read = run.heads(store_in(out))
    assert read["status"] == 1 and read["stdout"] == [] and len(read["stderr"]) == 1
    assert str(store_in(out)) in read["stderr"][0] and said in read["stderr"][0]
    merged_again(run, out, undisturbed, computing=STARTS)


# --- two at once --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [["merge", "merge"], ["shard", "shard"]], ids=lambda stages: stages[0])
def test_two_at_once_compute_each_shard_once(tmp_path, run, undisturbed, stages):
    out = tmp_path / "out"
    more = ["--first", *map(str, STARTS)]
    done = run.at_once(*((out, stage, *(more if stage == "shard" else [])) for stage in stages))
    assert [one["status"] for one in done] == [0, 0], done
    assert sorted(done[0]["computed"] + done[1]["computed"]) == STARTS
    merged_again(run, out, undisturbed, computing=[])


# --- clock --------------------------------------------------------------------------------------------------------------


def set_times(folder: Path, moment: float) -> None:
    for file in folder.rglob("*"):
        os.utime(file, (moment, moment))


def test_clock_set_back_makes_nothing_again(tmp_path, run, undisturbed):
    out = tmp_path / "out"
    assert run(out, "shard", "--first", "0", "16")["computed"] == [0, 16]
    set_times(out, time.time() + YEAR)
    merged_again(run, out, undisturbed, computing=[32], backwards=True)
    (manifest,) = (out / "sweeps").glob("*.manifest.json")
    assert 0 <= json.loads(manifest.read_text())["seconds"] < 60
    set_times(out, time.time() + YEAR)
    merged_again(run, out, undisturbed, computing=[], backwards=True)


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
    full = run(out, "merge")
    (error,) = [line for line in full["stderr"] if line.startswith("selfrepair: error: ")]
    assert full["status"] == 1 and "disk full" in error and full["stderr"][-1] == error and "Traceback" not in "".join(full["stderr"])
    assert full["computed"] == [] and finished_shards(out) == STARTS
    disk.free()
    merged_again(run, out, undisturbed, computing=[])


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
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")


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
    assert full["status"] == 1 and len(errors) == 1 and "disk full" in errors[0] and full["stderr"][-1] == errors[0], full
    assert list(out.glob("figures/*.begun")) == ([out / "figures" / "01_first.begun"] if leave else [])
    disk.free()
    assert run(out, "notebooks", "--only", "01", notebooks=str(sources))["status"] == 0
    assert outputs(out, "01_first") == outputs(tmp_path / "roomy", "01_first")
