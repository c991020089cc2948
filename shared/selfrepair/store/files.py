"""Names and single files: what a store is called, and files that are written whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import uuid
from pathlib import Path

from selfrepair.errors import UserError


def identity(attributes: dict[str, object]) -> str:
    """Twelve hexadecimal digits that differ where any attribute does."""
    return hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()[:12]


def slug(model_name: str) -> str:
    """A model's name as a part of file names."""
    return model_name.strip("/").replace("/", "--")


def hash_files(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of every file in a folder that one of the patterns finds, by its path there."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return {file.relative_to(folder).as_posix(): hash_file(file) for file in files}


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        UserError: there is something else than an ordinary file.
    """
    if path.exists() and not path.is_file():  # a folder, or a device that a file would take the place of
        raise UserError(f"{path}: is a folder or a device; give the path of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def unreadable(path: Path, error: Exception) -> UserError:
    """What is said of a file that a run or notebooks left and that cannot be read: they make it again."""
    return UserError(f"{path}: cannot be read ({type(error).__name__}); delete it and run again what made it")


def remove_unfinished(path: Path) -> None:
    """Removes what a killed :func:`write_atomically` of ``path`` left; nobody else may be writing it."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*"):
        unfinished.unlink()
