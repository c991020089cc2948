"""What a host of the repository runs: workflows that fit their schema and call what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from selfrepair.paths import REPOSITORY

FOLDER = REPOSITORY / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
of_each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def problems(*files: Path, schema: str = "vendor.github-workflows") -> str:
    """What the schema says of them; nothing if they fit."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.slow("the workflows of the repository's host fit their schema")
def test_workflows_fit_their_schema():
    assert FILES and problems(*FILES) == ""


@pytest.mark.slow("a schema that checks nothing")
def test_the_schema_would_notice(tmp_path):
    text = FILES[0].read_text(encoding="utf-8")
    (tmp_path / "wrong.yml").write_text(text.replace("runs-on:", "runs_on:"))
    assert "runs_on" in problems(tmp_path / "wrong.yml")


@of_each
def test_commands_are_those_of_the_repository(file):
    jobs = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {name for command in commands for name in re.findall(r"\./run_all\.sh|\.ci/run", command)}
    assert called and all((REPOSITORY / name).is_file() for name in called)
    assert all("timeout-minutes" in job for job in jobs.values())


def test_fast_tests_run_on_both_systems_and_the_oldest_and_newest_python():
    jobs = yaml.safe_load((FOLDER / "push.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["fast"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["system"]} == {"ubuntu", "macos"}
    assert matrix["python"] == ["3.11", "3.13"]


def test_the_formatter_is_that_of_the_lock():
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (ruff,) = [repo for repo in hooks["repos"] if "ruff" in repo["repo"]]
    assert ruff["rev"] == "v" + re.search(r"^ruff==(\S+)", lock, re.MULTILINE)[1]
