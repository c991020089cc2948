"""Kills a heads' measurement, starts it again, and prints what came of it.

Usage: kill_sweep.py FOLDER MODEL TOKENS every|amid [SHARDS...]

``every``: before and after each of its steps on the disk (its prompts are there), each time in FOLDER/<moment>.
``amid``: in FOLDER as soon as so many shards are whole, then to its end, then once without a kill. Each run is a
fork, so that imports and the model are paid for once; PyTorch must have one thread, as others are lost in a fork.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tasks import heads_task

from selfrepair.measure import heads, pairs
from selfrepair.models.loading import load_model

STEPS = ((os, "replace"), (os, "rename"), (shutil, "rmtree"))
REPLACE = os.replace


def die_at(moment):
    """Sends SIGKILL to this process at the given moment: even ones before a step, odd ones after it."""
    count = iter(range(10**6))

    def wrap(step):
        def wrapped(*arguments, **named):
            if step is REPLACE and ".unfinished-" in str(arguments[1]):
                return step(
                    *arguments, **named
                )  # one of the many small files of a store that is not there yet
            for when in ("before", "after"):
                if next(count) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                if when == "before":
                    result = step(*arguments, **named)
            return result

        return wrapped

    for owner, name in STEPS:
        setattr(owner, name, wrap(getattr(owner, name)))


def start(out, moment=None):
    """A child process that measures, and the pipe that it says in what it did."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        task = heads_task(MODEL, TOKENS, out)
        task.needed["tokens"].merge([LOADED])
        if moment is not None:
            die_at(moment)
        real, computed = heads.ablate_pairs, []
        heads.ablate_pairs = lambda *them: computed.append(0) or real(*them)
        store = task.merge([LOADED])
        os.write(writing, json.dumps({"computed": len(computed), "store": str(store)}).encode())
        os._exit(0)
    os.close(writing)
    return child, reading


def finish(child, reading):
    """Exit status (negative: killed by that signal), shards computed, and the store."""
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "computed": None, "store": None, **json.loads(said or "{}")}


def kept(out):
    """Whole shards, or ``all`` if the store is there."""
    task = heads_task(MODEL, TOKENS, out)
    return "all" if task.path.exists() else len(list(task.shard_folder.glob("[0-9]*.zarr")))


def kill_around_every_step(folder):
    moment, was_killed = 0, True
    while was_killed:
        out = folder / f"{moment:03d}"
        was_killed = finish(*start(out, moment))["status"] == -signal.SIGKILL
        yield {"moment": moment, "killed": was_killed, "kept": kept(out), **finish(*start(out))}
        moment += 1


def kill_amid(folder, numbers):
    n_shards = len(heads_task(MODEL, TOKENS, folder).shards)
    for number in numbers:
        child, reading = start(folder / "out")
        while (
            kept(folder / "out") < number
            and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        done = finish(child, reading)
        yield {**done, "kept": kept(folder / "out"), "n_shards": n_shards}
    for out in ("out", "whole"):
        yield {**finish(*start(folder / out)), "n_shards": n_shards}


if __name__ == "__main__":
    FOLDER, MODEL, TOKENS = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    LOADED = load_model(str(MODEL), "cpu")
    if sys.argv[4] == "every":
        runs = kill_around_every_step(FOLDER)
    else:
        pairs.SHARD_PAIRS = 4
        runs = kill_amid(FOLDER, map(int, sys.argv[5:]))
    for run in runs:
        print(json.dumps(run), flush=True)
