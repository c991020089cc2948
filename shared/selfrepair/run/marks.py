"""The small files that say to the workflow what is done, each with the results that it answers for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from selfrepair.store.files import hash_file, write_atomically
from selfrepair.store.stores import is_whole, state_of

#: What a finished run leaves for readers, by pattern; what was measured has checksums and manifests of its
#: own.
RESULTS = (
    *("*.csv", "figures/*", "claims/*.csv", "notebooks/*.ipynb", "notebooks/*.html"),
    *("index.html", "head_tokens.json"),
)
#: What a run leaves beside what its notebooks do.
OF_THE_RUN = ("index.html", "head_tokens.json", "comparison.csv", "figures/claims.csv", "figures/claims.md")
#: What a run's manifest repeats of each store's own.
OF_A_STORE = (
    *("model", "measurement", "ablation", "dtype", "weights_sha256", "code", "sha256"),
    *("seconds", "finished"),
)


def mark(out_dir: Path, *place: str) -> Path:
    """The file that says that something is done: ``mark(out_dir, "notebooks", "01")``."""
    return out_dir.joinpath("done", *place[:-1], f"{place[-1]}.done")


def say_done(path: Path, left: Sequence[Path], out_dir: Path, **what: object) -> None:
    """Writes a mark, with the files and stores that it answers for."""
    files = {file.relative_to(out_dir).as_posix(): _fingerprint(file) for file in left}
    write_atomically(path, (json.dumps({**what, "left": files}) + "\n").encode())


def forget_stale(out_dir: Path, planned: dict[str, Any]) -> list[Path]:
    """Removes marks of what is to be made again, and returns them.

    These are marks of which something is missing or no longer what it was, and those of models, notebooks and
    page whose key is another now.
    """
    keys = {("notebooks", stem[:2]): key for stem, key in planned["notebooks"].items()}
    keys |= {("measured", model["slug"]): model["key"] for model in planned["models"].values()}
    keys |= {("done", "page"): planned["page"]}
    stale = []
    for path in sorted((out_dir / "done").rglob("*.done")):
        room, name = path.parent.name, path.stem
        of = name.rpartition("-")[0] if room == "measured" else name  # a model's marks end with their stage
        said = said_of(path, out_dir)
        if said is None or said.get("key") != keys.get((room, of), said.get("key")):
            path.unlink()
            stale.append(path)
    return stale


def said_of(path: Path, out_dir: Path) -> dict[str, Any] | None:
    """What a mark says; ``None`` if it is not there, or what it answers for is no longer what it was."""
    return read_mark(path) if changed_since(path, out_dir) == [] else None


def changed_since(path: Path, out_dir: Path) -> list[str] | None:
    """What a mark answers for and is no longer what it was; ``None`` if there is no mark that can be read."""
    try:
        left = read_mark(path)["left"]
        return [name for name, fingerprint in left.items() if not _is_as_left(out_dir / name, fingerprint)]
    except (OSError, KeyError, TypeError, AttributeError):
        return None


def read_mark(path: Path) -> dict[str, Any]:
    """What :func:`say_done` wrote; empty if it is not there or damaged."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def passed_over(out_dir: Path, model_slug: str) -> Iterator[str]:
    """Labels of what a run could not measure of a model."""
    for path in sorted((out_dir / "done" / "measured").glob("*.done")):
        if path.stem.rpartition("-")[0] == model_slug:
            for line in (said_of(path, out_dir) or {}).get("not_measured", []):
                yield line.partition(":")[0]


def belongs_to_a_run(out_dir: Path) -> bool:
    """Whether the workflow has begun or finished a run there."""
    return (out_dir / "done" / "plan.json").is_file() or (out_dir / "manifest.json").is_file()


def _fingerprint(path: Path) -> str | None:
    """Of a file, its hash; of a store, that of its checksums, and its state; ``None`` if it is not there."""
    if path.is_dir():
        return f"{_fingerprint(path / 'zarr.json')} {state_of(path)}"
    return hash_file(path) if path.is_file() else None


def _is_as_left(path: Path, fingerprint: str | None) -> bool:
    """A store of which no file was touched is not read again, as it may be large: one that was moved is."""
    found = _fingerprint(path)
    if found == fingerprint or found is None or fingerprint is None or not path.is_dir():
        return found == fingerprint
    return found.split()[0] == fingerprint.split()[0] and is_whole(path)
