"""Writing to disk without losing anything when there is no room left."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfrepair.errors import UserError

NEARLY_NOTHING = 1 << 20  # bytes


@contextmanager
def disk_full_is_said(*folders: Path) -> Iterator[None]:
    """Turns a failed write into one line when a disk under ``folders`` is full; other errors pass.

    Libraries report a full disk as :class:`OSError` with ``ENOSPC`` or as errors of their own, so
    the free space decides where the error does not.
    """
    try:
        yield
    except Exception as error:
        full = [folder for folder in folders if _free(folder) < NEARLY_NOTHING]
        if getattr(error, "errno", None) == errno.ENOSPC:
            full = full or [folders[0]]
        if isinstance(error, UserError) or not full:
            raise
        raise UserError(
            f"{full[0]}: disk full; free some space and run the same command again: "
            "it goes on from what is saved"
        ) from error


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
