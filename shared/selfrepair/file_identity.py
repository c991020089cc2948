"""What tells a folder's files from others of their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path


def identity_of_files(folder: Path, files: Iterable[Path]) -> str:
    """A hash of the contents of those of ``files`` that are files, and of their names in ``folder``.

    Raises:
        OSError: one cannot be read.
    """
    states = [(file, file.stat()) for file in sorted(set(files)) if file.is_file()]
    return _hash_of(folder, tuple((file, state.st_size, state.st_mtime_ns) for file, state in states))


@cache
def _hash_of(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Sizes and times say whether files changed in this process."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"{file.relative_to(folder).as_posix()} {size} ".encode(errors="surrogateescape"))
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
