"""Writing to disk without losing anything when no more can be written: a full disk, a quota, a size limit."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfrepair.errors import UserError

NEARLY_NOTHING = 1 << 20  # bytes

#: Why nothing more can be written, and what to do about it, by error number.
REASONS = {
    errno.ENOSPC: "disk full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space, or ask for more,",
    errno.EFBIG: "a file would be larger than is allowed here (ulimit -f says how large); allow larger ones",
}


@contextmanager
def disk_full_is_said(*folders: Path) -> Iterator[None]:
    """Makes one line of a failed write where a disk under ``folders`` is full, or a quota or size limit is
    reached; other errors pass.

    Libraries report these as :class:`OSError`, as errors of their own that name the number, or as errors
    that say nothing: then the free space decides, of a disk that has any (``/proc`` has none).
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = [folder for folder in folders if _is_full(folder)]
        says_why = isinstance(error, OSError) and error.errno is not None
        why = why_not_written(error) or (REASONS[errno.ENOSPC] if full and not says_why else None)
        if why is None:
            raise
        raise UserError(
            f"{[*full, *folders][0]}: {why} and run the same command again: it goes on from what is saved"
        ) from error


def why_not_written(error: BaseException | None) -> str | None:
    """One of :data:`REASONS`, if that is what the error, or one that it came of, is about."""
    while error is not None:
        named = re.findall(r"\bos error (\d+)|\[Errno (\d+)\]", str(error))
        numbers = [getattr(error, "errno", None), *(int(rust or python) for rust, python in named)]
        for number in numbers:
            if number in REASONS:
                return REASONS[number]
        error = error.__cause__ or error.__context__
    return None


def _is_full(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    return disk.total > 0 and disk.free < NEARLY_NOTHING
