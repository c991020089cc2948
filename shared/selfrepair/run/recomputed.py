"""Stores held against what determines them, and a sample of their shards computed again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from selfrepair.errors import UserError
from selfrepair.measure.measurement import settings_of
from selfrepair.measure.task import MADE_IN_SHARD, N_SHARDS, Task
from selfrepair.models.devices import resolve_device, set_precision
from selfrepair.models.loading import Model, load_model
from selfrepair.run.consistency import Finding
from selfrepair.store.manifest import contradictions, manifest_of, read_manifest
from selfrepair.store.stores import FormatError, attributes_of, open_store

#: Of the shards of each measurement, computed again; at least one.
SHARE_OF_SHARDS = 0.01
#: Largest difference, in units of the largest value of a variable in its shard, that other processors and
#: libraries may make.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1, "float16": 0.1}
#: Of whole numbers and truth values, such as which neurons come first, so many may differ where values are
#: nearly equal.
MAY_DIFFER = 0.01


def check_store(store: Path) -> tuple[Finding, Task | None]:
    """What is found of a store, and the task that makes it, if it can be computed again."""
    try:
        attributes = open_store(store).attrs
        noted = read_manifest(manifest_of(store))
    except FormatError as error:
        return Finding(store.name, None, str(error)), None
    except UserError as error:
        return Finding(store.name, False, str(error)), None
    if differing := contradictions(manifest_of(store), attributes):
        return Finding(store.name, False, f"its manifest says otherwise of {', '.join(differing)}"), None
    try:
        wanted = settings_of(str(attributes["measurement"]), attributes)
        task = Task(str(attributes["measurement"]), str(noted["source"]), wanted, store.parent)
        if task.determined_by["code"] != attributes["code"]:
            why = (
                f"made by other code ({attributes['code']}); check out commit {noted.get('commit')} to "
                f"compute it again"
            )
            return Finding(store.name, None, f"its checksums and manifest agree; {why}"), None
        name = f"{task.name_by(attributes)}.zarr"
    except (KeyError, TypeError) as error:
        return Finding(store.name, False, f"its attributes are not those of a measurement ({error})"), None
    except UserError as error:
        return Finding(store.name, None, str(error)), None
    if name != store.name:
        return Finding(store.name, False, f"by what determines it, its name should be {name}"), None
    if task.path.name != store.name:
        return Finding(store.name, False, f"of what is here now, it would be {task.path.name}"), None
    return Finding(store.name, True, "every checksum, its manifest and its name"), task


def check_unfinished(shards: Path) -> Finding:
    """What is found of the shards of a store that is not merged yet."""
    found = {shard.name: attributes_of(shard) for shard in sorted(shards.glob("*.zarr"))}
    damaged = [name for name, attributes in found.items() if attributes is None]
    if damaged:
        return Finding(shards.name, False, f"unfinished, and of its shards {', '.join(damaged)} are damaged")
    in_all = {attributes.get(N_SHARDS) for attributes in found.values() if attributes}
    of = f"of {in_all.pop()} " if len(in_all) == 1 else ""
    return Finding(shards.name, True, f"unfinished: {len(found)} {of}shards, each with its checksums")


def sample_of(tasks: list[Task], chance: random.Random) -> list[tuple[Task, int]]:
    """Some shards of each measurement, in order of model and precision, so that each model is loaded once."""
    of_each: dict[str, list[tuple[Task, int]]] = {}
    for task in tasks:
        of_each.setdefault(task.measurement.name, []).extend((task, shard) for shard in task.shards)
    chosen = [
        pair
        for shards in of_each.values()
        for pair in chance.sample(shards, max(1, round(SHARE_OF_SHARDS * len(shards))))
    ]
    return sorted(chosen, key=lambda pair: (*_model_of(pair[0]), pair[0].path.name, pair[1]))


def compute_again(sample: list[tuple[Task, int]], device: str) -> Iterator[tuple[Task, Finding]]:
    """Each task with what is found of its shard; ``sample`` is in the order of :func:`sample_of`."""
    for (model_name, dtype), group in groupby(sample, lambda pair: _model_of(pair[0])):
        where, model, why = resolve_device(device), None, ""
        try:
            try:
                model = load_model(model_name, where, set_precision(dtype, where))
            except UserError as error:
                why = str(error)
            for task, shard in group:
                what = f"{task.path.name}, shard {shard}"
                if model is None:
                    yield task, Finding(what, None, why)
                else:
                    yield task, _computed_again(what, task, shard, model)
        finally:
            torch.set_float32_matmul_precision("highest")


def _model_of(task: Task) -> tuple[str, str]:
    """Its name, and its precision."""
    return task.model_name, str(open_store(task.path).attrs["dtype"])


def _computed_again(what: str, task: Task, shard: int, model: Model) -> Finding:
    kept = open_store(task.path)
    if model.weights_sha256 != kept.attrs["weights_sha256"]:
        return Finding(what, False, f"the weights of {task.model_name} are not those it was made from")
    try:
        again = task.computed_again(model, shard)
    except UserError as error:
        return Finding(what, None, str(error))
    return _compare(what, again, task.of_shard(kept, shard), TOLERANCE[str(kept.attrs["dtype"])])


def _compare(what: str, again: xr.Dataset, kept: xr.Dataset, tolerance: float) -> Finding:
    """Of a shard made again with the kept one; what is not finite agrees with its like only."""
    if others := set(again.variables) ^ (set(kept.variables) - {MADE_IN_SHARD}):
        return Finding(what, False, f"{', '.join(sorted(map(str, others)))}: only in one of the two")
    differences: dict[str, float] = {}
    differing: dict[str, float] = {}
    for key, variable in again.variables.items():
        name, new, old = str(key), variable.values, kept[key].values
        if new.shape != old.shape:
            return Finding(what, False, f"{name} is of another shape")
        if new.dtype.kind != "f":
            differing[name] = float(np.mean(new != old)) if new.size else 0.0
            continue
        is_finite = np.isfinite(new) & np.isfinite(old)
        if not np.array_equal(new[~is_finite], old[~is_finite], equal_nan=True):
            return Finding(what, False, f"{name} is not finite where it should be")
        new, old = (values[is_finite].astype(np.float64) for values in (new, old))
        if new.size:
            differences[name] = float(np.abs(new - old).max() / max(1e-30, np.abs(old).max()))
    name, largest = _largest(differences)
    counted, share = _largest(differing)
    detail = f"computed again, largest relative difference {largest:.1e}{f' ({name})' if largest else ''}"
    detail += f", {share:.1%} of {counted} differ" if share else ""
    return Finding(what, largest <= tolerance and share <= MAY_DIFFER, detail)


def _largest(values: dict[str, float]) -> tuple[str, float]:
    return max(values.items(), key=lambda pair: pair[1], default=("", 0.0))
