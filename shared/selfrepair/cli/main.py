"""The ``selfrepair`` command. Every failure that a user can act on is one line and a non-zero exit."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from selfrepair.cli import commands
from selfrepair.cli.parser import command_parser, one_line
from selfrepair.errors import UserError
from selfrepair.paths import PACKAGE, REPOSITORY
from selfrepair.store.disk_full import why_not_written


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the locale has no sign for is written out
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = command_parser()
    if not _is_unicode("".join(arguments)):
        parser.error("an argument is no UTF-8 text; rename the file that it names")
    options = parser.parse_args(arguments)
    if not options.is_stage:  # the workflow's stages use the library that the workflow says
        _say_whose_library(Path(sys.argv[0]))
    try:
        _check_home()
        _check_out(getattr(options, "out", None))
        getattr(commands, options.run)(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"selfrepair: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("selfrepair: interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        path = error.filename2 or error.filename
        if path is None and why_not_written(error) is None:  # about no file that was given or written
            raise
        what = "standard output" if path is None else one_line(os.fsdecode(path))
        print(f"selfrepair: error: {what}: cannot be read or written ({error.strerror})", file=sys.stderr)
        if path is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left unwritten
        return 1
    return 0


def _check_home() -> None:
    """Refuses to begin without a home folder, where the libraries keep settings: they fail in many lines."""
    try:
        Path.home()
    except RuntimeError as error:
        raise UserError("this user has no home folder: set HOME to a folder that you may write to") from error


def _check_out(out: Path | None) -> None:
    """Refuses a file in the place of the folder that a command writes to, or of one that this lies in."""
    for place in () if out is None else (out, *out.parents):
        if os.path.exists(place) and not os.path.isdir(place):
            raise UserError(f"{place}: is no folder but a file; give --out a folder")


def _say_whose_library(script: Path) -> None:
    """Says it if another clone's library is used than that of the command: PYTHONPATH goes first."""
    own = script.absolute().parent / "../.." / PACKAGE.relative_to(REPOSITORY)  # it lies in .venv/bin
    if script.name == "selfrepair" and own.is_dir() and own.resolve() != PACKAGE:
        print(
            f"selfrepair: using the library {PACKAGE}, not {own.resolve()}: PYTHONPATH names it",
            file=sys.stderr,
        )


def _is_unicode(text: str) -> bool:
    """False if it holds bytes that were no UTF-8: Python keeps them as lone surrogates, no file does."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


if __name__ == "__main__":
    sys.exit(main())
