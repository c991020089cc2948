"""The kernels that notebooks run in: where their sockets are, and that Ctrl-C ends them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest

from selfrepair.run import notebooks
from selfrepair.run.notebooks import LONGEST_FOR_SOCKETS, run_notebooks


def written(folder: Path, **sources: str) -> Path:
    """A folder of notebooks of one cell each."""
    folder.mkdir()
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, source in sources.items():
        cells = [nbformat.v4.new_code_cell(source)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")
    return folder


@pytest.mark.parametrize("length", [LONGEST_FOR_SOCKETS, LONGEST_FOR_SOCKETS + 1, 200])
def test_a_long_folder_for_temporary_files_is_not_for_sockets(tmp_path, monkeypatch, length):
    """Paths of sockets end at 107 bytes, wherever TMPDIR lies."""
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    long = base / ("x" * (length - len(str(base)) - 1))
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(notebooks, "NOTEBOOKS", written(tmp_path / "notebooks", **{"01_one": "print(1 + 1)"}))
    try:
        (done,) = run_notebooks(tmp_path / "out", {})
    finally:
        monkeypatch.undo()
        long.rmdir()
        base.rmdir()
    assert nbformat.read(done, as_version=4).cells[-1].outputs[0].text == "2\n"


#: Notes that it began, with its process, and that it went on after Ctrl-C.
SLEEPS = """
import os, pathlib, time
pathlib.Path({here!r}, f"{name}-began").write_text(str(os.getpid()))
time.sleep(40)
pathlib.Path({here!r}, f"{name}-went-on").touch()
"""
RUN = """
import sys
from pathlib import Path
from selfrepair.run import notebooks
notebooks.NOTEBOOKS = Path(sys.argv[1])
notebooks.run_notebooks(Path(sys.argv[2]), {}, jobs=2)
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow("Ctrl-C ends a run's notebooks")
def test_ctrl_c_ends_running_notebooks_and_starts_no_other(tmp_path):
    """It waits for no cell to end, and leaves no kernel behind."""
    names = ("01_one", "02_two", "03_three")
    sources = {name: SLEEPS.format(here=str(tmp_path), name=name) for name in names}
    folder = written(tmp_path / "notebooks", **sources)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, folder, tmp_path / "out"], stderr=subprocess.PIPE, text=True
    )
    began = [tmp_path / f"{name}-began" for name in names[:2]]
    while process.poll() is None and not all(file.exists() and file.read_text() for file in began):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert error.rstrip().endswith("KeyboardInterrupt"), error
    assert not list(tmp_path.glob("*-went-on")) and not (tmp_path / "03_three-began").exists()
    assert not any(is_alive(int(file.read_text())) for file in began)
    assert os.path.exists(tmp_path / "out" / "notebooks")
