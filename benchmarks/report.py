"""Tables and the sections of ``RESULTS.md`` that the benchmarks write, each its own."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from machine import describe_machine, describe_versions

from selfrepair.store.files import write_atomically

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = "# Results\n\nWritten by the scripts beside this file; `README.md` says what the numbers mean.\n"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def head_of_section(device: torch.device) -> str:
    """When, where and how: call it before any work, as it tells the machine's load."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"`{command}`\n\n{date.today().isoformat()}; {describe_machine(device)}; {describe_versions()}."


def write_section(path: Path, name: str, text: str) -> None:
    """Prints section ``name`` and puts it into ``path``, in place of the one of that name if there is one."""
    print(f"## {name}\n\n{text}")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n## {name}\n\n{text}\n{end}\n"
    old = path.read_text(encoding="utf-8") if path.is_file() else TITLE
    mine = re.compile(rf"^{re.escape(begin)}\n.*?^{re.escape(end)}\n", re.DOTALL | re.MULTILINE)
    new = mine.sub(lambda _: section, old) if mine.search(old) else f"{old.rstrip()}\n\n{section}"
    write_atomically(path, new.encode())
