"""The ``selfrepair`` command. Every failure that a user can act on is one line and a non-zero exit."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from selfrepair.cli import commands
from selfrepair.cli.parser import command_parser, one_line
from selfrepair.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = command_parser()
    if not _is_unicode("".join(arguments)):
        parser.error("an argument is no UTF-8 text; rename the file that it names")
    options = parser.parse_args(arguments)
    try:
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
        if path is None:  # not about a file that was given, or that was to be written
            raise
        print(
            f"selfrepair: error: {one_line(os.fsdecode(path))}: cannot be read or written ({error.strerror})",
            file=sys.stderr,
        )
        return 1
    return 0


def _is_unicode(text: str) -> bool:
    """False if it holds bytes that were no UTF-8: Python keeps them as lone surrogates, no file does."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


if __name__ == "__main__":
    sys.exit(main())
