"""Where no more can be written: one line that says why, whatever library met it."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import random_tokens, save_family
from safetensors.torch import save_file

from selfrepair.cli.main import main
from selfrepair.errors import UserError
from selfrepair.store.disk_full import disk_full_is_said

KINDS = {
    errno.ENOSPC: "disk full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "a file would be larger than is allowed here",
}
GOES_ON = "and run the same command again: it goes on from what is saved"


def plainly(number: int) -> None:
    raise OSError(number, os.strerror(number))


def as_zarr_does(number: int) -> None:
    """By an error of its own, for which Python's is the reason."""
    try:
        plainly(number)
    except OSError as error:
        raise RuntimeError("could not write the chunk") from error


def as_safetensors_does(number: int) -> None:
    raise RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")


@pytest.mark.parametrize("number", KINDS)
@pytest.mark.parametrize("fail", [plainly, as_zarr_does, as_safetensors_does])
def test_what_stopped_a_write_is_one_line(tmp_path, fail, number):
    with pytest.raises(UserError) as said, disk_full_is_said(tmp_path):
        fail(number)
    line = str(said.value)
    assert line.startswith(f"{tmp_path}: {KINDS[number]}") and line.endswith(GOES_ON) and "\n" not in line


def test_other_errors_pass(tmp_path):
    with pytest.raises(FileNotFoundError), disk_full_is_said(tmp_path):
        plainly(errno.ENOENT)
    with pytest.raises(UserError, match=r"^as it was$"), disk_full_is_said(tmp_path):
        raise UserError("as it was")


@pytest.mark.parametrize("disk", [{"total": 0, "free": 0}, {"total": 1 << 30, "free": 9}])
def test_another_reason_is_not_a_full_disk(tmp_path, monkeypatch, disk):
    """/proc has no space at all, and nothing can be made in it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(**disk))
    with pytest.raises(FileNotFoundError), disk_full_is_said(tmp_path):
        plainly(errno.ENOENT)
    says_nothing = pytest.raises(UserError, match="disk full") if disk["total"] else pytest.raises(ValueError)
    with says_nothing, disk_full_is_said(tmp_path):
        raise ValueError("could not write")


@pytest.fixture
def largest_file():
    """``largest_file(bytes)``: no file of this process may grow beyond that, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def by_torch(file: Path) -> None:
    with file.open("wb") as opened:  # as states of training are saved
        torch.save({"weights": torch.zeros(1 << 18)}, opened)


def by_safetensors(file: Path) -> None:
    save_file({"weights": torch.zeros(1 << 18)}, file)


def by_python(file: Path) -> None:
    file.write_bytes(bytes(1 << 20))


@pytest.mark.parametrize("write", [by_torch, by_safetensors, by_python])
def test_size_limit_is_said_whoever_writes(tmp_path, largest_file, write):
    largest_file(100_000)
    with pytest.raises(UserError, match=KINDS[errno.EFBIG]), disk_full_is_said(tmp_path):
        write(tmp_path / "file")


def test_size_limit_stops_a_sweep_in_one_line_and_later_it_goes_on(tmp_path, largest_file, capsys):
    model = save_family("gpt2", tmp_path / "tiny")
    np.save(tmp_path / "ids.npy", random_tokens(32).numpy())
    sources = ["--model", str(model), "--tokens", str(tmp_path / "ids.npy")]
    command = ["sweep", *sources, "--device", "cpu", "--out", str(tmp_path / "out")]
    largest_file(8_000)
    status, last = main(command), capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1 and last.startswith("selfrepair: error: ") and KINDS[errno.EFBIG] in last
    largest_file(1 << 30)
    assert main(command) == 0


@pytest.mark.slow("no command prints into a full disk without saying so")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "selfrepair.cli.main", "plan", "--profile", "pocket", "--out", "unused"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == (
        "selfrepair: error: standard output: cannot be read or written (No space left on device)\n"
    )
