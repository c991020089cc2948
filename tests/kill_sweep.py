"""Kills ``selfrepair sweep`` before and after each of its steps on the disk, starts it again, and prints what came of it.

Usage: kill_sweep.py FOLDER ARGUMENT...; a run writes into FOLDER/<moment>. Each run is a fork, so that
imports are paid once; the parent runs nothing of torch.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from selfrepair.measure import heads as sweep_module
from selfrepair.cli import main

STEPS = ((os, "replace"), (os, "rename"), (shutil, "rmtree"))
REPLACE = os.replace


def die_at(moment):
    """Sends SIGKILL to this process at the given moment: even ones before a step, odd ones after it."""
    count = iter(range(10**6))

    def wrap(step):
        def wrapped(*arguments, **named):
            if step is REPLACE and ".unfinished-" in str(arguments[1]):
                return step(*arguments, **named)  # one of the many small files of a store that is not there yet
            for when in ("before", "after"):
                if next(count) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                if when == "before":
                    result = step(*arguments, **named)
            return result

        return wrapped

    for owner, name in STEPS:
        setattr(owner, name, wrap(getattr(owner, name)))


def run(arguments, moment=None):
    """Exit status (negative: killed by that signal), shards computed, and the store, of a run in a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        if moment is not None:
            die_at(moment)
        real, computed = sweep_module._ablate_pairs, []
        sweep_module._ablate_pairs = lambda *them: computed.append(0) or real(*them)
        status = main(arguments)
        print(len(computed), flush=True)
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().split()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, int(lines[-1]) if status == 0 else None, lines[-2] if status == 0 else None


if __name__ == "__main__":
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    moment, killed = 0, True
    while killed:
        out = folder / f"{moment:03d}"
        killed = run([*arguments, "--out", str(out)], moment)[0] == -signal.SIGKILL
        kept = "all" if list(out.glob("*.zarr")) else len(list(out.glob("*.shards/[0-9]*.sha256")))
        status, computed, store = run([*arguments, "--out", str(out)])
        print(json.dumps({"moment": moment, "killed": killed, "kept": kept, "status": status, "computed": computed, "store": store}))
        moment += 1
