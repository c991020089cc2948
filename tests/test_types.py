"""The library's annotations agree with its code, as a type checker reads them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WRONG = '''\
"""A module with a mistake that no test would run into."""

from selfrepair.paths import PACKAGE


def depth(name: str) -> int:
    return PACKAGE / name
'''


def checked(*options):
    """What mypy prints, with the settings of pyproject.toml; what it knows is kept for the next time."""
    outcome = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", *options],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT / "shared")},
        capture_output=True,
        text=True,
    )
    assert outcome.stderr == ""
    return outcome.stdout


@pytest.mark.slow("annotations that are wrong where no test runs the code")
def test_the_library_is_clean():
    assert checked() == ""


@pytest.mark.slow("a type checker that checks nothing")
def test_a_mistake_is_found(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    said = checked("--config-file", str(ROOT / "pyproject.toml"), str(file))
    assert "Incompatible return value type" in said
