"""Copies of the repository that tests may edit, runs in them, and what a run leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    *("shared/selfrepair", "shared/snakemake_logger_plugin_selfrepair", "shared/text", "shared/published"),
    "shared/models/arms",
    *("notebooks", "profiles", "workflow"),
)
#: What says when, where and how results were made.
OF_THE_RUN = ("*.manifest.json", "manifest.json", "index.html", "*.log", "*.lock")
FOLDERS_OF_THE_RUN = ("done", "logs")

#: Answers each line with what a run of the profile would make: stores' names by model and label, notebooks' keys, the page's.
PLANNER = """
import json, sys
from selfrepair.paths import PACKAGE
from selfrepair.run.study import Study
from selfrepair.run.workflow import plan

def with_needs(tasks):
    for task in tasks:
        yield task
        yield from with_needs(task.needed.values())

print(PACKAGE, flush=True)
for _ in sys.stdin:
    study = Study.of(sys.argv[1])
    planned = plan(study)
    made = {"notebooks/" + stem[:2]: key for stem, key in planned["notebooks"].items()} | {"page": planned["page"]}
    for model in study.profile.models:
        made |= {model + " " + task.label: task.path.name for task in with_needs(study.tasks(model))}
        made["key of " + model] = planned["models"][model]["key"]
    print(json.dumps(made), flush=True)
"""


def copy_house(folder: Path, models: Sequence[str]) -> Path:
    """The library, notebooks and data of this repository, with these models, and one profile ``small`` of them."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in (*COPIED, *(f"shared/models/{model}" for model in models)):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "Snakefile", folder / "Snakefile")
    profile = {
        "models": list(models),
        "ablations": ["resample", "mean"],
        "n_prompts": 8,
        "prompt_len": 24,
        "fraction": 0.1,
    }
    (folder / "profiles" / "small.yaml").write_text(json.dumps(profile))
    return folder


def environment(house: Path) -> dict[str, str]:
    """In which ``selfrepair`` and ``python`` are those of the house."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(house / "shared"), "OMP_NUM_THREADS": "1"}


class Planner:
    """Asks one process again and again, because starting one takes seconds."""

    def __init__(self, house: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PLANNER, "small"],
            cwd=house,
            env=environment(house),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline().strip() == str(house / "shared" / "selfrepair")

    def __call__(self) -> dict[str, str]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def results(out_dir: Path) -> dict[str, object]:
    """Every file of a run by its path, but those that tell of the run itself; of a notebook, the outputs."""
    found: dict[str, object] = {}
    for file in out_dir.rglob("*"):
        path = file.relative_to(out_dir)
        is_of_the_run = path.parts[0] in FOLDERS_OF_THE_RUN or any(map(path.match, OF_THE_RUN))
        if file.is_file() and not is_of_the_run:
            found[str(path)] = outputs(file) if path.suffix == ".ipynb" else file.read_bytes()
    return found


def outputs(notebook: Path) -> list[object]:
    return [cell.outputs for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
