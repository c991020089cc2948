"""What made a result, written beside it: code, packages, machine, command, times, hashes of everything."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from selfrepair import __version__
from selfrepair.errors import UserError
from selfrepair.paths import REPOSITORY
from selfrepair.store.code_identity import code_version
from selfrepair.store.files import write_atomically

#: Attribute of a store that its manifest does not repeat.
OF_THE_FORMAT = "format"


def manifest_of(measured: Path) -> Path:
    """Where the manifest of a store lies."""
    return measured.with_suffix(".manifest.json")


def write_manifest(path: Path, seconds: float, **made_from: object) -> None:
    """Writes the manifest of a result that took ``seconds``; ``made_from`` is what determines its numbers."""
    content = {
        **made_from,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "version": __version__,
        "library": code_version("selfrepair.cli.main"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": packages(),
        "machine": _machine(),
    }
    _write(path, content)


def add_to_manifest(path: Path, **more: object) -> None:
    """Writes a manifest once more, with more at its end."""
    _write(path, read_manifest(path) | more)


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """What :func:`write_manifest` wrote.

    Raises:
        UserError: it cannot be read or is no manifest.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(
            isinstance(part, dict) for part in (content, content.get("files", {}), content.get("sweeps", {}))
        ):
            raise ValueError("its parts are of other types")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a manifest ({error}); delete it, the store beside it if there is one, and run again"
        ) from error
    return content


def contradictions(path: Path, attributes: Mapping[str, Any]) -> list[str]:
    """Attributes of a store of which its manifest says otherwise, or nothing; one word if there is none."""
    try:
        noted = read_manifest(path)
    except UserError:
        return ["everything"]
    own = {name: value for name, value in attributes.items() if name != OF_THE_FORMAT}
    return [name for name, value in own.items() if name not in noted or noted[name] != value]


@cache
def packages() -> dict[str, str]:
    """Installed versions of what this package asks for."""
    names = {
        name[0]
        for line in metadata.requires("selfrepair") or []
        if "extra ==" not in line and (name := re.match(r"[\w.-]+", line))
    }
    return {name: metadata.version(name) for name in sorted(names)}


def _commit() -> str | None:
    """The commit checked out, with ``+`` if files differ from it; ``None`` outside a Git checkout.

    A copy of the files inside another repository is no checkout.
    """
    commands = ("rev-parse --show-toplevel", "rev-parse HEAD", "status --porcelain --untracked-files=no")
    try:
        top, head, changes = (
            subprocess.run(
                ["git", "-C", str(REPOSITORY), *command.split()], capture_output=True, check=True
            ).stdout.strip()
            for command in commands
        )
        if not os.path.samefile(os.fsdecode(top), REPOSITORY):
            return None
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.decode() + ("+" if changes else "")


def _machine() -> dict[str, Any]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    said = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*: (.*)$", said, re.MULTILINE)
    return {
        "system": platform.system(),
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
