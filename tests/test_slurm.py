"""The workflow over a real SLURM of one node on this machine: several jobs, one of them lost, and the bytes of a local run."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfrepair.breakdown import heads_table
from selfrepair.results import open_store

ROOT = Path(__file__).resolve().parents[1]
SLURM = ROOT / "tests" / "slurm"
PROFILE = {"models": ["pocket-pythia-small"], "ablations": ["mean"], "n_prompts": 96, "prompt_len": 32}
CANNOT_BE_HAD = 2


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
    """The sweeps of the tiny profile, a shard a job; ``out`` in ``folder``, where the run has its working directory."""
    folder.mkdir()
    (folder / "tiny.yaml").write_text(json.dumps(PROFILE))
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--logger", "selfrepair", *options]
    return subprocess.Popen(
        [*command, "--config", "profile=tiny.yaml", "out=out", "shards_per_job=1", "--", "sweeps"],
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What the user saw."""
    said = process.communicate(timeout=500)[1]
    assert process.returncode == 0, said
    return said


def store(folder: Path) -> dict[str, bytes]:
    """The store's files, and its head table, by name."""
    (found,) = (folder / "out" / "sweeps").glob("*.zarr")
    files = {str(file.relative_to(folder)): file.read_bytes() for file in found.rglob("*") if file.is_file()}
    return files | {"heads": heads_table(open_store(found), 0.1).to_csv(float_format="%.6g").encode()}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    finish(start(folder, "--workflow-profile", ROOT / "profiles" / "default", "--cores", "2"))
    return store(folder)


def submitted(folder: Path) -> int:
    (log,) = (folder / ".snakemake" / "log").glob("*.log")
    return log.read_text().count("has been submitted with SLURM jobid")


def running() -> list[str]:
    return subprocess.run(["squeue", "--noheader", "--states=R", "--format=%i"], stdout=subprocess.PIPE, text=True).stdout.split()


def test_cluster_gives_the_bytes_of_a_local_run_though_a_job_is_lost(slurm, local, tmp_path):
    process = start(tmp_path / "run", "--workflow-profile", SLURM)
    while not running() and process.poll() is None:
        time.sleep(0.2)
    time.sleep(5)  # amid its work
    subprocess.run(["scancel", running()[0]], check=True)
    said = finish(process)
    assert said.count("failed: shards") == 1 and "shards: 3 of 3" in said and "sweeps: 1 of 1" in said
    assert submitted(tmp_path / "run") == 5  # three shards, one of them again, and their merging
    assert store(tmp_path / "run") == local
