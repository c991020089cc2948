"""Checking a results folder: are its files what was written, and would the same numbers come out again?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from selfrepair.text.corpora import Prompts
from selfrepair.models.devices import resolve_device, set_precision
from selfrepair.errors import UserError
from selfrepair.store.manifest import hash_files, manifest_of, read_manifest
from selfrepair.models.loading import load_model
from selfrepair.store.datasets import FormatError, Shards, code_version, open_store, shard_starts
from selfrepair.measure.heads import CODE, Sweep

#: Of the shards of all sweeps, computed again; at least one.
SHARE_OF_SHARDS = 0.01
#: Largest difference, in units of the largest value of a variable in its shard, that other processors and libraries may make.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1, "float16": 0.1}


@dataclass(frozen=True)
class Finding:
    """One thing checked; ``agrees`` is ``None`` where a check could not be made."""

    what: str
    agrees: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{ {True: 'agrees', False: 'DIFFERS', None: 'not checked'}[self.agrees] }: {self.what}: {self.detail}"


def verify(folder: Path, device: str = "auto", seed: int | None = None) -> Iterator[Finding]:
    """Checks every file and measurement of a run against its checksum and manifest, and computes a hundredth of the shards again.

    ``seed`` says which shards; without it they are others every time.

    Raises:
        UserError: nothing in the folder, or a manifest that is none.
    """
    stores = sorted((folder / "sweeps").glob("*.zarr")) or sorted(folder.glob("*.zarr"))
    others = [*sorted((folder / "hydra").glob("*.zarr")), *sorted((folder / "measured").glob("*.npz"))]
    manifest = folder / "manifest.json"
    if not (stores or others or manifest.is_file()):
        raise UserError(f"{folder}: no measurements and no manifest.json, so nothing to verify; give the results folder of a run")
    if manifest.is_file():
        noted = read_manifest(manifest)
        yield from _verify_files(folder, noted.get("files", {}))
        there = [store.name for store in stores]
        for name, made_from in noted.get("sweeps", {}).items():
            if not (isinstance(made_from, dict) and made_from.get("store") in there):
                yield Finding(name, False, "the store that the manifest names is missing")
    whole = []
    for store in stores:
        finding = _verify_store(store)
        whole += [store] if finding.agrees else []
        yield finding
    yield from ((_verify_store if other.suffix == ".zarr" else _verify_arrays)(other) for other in others)
    shards = [(store, start) for store in whole for start in shard_starts(open_store(store).sizes["prompt"])]
    chosen = random.Random(seed).sample(shards, max(1, round(SHARE_OF_SHARDS * len(shards)))) if shards else []
    for store, start in sorted(chosen):
        yield _compute_again(store, start, device)


def _verify_files(folder: Path, noted: dict[str, str]) -> Iterator[Finding]:
    found = hash_files(folder)
    for name in sorted(noted.keys() | found.keys()):
        if found.get(name) != noted.get(name):
            why = "missing" if name not in found else "not in the manifest" if name not in noted else "changed since the run"
            yield Finding(name, False, why)
    same = sum(found.get(name) == digest for name, digest in noted.items())
    yield Finding("files", same == len(noted) == len(found), f"{same} of {len(noted)} as the run left them")


def _verify_store(store: Path) -> Finding:
    try:
        attributes = open_store(store).attrs
        noted = read_manifest(manifest_of(store))
    except FormatError as error:
        return Finding(store.name, None, str(error))
    except UserError as error:
        return Finding(store.name, False, str(error))
    differing = [name for name in attributes if name != "format" and noted.get(name) != attributes[name]]
    if differing:
        return Finding(store.name, False, f"its manifest says otherwise of {', '.join(differing)}")
    return Finding(store.name, True, "every checksum")


def _verify_arrays(file: Path) -> Finding:
    if Shards(file.parent).read(file.stem) is None:
        return Finding(file.name, False, "damaged; run again to make it")
    try:
        read_manifest(manifest_of(file))
    except UserError as error:
        return Finding(file.name, False, str(error))
    return Finding(file.name, True, "its checksum")


def _compute_again(store: Path, start: int, device: str) -> Finding:
    kept = open_store(store)
    noted = read_manifest(manifest_of(store))
    what = f"{store.name}, shard {start}"
    if kept.attrs["code"] != code_version(*CODE):
        return Finding(what, None, f"made by other code ({kept.attrs['code']}); check out commit {noted.get('commit')} to compute it again")
    where = resolve_device(device)
    try:
        model = load_model(str(noted["source"]), where, set_precision(str(kept.attrs["dtype"]), where))
    except UserError as error:
        return Finding(what, None, str(error))
    if model.weights_hash() != kept.attrs["weights_sha256"]:
        return Finding(what, False, f"the weights of {noted['source']} are not those it was made from")
    prompts = Prompts(kept["token"].values, str(kept.attrs["corpus"]))
    again = Sweep(model, prompts, str(kept.attrs["ablation"]), store.parent, int(kept.attrs["seed"]))
    largest = 0.0
    for part in again.computed_again(start):
        wanted = kept.isel(prompt=part["prompt"].values)
        for name in part.data_vars:
            difference = np.abs(part[name].values.astype(np.float64) - wanted[name].values)
            largest = max(largest, float(difference.max() / max(1e-30, np.abs(wanted[name].values).max())))
    torch.set_float32_matmul_precision("highest")
    return Finding(what, largest <= TOLERANCE[str(kept.attrs["dtype"])], f"computed again, largest relative difference {largest:.1e}")
