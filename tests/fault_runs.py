"""Runs ``selfrepair`` commands in forks of one process that has paid for the imports, and kills them or turns their clock back.

Each line of the input is a JSON list of runs, which are started at once; the answer is a line with what came of each.
A run has ``arguments`` and may have ``kill_after`` (seconds of its processor time: other work on the machine does not
shift the moment), ``kill_when`` (a file that there will be), ``notebooks`` (their folder) and ``backwards`` (true: every
look at the clock shows an hour less than the one before). The parent runs nothing of torch.
"""

import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import transformers.models.gpt2.modeling_gpt2  # noqa: F401 (what loading a model of that kind imports)

import selfrepair.analysis.head_table
import selfrepair.analysis.comparison
import selfrepair.run.notebooks
import selfrepair.run.workflow
import selfrepair.run.study
import selfrepair.measure.heads
from selfrepair.cli import main


def kill_once(is_time: Callable[[], bool]) -> None:
    """Sends SIGKILL to this process as soon as it is time."""

    def watch() -> None:
        while not is_time():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def turn_the_clock_back() -> None:
    now, looks = time.time(), itertools.count(1)
    time.time = lambda: now - 3600 * next(looks)
    time.time_ns = lambda: int(time.time() * 1e9)


def note_computed_shards(file: Path) -> None:
    """Appends the first pair of every shard that is computed to a file, as soon as it is."""
    real = selfrepair.measure.heads._ablate_pairs

    def noted(model, tokens, pairs, *rest):
        shard = real(model, tokens, pairs, *rest)
        with file.open("a") as lines:
            lines.write(f"{int(pairs[0])}\n")
        return shard

    selfrepair.measure.heads._ablate_pairs = noted


def start(run: dict[str, object], folder: Path) -> int:
    """The process id of a run; what it says and computes goes into files of its folder."""
    folder.mkdir()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setpgid(0, 0)
        for number, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        note_computed_shards(folder / "computed")
        begun = time.process_time()
        if "kill_after" in run:
            kill_once(lambda: time.process_time() - begun > run["kill_after"])
        if "kill_when" in run:
            kill_once(lambda: os.path.exists(run["kill_when"]))
        if run.get("backwards"):
            turn_the_clock_back()
        if "notebooks" in run:
            selfrepair.run.notebooks.NOTEBOOKS = Path(run["notebooks"])
        status = main(run["arguments"])
        (folder / "seconds").write_text(str(time.process_time() - begun))
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def outcome(child: int, folder: Path) -> dict[str, object]:
    """Exit status (negative: killed by that signal), first pairs of the shards computed, lines said, and processor time in seconds."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = {file.name: file.read_text().splitlines() for file in folder.iterdir()}
    computed = sorted(map(int, lines.pop("computed", [])))
    seconds = float(lines.pop("seconds", ["nan"])[0])
    return {"status": status, "computed": computed, "seconds": seconds, **lines}


def answer(runs: list[dict[str, object]]) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(number)) for number in range(len(runs))]
        children = [start(run, folder) for run, folder in zip(runs, folders, strict=True)]
        return [outcome(child, folder) for child, folder in zip(children, folders, strict=True)]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
