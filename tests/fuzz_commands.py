"""Running the command line on bad input, in this process, and what must hold however it ends."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfrepair.cli.main import main

#: A command that takes longer on these tiny inputs is taken to hang.
SECONDS = 60
#: What a command that fails later on may leave: locks, and finished pieces of work that the next run takes up.
FINISHED_WORK = re.compile(
    r"/out$|/results(/by-hand)?(/profile[^/]*)?$|/measured$|/done$|\.lock$|\.shards$|/[^./][^/]*\.zarr(/|$)|/[^./][^/]*\.manifest\.json$|/cache(/|$)"
)
#: Python shows these to nobody unless asked.
SILENT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it wrote."""

    status: int
    out: str
    err: str


class Cases:
    """Runs commands, each in a folder of its own below ``base`` which is its working directory, and counts them."""

    def __init__(self, base: Path):
        self.base = base
        self.ran = 0

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """A fresh folder for the input of one case; afterwards it is gone."""
        folder = self.base / f"case-{self.ran}"
        folder.mkdir()
        before = os.getcwd()
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            shutil.rmtree(folder)

    def run(self, arguments: Sequence[str]) -> Outcome:
        """The outcome of ``selfrepair ARGUMENTS``; a failure must be one line and leave the folder as it was.

        Whatever Python would show a traceback for is raised here.
        """
        self.ran += 1
        before = _tree(self.base)
        with _captured() as (out, err), _alarm():
            try:
                status = main(list(arguments))
            except SystemExit as leaving:
                status = leaving.code
        outcome = Outcome(status, out.text, err.text)
        assert status in (0, 1, 2), outcome
        assert "Traceback" not in outcome.err + outcome.out, outcome
        if status != 0:
            assert is_one_line(outcome.err), outcome
            left = {path for path, _ in _tree(self.base) ^ before}
            assert all(FINISHED_WORK.search(path) for path in left), (outcome, left)
        return outcome


#: What is said before a failure: what training reads, and how far measurements came.
PROGRESS = re.compile(
    r"^[^\n]+: reading [^\n]+ \(tokenized once, then cached\)\n|^((\r[^\n]* \d+/\d+ [^\n]*)+\n)+"
)


def is_one_line(err: str) -> bool:
    """Whether it is one printable line, progress aside, that begins with the program's name and says something."""
    line = PROGRESS.sub("", err).removesuffix("\n")
    program, found, message = line.partition("error: ")
    return bool(
        found
        and line.isprintable()
        and program.startswith("selfrepair")
        and len(message) > 12
        and err.endswith("\n")
    )


def _tree(folder: Path) -> set[tuple[str, int]]:
    """Every file and folder below, with files' sizes."""
    return {
        (os.path.join(parent, name), os.lstat(os.path.join(parent, name)).st_size if name in files else -1)
        for parent, folders, files in os.walk(folder)
        for name in [*folders, *files]
    }


class _Text:
    text = ""


@contextlib.contextmanager
def _captured() -> Iterator[tuple[_Text, _Text]]:
    """All that reaches standard output and error: Python's streams, loggers, warnings and native code."""
    texts = _Text(), _Text()
    files = [tempfile.TemporaryFile() for _ in texts]
    streams = [
        io.TextIOWrapper(open(file.fileno(), "wb", 0, closefd=False), "utf-8", errors, write_through=True)
        for file, errors in zip(files, ("strict", "backslashreplace"), strict=True)
    ]
    saved = [os.dup(number) for number in (1, 2)]
    handlers = [
        h for name in ("", *logging.root.manager.loggerDict) for h in logging.getLogger(name).handlers
    ]
    handlers = [(h, h.stream) for h in handlers if type(h) is logging.StreamHandler]
    try:
        for number, file in zip((1, 2), files, strict=True):
            os.dup2(file.fileno(), number)
        for handler, _ in handlers:
            handler.setStream(streams[1])
        with (
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("always")
            for kind in SILENT:
                warnings.simplefilter("ignore", kind)
            warnings.showwarning = lambda *shown, **_: print(
                warnings.formatwarning(*shown[:4]), file=sys.stderr
            )
            yield texts
    finally:
        for handler, stream in handlers:
            handler.setStream(stream)
        for number, file, text in zip((1, 2), files, texts, strict=True):
            os.dup2(saved[number - 1], number)
            os.close(saved[number - 1])
            file.seek(0)
            text.text = file.read().decode("utf-8", "replace")
            file.close()


class _TooLong(BaseException):
    """Not an Exception: nothing under test may catch it."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _TooLong(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
