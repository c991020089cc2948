"""A small profile over a real SLURM of one node on this machine: many jobs, one of them lost, and the bytes of a local run."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from houses import results

from selfrepair.measure.measurement import find_measurement, measurement_names
from selfrepair.run.notebooks import all_notebooks
from selfrepair.run.verify import verify

ROOT = Path(__file__).resolve().parents[1]
SLURM = ROOT / "tests" / "slurm"
PROFILE = SLURM / "small.yaml"
CANNOT_BE_HAD = 2
#: Seconds of a run; some minutes on two idle cores.
TIMEOUT = 1200


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


def start(folder: Path, *options: str | Path) -> subprocess.Popen:
    """A run of the small profile with its results in ``out`` in ``folder``."""
    command = [sys.executable, "-m", "snakemake", "--logger", "selfrepair", "--directory", folder, *options]
    return subprocess.Popen(
        [*command, "--config", f"profile={PROFILE}", "out=out"],
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


def submitted(folder: Path) -> int:
    (log,) = (folder / ".snakemake" / "log").glob("*.log")
    return log.read_text().count("has been submitted with SLURM jobid")


def running() -> list[str]:
    return subprocess.run(
        ["squeue", "--noheader", "--states=R", "--format=%i"], stdout=subprocess.PIPE, text=True
    ).stdout.split()


@pytest.mark.slurm("a cluster gives the bytes of one machine, though the node of a job is lost")
def test_cluster_gives_the_bytes_of_a_local_run_though_a_job_is_lost(slurm, tmp_path):
    process = start(tmp_path / "cluster", "--workflow-profile", SLURM)
    while not running() and process.poll() is None:
        time.sleep(0.2)
    time.sleep(5)  # amid its work
    subprocess.run(["scancel", running()[0]], check=True)
    said = finish(process)
    assert said.count("failed: shards") == 1
    out = tmp_path / "cluster" / "out"
    plan = json.loads((out / "done" / "plan.json").read_text())
    stages = [of_model["stages"] for of_model in plan["models"].values()]
    jobs = [-(-len(units) // plan["units_per_job"]) for of_model in stages for units in of_model[1:]]
    n_shards = sum(n for n in jobs if n > 1)  # what one job can do is measured at once
    n_measured = sum(len(of_model) - 1 for of_model in stages)
    counts = {
        "prompts": 1,
        "shards": n_shards,
        "measured": n_measured,
        "notebooks": len(all_notebooks()),
        "summary": 1,
    }
    assert (n_shards, n_measured) == (8, 3)
    assert all(f"{stage}: {n} of {n}" in said for stage, n in counts.items()), said
    assert submitted(tmp_path / "cluster") == n_shards + 1 + n_measured + len(all_notebooks())
    finish(start(tmp_path / "local", "--workflow-profile", ROOT / "workflow" / "default", "--cores", "2"))
    cluster, local = results(out), results(tmp_path / "local" / "out")
    assert cluster.keys() == local.keys() and sum(name.startswith("heads_") for name in cluster) == 2
    assert [name for name in local if cluster[name] != local[name]] == []
    noted = json.loads((out / "manifest.json").read_text())
    assert len(noted["stores"]) == len(measurements())
    assert list(out.glob("measured/*.shards")) == []
    assert [finding for finding in verify(out, "cpu") if not finding.agrees] == []


def measurements() -> list[str]:
    """What is measured of the model of the small profile, which has no training checkpoints."""
    names = [name for name in measurement_names() if not find_measurement(name).on_demand]
    names = [name for name in names if name != "layers_over_training"]
    return [*names, "heads", "constants"]  # heads of two kinds of ablation, and what the mean one puts in


def test_the_tests_use_the_options_of_the_real_profile():
    ours, real = (
        yaml.safe_load((folder / "config.yaml").read_text())
        for folder in (SLURM, ROOT / "workflow" / "slurm")
    )
    of_the_cluster = ("jobs", "latency-wait", "default-resources")
    assert {name: ours.get(name) for name in real if name not in of_the_cluster} == {
        name: value for name, value in real.items() if name not in of_the_cluster
    }
