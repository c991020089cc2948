"""Runs ``selfrepair`` commands in forks of one process that has paid for the imports, and kills them or turns their clock back.

Each line of the input is a JSON list of runs, which are started at once; the answer is a line with what came of each.
A run has ``arguments`` and may have ``kill_after`` (seconds of its processor time: other work on the machine does not
shift the moment), ``kill_before_shard`` or ``kill_after_shard`` (a shard, ``label:number``, that is about to be computed, or is
computed and not on the disk yet), ``kill_when`` (a file that there will be), ``only`` (measurements: no others are made
but what they need), ``notebooks`` (their folder) and ``backwards`` (true: every look at the clock shows an hour less
than the one before). Shards are of few prompts. The parent runs nothing of torch.
"""

import functools
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

import selfrepair.analysis.comparison
import selfrepair.analysis.head_table
import selfrepair.measure.task
import selfrepair.run.notebooks
import selfrepair.run.study
import selfrepair.run.workflow
from selfrepair.cli.main import main
from selfrepair.measure import pairs
from selfrepair.measure.measurement import find_measurement, measurement_names
from selfrepair.measure.task import Task

#: The sources as they are now, whoever edits them while the tests run.
selfrepair.measure.task.code_version = functools.cache(selfrepair.measure.task.code_version)
for name in measurement_names():
    find_measurement(name)
    selfrepair.measure.task.code_version(f"selfrepair.measure.{name}", "selfrepair.engine.fast.switch")
pairs.SHARD_PAIRS = 4


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_once(is_time: Callable[[], bool]) -> None:
    """Sends SIGKILL to this process as soon as it is time."""

    def watch() -> None:
        while not is_time():
            time.sleep(0.001)
        die()

    threading.Thread(target=watch, daemon=True).start()


def turn_the_clock_back() -> None:
    now, looks = time.time(), itertools.count(1)
    time.time = lambda: now - 3600 * next(looks)
    time.time_ns = lambda: int(time.time() * 1e9)


def note_computed_shards(file: Path, die_before: str | None, die_after: str | None) -> None:
    """Appends ``label:number`` of every shard that is computed to a file, as soon as it is; dies at one of them."""
    real = Task._measured

    def noted(task, model, inputs, shard):
        unit = f"{task.label}:{shard}"
        if unit == die_before:
            die()
        made = real(task, model, inputs, shard)
        with file.open("a") as lines:
            lines.write(f"{unit}\n")
        if unit == die_after:
            die()
        return made

    Task._measured = noted


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
        note_computed_shards(folder / "computed", run.get("kill_before_shard"), run.get("kill_after_shard"))
        begun = time.process_time()
        if "kill_after" in run:
            kill_once(lambda: time.process_time() - begun > run["kill_after"])
        if "kill_when" in run:
            kill_once(lambda: os.path.exists(run["kill_when"]))
        if run.get("backwards"):
            turn_the_clock_back()
        if "only" in run:
            selfrepair.run.study.measurement_names = lambda: run["only"]
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
    """Exit status (negative: killed by that signal), shards computed in order, lines said, and processor time in seconds."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = {file.name: file.read_text().splitlines() for file in folder.iterdir()}
    computed = lines.pop("computed", [])
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
