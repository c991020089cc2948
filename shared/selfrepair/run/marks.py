"""The small files that say to the workflow what is done, each with the results that it answers for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from selfrepair.store.files import write_atomically

#: What a finished run leaves for readers, by pattern; what was measured has checksums and manifests of its
#: own.
RESULTS = ("*.csv", "figures/*", "claims/*.csv", "notebooks/*.ipynb", "notebooks/*.html", "index.html")


def mark(out_dir: Path, *place: str) -> Path:
    """The file that says that something is done: ``mark(out_dir, "notebooks", "01")``."""
    return out_dir.joinpath("done", *place[:-1], f"{place[-1]}.done")


def say_done(path: Path, left: Sequence[Path], out_dir: Path, **what: object) -> None:
    """Writes a mark, with the files and stores that it answers for."""
    files = {file.relative_to(out_dir).as_posix(): _fingerprint(file) for file in left}
    write_atomically(path, (json.dumps({**what, "left": files}) + "\n").encode())


def forget_stale(out_dir: Path, planned: dict[str, object]) -> list[Path]:
    """Removes marks of what is to be made again, and returns them.

    These are marks of which something is missing or no longer what it was, and those of notebooks and page
    whose key is another now.
    """
    keys = {f"notebooks/{stem[:2]}.done": key for stem, key in planned["notebooks"].items()} | {
        "page.done": planned["page"]
    }
    stale = []
    for path in sorted((out_dir / "done").rglob("*.done")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            is_good = all(
                _fingerprint(out_dir / name) == fingerprint for name, fingerprint in said["left"].items()
            )
            is_good &= said.get("key") == keys.get(
                path.relative_to(out_dir / "done").as_posix(), said.get("key")
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_good = False
        if not is_good:
            path.unlink()
            stale.append(path)
    return stale


def _fingerprint(path: Path) -> str | None:
    """Of a file, its hash; of a store, that of what it says of its contents; ``None`` if it is not there."""
    if path.is_dir():
        path = path / "zarr.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
