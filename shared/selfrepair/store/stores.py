"""Labelled, checksummed data on disk: one format for whatever is measured, for its shards and for what is merged of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from filelock import FileLock

from selfrepair.errors import UserError

FORMAT = 4
#: Dimension of what is one value for each shard, beside the dimension that shards divide.
SHARD = "shard"
PROMPTS_IN_CHUNK = 64


class FormatError(UserError):
    """A store of another version of this library."""


def write_store(parts: Iterable[xr.Dataset], path: Path, along: str = "prompt") -> None:
    """Writes datasets that follow each other along a dimension as one Zarr store, whole or not at all.

    Variables with the dimension ``shard`` follow each other along that; those with neither are the same in all parts.
    Each variable gets a checksum, and so do the attributes with the names of all variables. No more than
    one part, or one layer of a variable, is in memory at a time.
    """
    path = path.absolute()  # xarray takes a folder that is called ~ for the user's own
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        for part in parts:
            part = part.assign_attrs(format=FORMAT)
            if unfinished.exists():
                _append(part, unfinished, along)
            else:
                part.to_zarr(unfinished, mode="w", consolidated=False, encoding=_chunked(part))
        group = zarr.open_group(unfinished, mode="r+", use_consolidated=False)
        for _, array in group.arrays():
            array.attrs["sha256"] = _checksum(array)
        group.attrs["sha256"] = _checksum_of_contents(group)
        if path.exists():
            shutil.rmtree(path)
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _append(part: xr.Dataset, store: Path, along: str) -> None:
    for dim in (along, SHARD):
        growing = [name for name, variable in part.variables.items() if dim in variable.dims]
        if growing:
            part[growing].to_zarr(store, append_dim=dim, consolidated=False)


def kept(path: Path, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
    """What ``compute()`` gives: from the store ``path`` if it is there whole, else computed and kept there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not is_whole(path):
            write_store([compute()], path)
        return open_store(path)


def is_whole(path: Path) -> bool:
    """Whether :func:`open_store` can read it."""
    try:
        open_store(path)
    except UserError:
        return False
    return True


def open_store(path: str | Path) -> xr.Dataset:
    """Checks a store that :func:`write_store` wrote; values are read from the disk when they are asked for.

    Its attribute ``sha256`` is of all that it holds.

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
                    f"{path}: written in format {version}, this version reads {FORMAT}; measure it again"
                )
            group = zarr.open_group(path.absolute(), mode="r", use_consolidated=False)
            damaged = [name for name, array in sorted(group.arrays()) if array.attrs["sha256"] != _checksum(array)]
            if group.attrs["sha256"] != _checksum_of_contents(group):
                damaged.append("its attributes or what it holds")
    except UserError:
        raise
    except Exception as error:  # zarr, its codecs and xarray raise many types for a damaged or foreign folder
        raise UserError(f"{path}: damaged or no store ({type(error).__name__}); delete it and measure again") from error
    if damaged:
        raise UserError(f"{path}: damaged ({', '.join(damaged)}); delete it and measure again")
    return dataset


def _chunked(part: xr.Dataset) -> dict[str, dict[str, tuple[int, ...]]]:
    """Chunks that hold one layer and some prompts: figures read layers, sweeps write prompts."""
    one = {"layer": 1, "prompt": PROMPTS_IN_CHUNK}
    return {
        name: {"chunks": tuple(max(1, one.get(dim, size)) for dim, size in array.sizes.items())}
        for name, array in part.variables.items()
        if array.ndim
    }


def _checksum(array: zarr.Array) -> str:
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}{array.metadata.dimension_names}".encode())
    for first in range(array.shape[0]) if array.ndim > 2 else [...]:
        digest.update(np.ascontiguousarray(array[first]))
    return digest.hexdigest()


def _checksum_of_contents(group: zarr.Group) -> str:
    """Of the attributes, and of every variable's name and checksum."""
    attributes = {name: value for name, value in group.attrs.items() if name != "sha256"}
    arrays = {name: array.attrs["sha256"] for name, array in group.arrays()}
    return hashlib.sha256(json.dumps([attributes, arrays], sort_keys=True).encode()).hexdigest()
