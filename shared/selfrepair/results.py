"""Sweeps on disk: labelled, checksummed, written in shards, never computed twice."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from filelock import FileLock

from selfrepair.errors import UserError

FORMAT = 3
#: The modules that make a sweep's numbers.
ENGINE = ("ablation.py", "direct_effect.py", "kernels.py", "low_rank.py", "models.py", "replacement.py", "replay.py", "sweep.py")
#: Pairs of prompts in a shard of a sweep.
SHARD_PAIRS = 16
PROMPTS_IN_CHUNK = 64


class FormatError(UserError):
    """A store of another version of this library."""


def identity(attributes: dict[str, object]) -> str:
    """Twelve hexadecimal digits that differ where any attribute does."""
    text = json.dumps({"format": FORMAT, **attributes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def store_name(model: str, ablation: str, attributes: dict[str, object]) -> str:
    """File name, without suffix, of what was measured on a model: readable, and another for other ``attributes``."""
    return f"{slug(model)}-{ablation}-{identity(attributes)}"


def slug(model: str) -> str:
    """A model's name as a part of file names."""
    return model.strip("/").replace("/", "--")


def shard_starts(n_prompts: int) -> range:
    """The first pair of every shard of a sweep."""
    return range(0, n_prompts // 2, SHARD_PAIRS)


def code_version(*modules: str) -> str:
    """Hash of the source of library modules, by file name: it changes when the code that makes the numbers does."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / module).read_bytes() for module in modules)).hexdigest()[:12]


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


def remove_unfinished(path: Path) -> None:
    """Removes what a killed :func:`write_atomically` of ``path`` left; nobody else may be writing it."""
    for unfinished in path.parent.glob(f".{path.name}.*"):
        unfinished.unlink()


class Shards:
    """Named groups of arrays in a folder. A shard is there whole, with a matching checksum, or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays, or ``None`` if the shard is missing or damaged."""
        try:
            content = (self.folder / f"{name}.npz").read_bytes()
            if (self.folder / f"{name}.sha256").read_text() != hashlib.sha256(content).hexdigest():
                return None
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        with np.load(io.BytesIO(content)) as arrays:
            return dict(arrays)

    def write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        content = buffer.getvalue()
        write_atomically(self.folder / f"{name}.npz", content)
        write_atomically(self.folder / f"{name}.sha256", hashlib.sha256(content).hexdigest().encode())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def kept(folder: Path, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that ``compute()`` gives: from ``folder`` if they are there whole under ``name``, else computed and kept there."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = Shards(folder)
    with FileLock(folder / f"{name}.lock"):
        arrays = shards.read(name)
        if arrays is None:
            arrays = compute()
            shards.write(name, arrays)
        return arrays


def write_store(parts: Iterable[xr.Dataset], path: Path) -> None:
    """Writes datasets that follow each other along ``prompt`` as one Zarr store, whole or not at all.

    Each variable gets a checksum, and so do the attributes with the names of all variables. No more than one part, or one layer of a variable, is in memory at a time.
    """
    path = path.absolute()  # xarray takes a folder that is called ~ for the user's own
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        for part in parts:
            if unfinished.exists():
                part.to_zarr(unfinished, append_dim="prompt", consolidated=False)
            else:
                part.to_zarr(unfinished, mode="w", consolidated=False, encoding=_chunked(part))
        group = zarr.open_group(unfinished, mode="r+", use_consolidated=False)
        for _, array in group.arrays():
            array.attrs["sha256"] = _checksum(array)
        group.attrs["sha256"] = _checksum_of_contents(dict(group.attrs), group)
        if path.exists():
            shutil.rmtree(path)
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_whole(path: Path) -> bool:
    """Whether :func:`open_store` can read it."""
    try:
        open_store(path)
    except UserError:
        return False
    return True


def open_store(path: str | Path) -> xr.Dataset:
    """Checks a store that :func:`write_store` wrote; values are read from the disk when they are asked for.

    Raises:
        FormatError: of another format.
        UserError: nothing there, or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such store")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are no part of a store
            dataset = xr.open_zarr(path.absolute(), consolidated=False, chunks=None)
            version = dataset.attrs["format"]
            if version != FORMAT:
                raise FormatError(
                    f"{path}: written in format {version}, this version reads {FORMAT}; make it again with 'selfrepair sweep'"
                )
            group = zarr.open_group(path.absolute(), mode="r", use_consolidated=False)
            damaged = [name for name, array in sorted(group.arrays()) if array.attrs["sha256"] != _checksum(array)]
            if dataset.attrs.pop("sha256") != _checksum_of_contents(dataset.attrs, group):
                damaged.append("its attributes or what it holds")
    except UserError:
        raise
    except Exception as error:  # zarr, its codecs and xarray raise many types for a damaged or foreign folder
        raise UserError(f"{path}: damaged or no sweep ({type(error).__name__}); delete it and sweep again") from error
    if damaged:
        raise UserError(f"{path}: damaged ({', '.join(damaged)}); delete it and sweep again")
    return dataset


def _chunked(part: xr.Dataset) -> dict[str, dict[str, tuple[int, ...]]]:
    """Chunks that hold one layer and some prompts: figures read layers, sweeps write prompts."""
    one = {"layer": 1, "prompt": PROMPTS_IN_CHUNK}
    return {
        name: {"chunks": tuple(one.get(dim, size) for dim, size in array.sizes.items())}
        for name, array in part.variables.items()
        if array.ndim
    }


def _checksum(array: zarr.Array) -> str:
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}{array.metadata.dimension_names}".encode())
    for first in range(array.shape[0]) if array.ndim > 2 else [...]:
        digest.update(np.ascontiguousarray(array[first]))
    return digest.hexdigest()


def _checksum_of_contents(attributes: dict[str, object], group: zarr.Group) -> str:
    return hashlib.sha256(json.dumps([attributes, sorted(group.array_keys())], sort_keys=True).encode()).hexdigest()
