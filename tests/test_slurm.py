"""The pocket profile over a real SLURM of one node on this machine: many jobs, one of them lost, and the bytes of a local run."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from selfrepair.run.verify import verify

ROOT = Path(__file__).resolve().parents[1]
SLURM = ROOT / "tests" / "slurm"
CANNOT_BE_HAD = 2
#: A run; some minutes on two idle cores.
TIMEOUT = 2400
#: What says when, where and how results were made.
OF_THE_RUN = ("*.manifest.json", "manifest.json", "index.html", "*.log", "*.lock")


@pytest.fixture(scope="module")
def slurm():
    if shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin") is None and "CI" not in os.environ:
        pytest.skip("SLURM is not installed: tests/slurm/start.sh, as root on Debian, installs and starts it")
    started = subprocess.run([SLURM / "start.sh"], stderr=subprocess.PIPE, text=True)
    why = (started.stderr.strip().splitlines() or [""])[-1]
    if started.returncode == CANNOT_BE_HAD:
        pytest.skip(why)
    assert started.returncode == 0, why
    yield
    subprocess.run([SLURM / "stop.sh"], check=True)


def start(folder: Path, *options: str) -> subprocess.Popen:
    """A run of the pocket profile with its results in ``out`` in ``folder``."""
    command = [sys.executable, "-m", "snakemake", "--logger", "selfrepair", "--directory", folder, *options]
    return subprocess.Popen(
        [*command, "--config", "profile=pocket", "out=out"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What the user saw."""
    said = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 0, said
    return said


def results(folder: Path) -> dict[str, object]:
    """Every file by its path; of a notebook, the outputs."""
    files = (file for file in (folder / "out").rglob("*") if file.is_file())
    ours = {file.relative_to(folder / "out"): file for file in files}
    return {
        str(path): outputs(file) if path.suffix == ".ipynb" else file.read_bytes()
        for path, file in ours.items()
        if not any(path.match(pattern) for pattern in OF_THE_RUN)
    }


def outputs(notebook: Path) -> list[object]:
    return [cell.outputs for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def submitted(folder: Path) -> int:
    (log,) = (folder / ".snakemake" / "log").glob("*.log")
    return log.read_text().count("has been submitted with SLURM jobid")


def running() -> list[str]:
    return subprocess.run(["squeue", "--noheader", "--states=R", "--format=%i"], stdout=subprocess.PIPE, text=True).stdout.split()


def test_cluster_gives_the_bytes_of_a_local_run_though_a_job_is_lost(slurm, tmp_path):
    process = start(tmp_path / "cluster", "--workflow-profile", SLURM)
    while not running() and process.poll() is None:
        time.sleep(0.2)
    time.sleep(5)  # amid its work
    subprocess.run(["scancel", running()[0]], check=True)
    said = finish(process)
    assert said.count("failed: shards") == 1
    assert all(stage in said for stage in ("shards: 30 of 30", "sweeps: 15 of 15", "notebooks: 6 of 6", "summary: 1 of 1"))
    assert submitted(tmp_path / "cluster") == 30 + 1 + 15 + 6
    finish(start(tmp_path / "local", "--workflow-profile", ROOT / "profiles" / "default", "--cores", "2"))
    cluster, local = (results(tmp_path / name) for name in ("cluster", "local"))
    shards = {name for name in cluster if name.startswith("shards/")}
    assert len(shards) == 60 and sum(name.startswith("heads_") for name in cluster) == 3
    assert cluster.keys() - shards == local.keys()
    assert [name for name in local if cluster[name] != local[name]] == []
    noted = json.loads((tmp_path / "cluster" / "out" / "manifest.json").read_text())
    assert len(noted["sweeps"]) == 15
    assert [finding for finding in verify(tmp_path / "cluster" / "out", "cpu") if not finding.agrees] == []


def test_the_tests_use_the_options_of_the_real_profile():
    ours, real = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (SLURM, ROOT / "profiles" / "slurm"))
    of_the_cluster = ("jobs", "latency-wait", "default-resources")
    assert {name: ours.get(name) for name in real if name not in of_the_cluster} == {
        name: value for name, value in real.items() if name not in of_the_cluster
    }
