"""The Snakefile: what runs when, what is run again and what is not, and what the user sees. Stub commands
stand in for the real ones."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_logger_plugin_selfrepair import LogHandler, duration

from selfrepair.run import study as study_module
from selfrepair.run import workflow
from selfrepair.run.study import Study

pytestmark = pytest.mark.slow("stages run in order, once each, in as many jobs as pay off")

ROOT = Path(__file__).resolve().parents[1]

#: Writes what the command of that name would, and a line to ``calls``. ``fail`` and ``slow`` hold parts of
#: command lines.
STUB = f"""#!{sys.executable}
import json, os, sys, time
from pathlib import Path

here = Path({{here!r}})
line = " ".join(sys.argv[1:])
options = {{o: sys.argv[i + 1] for i, o in enumerate(sys.argv) if o.startswith("--")}}
command = sys.argv[1]
if command == "plan":
    if options["--profile"] == "none":
        sys.exit("selfrepair: error: none: no such profile")
    plan = json.loads((here / "plan.json").read_text())
    keys = dict(("notebooks/" + stem[:2], key) for stem, key in plan["notebooks"].items()) | \
dict(page=plan["page"])
    for name, key in keys.items():  # as the real command does
        path = Path(options["--out"], "done", name + ".done")
        if path.exists() and ("--key " + key) not in path.read_text():
            path.unlink()
    print(json.dumps(plan))
    sys.exit()
with open(here / "calls", "a") as calls:
    calls.write(line + " threads=" + os.environ["OMP_NUM_THREADS"] + "\\n")
if (here / "fail").exists() and (here / "fail").read_text() in line:
    sys.exit("some noise\\nselfrepair: error: 01_first: cell 3 failed with ValueError: x")
model = options.get("--model", "").replace("/", "--")
done = {{
    "measure": [f"shards/{{model}}/{{options.get('--job')}}" if "--units" in options else \
f"measured/{{model}}-{{options.get('--stage', 'all')}}"],
    "notebook": [f"notebooks/{{options.get('--number')}}"],
    "summary": ["page"],
}}
for name in done[command]:
    path = Path(options["--out"], "done", name + ".done")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
if (here / "slow").exists() and (here / "slow").read_text() in line:
    time.sleep(10)
"""


class Workflow:
    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        stub = folder / "bin" / "selfrepair"
        stub.write_text(STUB.replace("{{", "{").replace("}}", "}").replace("{here!r}", repr(str(folder))))
        stub.chmod(0o755)
        self.plan("1")

    def plan(self, code: str, notebooks: str = "") -> None:
        heads = [f"heads-resample:{first}" for first in (0, 16, 32)]
        stages = {
            "pocket-a": [["tokens:0"], heads, ["neurons-resample:0"]],
            "org/b": [["tokens:0"], heads[:1], ["neurons-resample:0"]],
        }
        plan = {
            "models": {
                name: {"stages": stages[name], "mem_mb": 100, "key": code, "slug": name.replace("/", "--")}
                for name in stages
            },
            "notebooks": {"01_self_repair_across_models": notebooks or code, "02_imperfect_and_noisy": code},
            "notebook_mem_mb": 100,
            "page": code + notebooks,
        }
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def start(self, *options: str, profile: str = "pocket", units_per_job: int = 2) -> subprocess.Popen:
        environment = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        common = [
            "--snakefile",
            ROOT / "Snakefile",
            "--workflow-profile",
            ROOT / "workflow" / "default",
            "--logger",
            "selfrepair",
        ]
        config = ["--config", f"profile={profile}", "out=results", f"units_per_job={units_per_job}"]
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", *common, "--cores", "2", *config, *options],
            cwd=self.folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *options: str, **keywords: object) -> tuple[int, list[str]]:
        """Exit status and the lines that the user sees, without Snakemake's first one."""
        process = self.start(*options, **keywords)
        said = process.communicate(timeout=120)[1].splitlines()
        assert "workflow specific profile" in said[0]
        return process.returncode, said[1:]

    def calls(self) -> list[str]:
        """The commands since the last time."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def wait_for(self, call: str) -> None:
        deadline = time.monotonic() + 60
        while not ((self.folder / "calls").exists() and call in (self.folder / "calls").read_text()):
            assert time.monotonic() < deadline, f"{call} was not run"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from nothing, what it said, and the commands it ran; no test runs it again."""
    workflow = Workflow(tmp_path_factory.mktemp("workflow"))
    return workflow, *workflow.run(), workflow.calls()


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it, to be run again."""
    workflow = Workflow(tmp_path / "w")
    for left in ("results", ".snakemake"):
        shutil.copytree(finished[0].folder / left, workflow.folder / left)
    return workflow


def commands(calls: list[str]) -> list[str]:
    """What each call does: the command, and of ``measure`` whether it is of a whole model, a stage or some
    shards."""
    kinds = {"--units": "shards", "--stage 0": "network", "--stage all": "model", "--stage": "stage"}
    found = []
    for call in calls:
        kind = next((kind for option, kind in kinds.items() if option in call), "")
        found.append(kind if call.startswith("measure") else call.split()[0])
    return found


def test_every_stage_in_order_on_one_thread_each(finished):
    _, status, said, calls = finished
    assert status == 0
    done = commands(calls)
    assert {name: done.count(name) for name in done} == {
        "network": 2,
        "shards": 2,
        "stage": 4,
        "notebook": 2,
        "summary": 1,
    }
    assert all(call.endswith("threads=1") for call in calls)
    assert any(
        "--model pocket-a --units heads-resample:0 heads-resample:16 --job 1-0 " in call for call in calls
    )
    shards_of_a = max(i for i, name in enumerate(done) if name == "shards")
    assert shards_of_a < next(i for i, call in enumerate(calls) if "--model pocket-a --stage 1" in call)
    assert done[-3:] == ["notebook", "notebook", "summary"]
    assert [line.split(",")[0] for line in said[:-1]] == [
        *("prompts: 2 of 2", "shards: 2 of 2", "measured: 4 of 4", "notebooks: 2 of 2", "summary: 1 of 1"),
    ]
    assert said[-1].startswith("done in ") and said[-1].endswith("logs: results/logs")


def test_one_job_measures_a_model_where_there_are_as_many_models_as_cores(tmp_path):
    workflow = Workflow(tmp_path / "w")
    assert workflow.run(units_per_job=0)[0] == 0
    assert commands(workflow.calls()) == ["model", "model", "notebook", "notebook", "summary"]
    assert json.loads((workflow.folder / "results" / "done" / "plan.json").read_text())["units_per_job"] == 0


def test_again_does_nothing_and_other_code_does_all_again(finished, again):
    workflow, calls = again, finished[-1]
    assert workflow.run() == (0, ["nothing to do: the results are there already"])
    assert workflow.calls() == []
    workflow.plan("2")
    assert workflow.run()[0] == 0
    assert sorted(workflow.calls()) == sorted(call.replace("--key 1", "--key 2") for call in calls)


@pytest.mark.slow("an edited notebook runs again, no other")
def test_only_the_notebook_whose_key_changes_is_run_again(again):
    """Measuring a model again, which finds everything in its place, is no reason to run notebooks."""
    workflow = again
    workflow.plan("1", notebooks="2")
    assert workflow.run()[0] == 0
    assert [call.split(" --profile")[0] for call in workflow.calls()] == ["notebook --number 01", "summary"]
    plan = json.loads((workflow.folder / "plan.json").read_text())
    plan["models"]["org/b"]["key"] = "3"
    (workflow.folder / "plan.json").write_text(json.dumps(plan))
    assert workflow.run()[0] == 0
    calls = workflow.calls()
    assert set(commands(calls)) == {"network", "stage"} and all("org/b" in call for call in calls)


@pytest.mark.slow("a lost store is made again, and no notebook")
def test_a_model_of_which_something_is_lost_is_measured_again_and_no_notebook_runs(tmp_path):
    """The plan removes the mark then; what is measured again is as it was."""
    workflow = Workflow(tmp_path / "w")
    assert workflow.run(units_per_job=0)[0] == 0
    workflow.calls()
    (workflow.folder / "results" / "done" / "measured" / "org--b-all.done").unlink()
    assert workflow.run(units_per_job=0)[0] == 0
    assert [call.split(" --profile")[0] for call in workflow.calls()] == ["measure"]
    (workflow.folder / "results" / "done" / "measured" / "org--b-all.done").unlink()
    (workflow.folder / "results" / "done" / "notebooks" / "01.done").unlink()
    assert workflow.run(units_per_job=0)[0] == 0
    assert commands(workflow.calls()) == ["model", "notebook", "summary"]
    assert workflow.run(units_per_job=2)[0] == 0, "other jobs, of stages"
    assert not set(commands(workflow.calls())) & {"notebook", "summary"}


@pytest.mark.slow("a failure stops nothing else")
def test_what_fails_stops_nothing_else_and_is_tried_again(tmp_path):
    workflow = Workflow(tmp_path / "w")
    (workflow.folder / "fail").write_text("--model org/b")
    status, said = workflow.run()
    assert (status, said[-1][:31]) == (1, "1 failed, 5 of 11 jobs are done")
    (workflow.folder / "fail").write_text("--number 01")
    status, said = workflow.run()
    log = "results/logs/notebooks/01.log"
    assert status == 1
    assert f"failed: notebooks 01: 01_first: cell 3 failed with ValueError: x (see {log})" in said
    assert (
        said[-1] == "1 failed, 4 of 6 jobs are done; the same command goes on from there; logs: results/logs"
    )
    assert (workflow.folder / log).is_file()
    assert (workflow.folder / "results" / "done" / "notebooks" / "02.done").is_file()
    workflow.calls()
    (workflow.folder / "fail").unlink()
    assert workflow.run()[0] == 0
    assert commands(workflow.calls()) == ["notebook", "summary"]


@pytest.mark.slow("a clock set back runs nothing again")
def test_clock_set_back_runs_nothing_again(again):
    """Inputs that seem to be newer than what was made from them."""
    workflow = again
    ahead = time.time() + 365 * 24 * 3600
    for made in workflow.folder.glob("results/done/measured/*"):
        os.utime(made, (ahead, ahead))
    assert workflow.run() == (0, ["nothing to do: the results are there already"])
    assert workflow.calls() == []


@pytest.mark.slow("a stopped run goes on")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_run_goes_on(tmp_path, number):
    workflow = Workflow(tmp_path / "w")
    (workflow.folder / "slow").write_text("notebook ")
    process = workflow.start()
    workflow.wait_for("notebook ")
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode != 0
    if number == signal.SIGINT:
        assert "8 of 11 jobs are done; the same command goes on from there" in said[
            -1
        ] and "Traceback" not in "".join(said)
    workflow.calls()
    (workflow.folder / "slow").unlink()
    assert workflow.run()[0] == 0
    assert commands(workflow.calls()) == ["notebook", "notebook", "summary"]
    assert (workflow.folder / "results" / "done" / "page.done").is_file()


@pytest.mark.slow("two runs on the same results do not mix")
def test_second_run_on_the_same_results_waits(tmp_path):
    workflow = Workflow(tmp_path / "w")
    (workflow.folder / "slow").write_text("--stage 0")
    first = workflow.start()
    workflow.wait_for("--stage 0")
    status, said = workflow.run()
    first.communicate(timeout=60)
    assert (first.returncode, status) == (0, 0)
    assert said == [
        "another run is at work on results: waiting until it ends",
        "nothing to do: the results are there already",
    ]
    calls = workflow.calls()
    assert len(calls) == len(set(calls)) == 11


def test_bad_profile_is_one_line(tmp_path):
    workflow = Workflow(tmp_path / "w")
    assert workflow.run(profile="none") == (1, ["selfrepair: error: none: no such profile"])
    assert not (workflow.folder / "results").exists()


# --- what the user sees
# ------------------------------------------------------------------------------------------------


def logged(handler: LogHandler, event: LogEvent, **values: object) -> None:
    handler.handle(logging.makeLogRecord({"event": event, "levelno": logging.INFO, **values}))


def test_time_left_is_judged_by_what_is_done(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    handler = LogHandler(SimpleNamespace(), None)
    logged(handler, LogEvent.RUN_INFO, stats={"measure": 4, "all": 1, "total": 5})
    for job in range(4):
        logged(
            handler,
            LogEvent.JOB_INFO,
            jobid=job,
            rule_name="measure",
            wildcards={"model": job},
            log=[f"out/logs/measured/{job}.log"],
        )
    now += 300
    logged(handler, LogEvent.JOB_FINISHED, job_id=2)
    now += 10  # too soon for another line where there is no terminal
    logged(handler, LogEvent.JOB_FINISHED, job_id=0)
    now += 10
    for job in (1, 3):
        logged(handler, LogEvent.JOB_FINISHED, job_id=job)
    handler.close()
    assert capsys.readouterr().err.splitlines() == [
        "measured: 1 of 4, 15 min left",
        "measured: 4 of 4, 5 min",
        "done in 5 min; logs: out/logs",
    ]


def test_terminal_shows_the_stages_at_work_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    handler = LogHandler(SimpleNamespace(), None)
    logged(handler, LogEvent.RUN_INFO, stats={"network": 1, "measure": 1})
    logged(
        handler,
        LogEvent.JOB_INFO,
        jobid=1,
        rule_name="network",
        wildcards={},
        log=["out/logs/measured/a.log"],
    )
    logged(
        handler,
        LogEvent.JOB_INFO,
        jobid=2,
        rule_name="measure",
        wildcards={},
        log=["out/logs/measured/a.log"],
    )
    logged(handler, LogEvent.JOB_FINISHED, job_id=1)
    lines = capsys.readouterr().err.replace("\r\033[K", "|")
    assert (
        lines == "|prompts: 0 of 1|prompts: 0 of 1 | measured: 0 of 1|prompts: 1 of 1, 0 s\n|measured: 0 of 1"
    )


def test_error_of_snakemake_itself_is_one_line(capsys):
    handler = LogHandler(SimpleNamespace(), None)
    handler.handle(
        logging.makeLogRecord({"levelno": logging.ERROR, "msg": "WorkflowError:\n   sbatch failed"})
    )
    handler.close()
    assert capsys.readouterr().err == "WorkflowError: sbatch failed\n"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h")]
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_shards_that_a_killed_run_left_beside_its_store_are_taken_away(tmp_path, monkeypatch):
    """It was killed between writing the store and removing what the store is made of."""
    monkeypatch.setattr(study_module, "measurement_names", lambda: ["tokens", "heads"])
    settings = Study.of(
        model="pocket-pythia-small", n_prompts=2, ablation="zero", device="cpu", out_dir=tmp_path
    )
    here = dataclasses.replace(settings, profile=settings.profile.changed(prompt_len=6))
    workflow.measure(here, "pocket-pythia-small", progress=False)
    left = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    shards = here.task("heads", "pocket-pythia-small").shard_folder
    (shards / "000000.zarr").mkdir(parents=True)
    workflow.measure(here, "pocket-pythia-small", progress=False)
    now = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert not shards.exists() and now == left
