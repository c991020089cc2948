"""What the command lines of all benchmarks share: options, and one line for whatever a user can mend."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from report import RESULTS
from transformers.utils import logging

from selfrepair.errors import UserError


class Parser(argparse.ArgumentParser):
    """Has the options of every benchmark; reports a bad one in one line."""

    def __init__(self, description: str):
        super().__init__(description=description)
        self.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (auto)")
        self.add_argument(
            "--threads", type=positive, default=torch.get_num_threads(), help="of torch (%(default)s)"
        )
        self.add_argument(
            "--results",
            type=Path,
            default=RESULTS,
            help="file whose section is written (RESULTS.md beside the scripts)",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run(
    parser: Parser, arguments: Sequence[str] | None, benchmark: Callable[[argparse.Namespace], None]
) -> int:
    """Parses, runs, and returns the exit status."""
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    try:
        benchmark(options)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def positive(text: str) -> int:
    """An ``argparse`` type."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def even(text: str) -> int:
    """An ``argparse`` type: a number of prompts, half of which are the other half's donors."""
    if positive(text) % 2:
        raise ValueError(text)
    return int(text)
