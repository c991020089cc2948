"""Text on disk to documents, and documents to packed rows of tokens."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from selfrepair.errors import UserError

SEPARATOR = re.compile(r"^---$", re.MULTILINE)


def read_documents(path: str | Path) -> list[str]:
    """The documents of a ``.txt``/``.txt.gz`` file or of every such file in a folder, in name order.

    In a file, a line that holds exactly ``---`` ends one document and begins the next.

    Raises:
        UserError: nothing there, no text file in the folder, or a file that is not UTF-8 text.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted([*path.glob("*.txt"), *path.glob("*.txt.gz")])
        if not files:
            raise UserError(f"{path}: no .txt or .txt.gz file in this folder")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"{path}: no such file or folder")
    documents = [part.strip("\n") for file in files for part in SEPARATOR.split(_read(file))]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{path}: holds no text")
    return documents


def _read(file: Path) -> str:
    try:
        raw = file.read_bytes()
        return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def pack(documents: Iterable[Sequence[int]], bos: int, length: int) -> np.ndarray:
    """Packs tokenised documents into rows ``[n_rows, length]`` (int64), each beginning with ``bos``.

    A ``bos`` also marks every document's start inside a row; one that falls on the first column
    serves as the row's own. Every token comes once, in order; the incomplete last row is dropped.
    """
    stream = np.concatenate([np.asarray([bos, *document], dtype=np.int64) for document in documents] or [[]])
    rows, position = [], 0
    while True:
        own = 0 if position < len(stream) and stream[position] == bos else 1
        end = position + length - own
        if end > len(stream):
            break
        rows.append(np.concatenate([np.full(own, bos, dtype=np.int64), stream[position:end]]))
        position = end
    return np.stack(rows) if rows else np.empty((0, length), dtype=np.int64)
