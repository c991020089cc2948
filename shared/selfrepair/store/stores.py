"""Labelled, checksummed data on disk: one format for whatever is measured, in shards and merged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from filelock import FileLock

from selfrepair.errors import UserError

#: Of what is on the disk: a store of another format is refused.
FORMAT = 4
#: Dimension of what is one value for each shard, beside the dimension that shards divide.
SHARD = "shard"
PROMPTS_IN_CHUNK = 64
#: Attributes of the store, not of what was measured: checksums of its variables by name, and of it all.
CHECKSUMS, CHECKSUM = "variables_sha256", "sha256"


#: How each variable of a dataset is laid out on the disk.
Encoding = Callable[[xr.Dataset], dict[Hashable, dict[str, object]]]


class FormatError(UserError):
    """A store of another version of this library."""


def write_store(
    parts: Iterable[xr.Dataset], path: Path, along: str = "prompt", to_be_merged: bool = False
) -> None:
    """Writes datasets that follow each other along a dimension as one Zarr store, whole or not at all.

    Variables with the dimension ``shard`` follow each other along that; those with neither are the same in
    all parts that have them. Attributes are those of the first part. Each variable gets a checksum, and so do
    the attributes with the names of all variables. No more parts than fill a chunk, or one layer of a
    variable, are in memory at a time. What is ``to_be_merged`` is written fast, in few files.

    Raises:
        ValueError: a variable that should be the same in all parts is not.
    """
    path = path.absolute()  # xarray takes a folder that is called ~ for the user's own
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        _write_values(_blocks(parts, along), unfinished, along, _in_few_files if to_be_merged else _in_layers)
        group = zarr.open_group(unfinished, mode="r+", use_consolidated=False)
        checksums = {name: _checksum(array) for name, array in sorted(group.arrays())}
        of_contents = _checksum_of_contents(dict(group.attrs), checksums)
        group.attrs.update({CHECKSUMS: checksums, CHECKSUM: of_contents})
        if path.exists():
            shutil.rmtree(path)
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _seen_whole[path] = state_of(path)


def _blocks(parts: Iterable[xr.Dataset], along: str) -> Iterator[xr.Dataset]:
    """The parts, joined until they fill a chunk: one that grows would be written over and over."""
    block: list[xr.Dataset] = []
    for part in parts:
        is_full = sum(joined.sizes.get(along, PROMPTS_IN_CHUNK) for joined in block) >= PROMPTS_IN_CHUNK
        if block and (is_full or part.variables.keys() != block[0].variables.keys()):
            yield _joined(block, along)
            block = []
        block.append(part)
    if block:
        yield _joined(block, along)


def _joined(block: list[xr.Dataset], along: str) -> xr.Dataset:
    if len(block) == 1:
        return block[0]
    how: dict[str, Any] = {
        "data_vars": "minimal",
        "coords": "minimal",
        "compat": "equals",
        "join": "exact",
        "combine_attrs": "override",
    }
    return xr.concat(block, along, **how)


def _write_values(parts: Iterable[xr.Dataset], store: Path, along: str, encoding: Encoding) -> None:
    attributes: dict[str, object] = {}
    same: dict[Hashable, xr.Variable] = {}
    written: set[Hashable] = set()
    for part in parts:
        attributes = attributes or {**part.attrs, "format": FORMAT}
        same = _checked_same(part, same, along)
        part = part.drop_attrs(deep=False).assign_attrs(attributes)  # what is appended brings the store's own
        for dim in (along, SHARD):
            growing = [name for name in written & part.variables.keys() if dim in part[name].dims]
            if growing:
                part[growing].to_zarr(store, append_dim=dim, consolidated=False)
        new = part.drop_vars(written & part.variables.keys())
        if new.variables or not store.exists():
            new.to_zarr(store, mode="a", consolidated=False, encoding=encoding(new))
        written |= part.variables.keys()


def _checked_same(
    part: xr.Dataset, same: dict[Hashable, xr.Variable], along: str
) -> dict[Hashable, xr.Variable]:
    own = {name: values for name, values in part.variables.items() if not {along, SHARD} & set(values.dims)}
    for name in own.keys() & same.keys():
        if not own[name].equals(same[name]):
            raise ValueError(
                f"{name} is not the same in all parts, and has none of the dimensions {along} and {SHARD}"
            )
    return same | own


def kept(
    path: Path,
    compute: Callable[[], xr.Dataset],
    is_current: Callable[[xr.Dataset], bool],
) -> xr.Dataset:
    """What ``compute()`` gives: from the store ``path`` if that is whole and current, else computed and kept.

    Others who want the same wait meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if is_whole(path) and is_current(found := open_store(path)):
            return found
        write_store([compute()], path, to_be_merged=True)
        return open_store(path)


def is_whole(path: Path) -> bool:
    """Whether :func:`open_store` can read it."""
    return attributes_of(path) is not None


def attributes_of(path: Path) -> dict[str, Any] | None:
    """The attributes of a store, as :func:`open_store` gives them; ``None`` if it is not whole.

    Its data are read once in a process.
    """
    path = path.absolute()
    try:
        if path not in _seen_whole or _seen_whole[path] != state_of(path):
            return open_store(path).attrs
        attributes: dict[str, Any] = dict(zarr.open_group(path, mode="r", use_consolidated=False).attrs)
    except (UserError, OSError):  # the latter where another process replaces it just then
        return None
    gone_when_read = (CHECKSUMS, "coordinates")  # the latter xarray's own: which variables are coordinates
    return {name: value for name, value in attributes.items() if name not in gone_when_read}


def open_store(path: str | Path) -> xr.Dataset:
    """Checks a store that :func:`write_store` wrote; values are read from the disk when they are asked for.

    Its attribute ``sha256`` is of all that it holds.

    Raises:
        FormatError: of another format.
        UserError: nothing there, or damaged.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path}: no such store")
    stores = [] if (path / "zarr.json").exists() else [*path.glob("*.zarr"), *path.glob("*/*.zarr")]
    if stores:
        raise UserError(f"{path}: a folder that holds stores; give one of them, such as {min(stores)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are no part of a store
            dataset = xr.open_zarr(path, consolidated=False, chunks=None)
            version = dataset.attrs["format"]
            if version != FORMAT:
                raise FormatError(
                    f"{path}: written in format {version}, this version reads {FORMAT}; measure it again"
                )
            del dataset.attrs[CHECKSUMS]
            damaged = _damaged(path)
    except UserError:
        raise
    except Exception as error:  # zarr, its codecs and xarray raise many types for a damaged or foreign folder
        raise UserError(
            f"{path}: damaged, or no store of this suite ({type(error).__name__}); measure again"
        ) from error
    if damaged:
        raise UserError(f"{path}: damaged ({', '.join(damaged)}); measure again")
    return dataset


#: Of stores that this process found whole, or wrote: the state that their files were in.
_seen_whole: dict[Path, str] = {}


def _damaged(path: Path) -> list[str]:
    """Variables of a store whose values are not those that were written; unread if no file changed since."""
    state = state_of(path)
    if _seen_whole.get(path) == state:
        return []
    group = zarr.open_group(path, mode="r", use_consolidated=False)
    attributes: dict[str, Any] = dict(group.attrs)
    checksums = attributes.pop(CHECKSUMS)
    arrays = dict(group.arrays())
    damaged = sorted(name for name in arrays if checksums.get(name) != _checksum(arrays[name]))
    if arrays.keys() != checksums.keys() or attributes.pop(CHECKSUM) != _checksum_of_contents(
        attributes, checksums
    ):
        damaged.append("its attributes or what it holds")
    if not damaged:
        _seen_whole[path] = state
    return damaged


def state_of(path: Path) -> str:
    """Another text whenever a file of a store is written, replaced, moved or removed, which are not read."""
    files = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    states = [(file.relative_to(path).as_posix(), *_state_of_file(file)) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _state_of_file(file: Path) -> tuple[int, ...]:
    """Nothing of a file that another process has removed since it was found."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


#: Chunks lie beside each other in one folder for a variable, not each in four folders of its own.
_FLAT = {"chunk_key_encoding": {"name": "default", "separator": "."}}


def _in_layers(part: xr.Dataset) -> dict[Hashable, dict[str, object]]:
    """Chunks that hold one layer and some prompts: figures read layers, sweeps write prompts."""
    one: dict[Hashable, int] = {"layer": 1, "prompt": PROMPTS_IN_CHUNK}
    return {
        name: {"chunks": tuple(max(1, one.get(dim, size)) for dim, size in array.sizes.items()), **_FLAT}
        for name, array in part.variables.items()
        if array.ndim
    }


def _in_few_files(part: xr.Dataset) -> dict[Hashable, dict[str, object]]:
    return {
        name: {"chunks": tuple(max(1, size) for size in array.shape), "compressors": None, **_FLAT}
        for name, array in part.variables.items()
        if array.ndim
    }


def _checksum(array: zarr.Array) -> str:
    metadata: Any = array.metadata  # of Zarr's format 3
    labels = [array.dtype.str, array.shape, metadata.dimension_names, dict(array.attrs)]
    digest = hashlib.sha256(json.dumps(labels, sort_keys=True).encode())
    step = array.chunks[0] if array.ndim else 1
    places: list[Any] = [slice(i, i + step) for i in range(0, array.shape[0], step)] if array.ndim else [...]
    for place in places:
        values: Any = np.ascontiguousarray(array[place])
        digest.update(values)
    return digest.hexdigest()


def _checksum_of_contents(attributes: dict[str, object], checksums: dict[str, str]) -> str:
    """Of the attributes, and of every variable's name and checksum."""
    return hashlib.sha256(json.dumps([attributes, checksums], sort_keys=True).encode()).hexdigest()
