"""One measurement of one model: its shards, and the store that is merged from them."""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import xarray as xr
from filelock import FileLock
from tqdm import tqdm

from selfrepair import __version__
from selfrepair.errors import UserError
from selfrepair.measure.measurement import Inputs, Settings, find_measurement, settings_of
from selfrepair.models.checkpoints import model_identity, short_name
from selfrepair.store.code_identity import code_version
from selfrepair.store.files import identity, remove_unfinished, slug
from selfrepair.store.manifest import contradictions, manifest_of, write_manifest
from selfrepair.store.stores import SHARD, attributes_of, kept, open_store, write_store

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Attribute of a shard: of how many it is one.
N_SHARDS = "n_shards"
#: Attributes of a shard that its store does not have.
OF_A_SHARD = ("seconds", "inputs", "format", "sha256", N_SHARDS)
#: Coordinate of a merged store that its shards do not have: which of them each place is from.
MADE_IN_SHARD = "made_in_shard"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Task:
    """One measurement of one model with its settings, in a folder of stores.

    The store's name comes from everything that determines its numbers: asked again, it is not computed
    again. Work is saved in shards, so that a killed run goes on where it was, and several devices share it.
    """

    def __init__(self, name: str, model_name: str, wanted: Settings, folder: Path):
        """``wanted`` are at least the settings that the measurement uses; nothing heavy is loaded.

        Raises:
            UserError: the model, or a file that the measurement reads, cannot be found.
        """
        self.measurement = find_measurement(name)
        self.model_name, self.folder = model_name, folder
        wanted = {**wanted, "model_name": model_name}
        self.settings = settings_of(name, wanted)
        self.needed = {n: Task(n, model_name, wanted, folder) for n in self.measurement.needs(self.settings)}
        kind = f"-{self.settings['ablation']}" if "ablation" in self.settings else ""
        self.label = f"{name}{kind}"
        self.path = folder / f"{self.name_by(self.determined_by)}.zarr"
        self.shard_folder = self.path.with_suffix(".shards")

    def name_by(self, attributes: Mapping[str, object]) -> str:
        """What its store is called if that has these attributes.

        Raises:
            KeyError: one that determines the numbers is not among them.
        """
        own = {name: attributes[name] for name in self.determined_by}
        return f"{slug(short_name(self.model_name))}-{self.label}-{identity(own)}"

    @cached_property
    def determined_by(self) -> dict[str, object]:
        """Everything that determines the numbers."""
        return {
            "measurement": self.measurement.name,
            "model_files": model_identity(self.model_name),
            **self.settings,
            **self.measurement.fingerprint(self.settings),
            "inputs": {name: task.path.stem for name, task in self.needed.items()},
            "version": __version__,
            "code": code_version(
                f"selfrepair.measure.{self.measurement.name}",
                *("selfrepair.models.loading", "selfrepair.engine.fast.switch"),
            ),
        }

    @property
    def shards(self) -> Sequence[int]:
        return self.measurement.shards(self.settings)

    def is_done(self) -> bool:
        """Whether the store is there whole with its manifest, made from the inputs that are there."""
        attributes = attributes_of(self.path)
        if attributes is None or not all(task.is_done() for task in self.needed.values()):
            return False
        if contradictions(manifest_of(self.path), attributes):
            return False
        if attributes != attributes | self.determined_by:  # another store under this name
            return False
        inputs = {name: attributes_of(task.path) for name, task in self.needed.items()}
        found = {name: of_input and of_input["sha256"] for name, of_input in inputs.items()}
        return attributes["inputs_sha256"] == found

    def inputs(self) -> Inputs:
        """The stores of what it needs.

        Raises:
            UserError: one is missing or damaged.
        """
        return {name: open_store(task.path) for name, task in self.needed.items()}

    def compute(self, models: Sequence[Model], shards: Iterable[int], progress: bool = False) -> None:
        """Leaves these shards and what they need on the disk; ``models`` are one model on one device or more.

        Where the store is there, or another run makes it meanwhile, no shards are left.

        Raises:
            UserError: no such shard, or as the measurement says.
        """
        shards = list(shards)
        if unknown := sorted(set(shards) - set(self.shards)):
            known = ", ".join(map(str, self.shards))
            raise UserError(
                f"{self.label} of {self.model_name} has no shard {unknown[0]}; its shards are {known}"
            )
        for task in self.needed.values():
            task.merge(models, progress)
        if self.is_done():
            return
        is_made_again = self.path.is_dir()  # it is damaged, or of other inputs
        inputs, about = self.inputs(), described(models[0])

        def is_made_meanwhile() -> bool:
            return not is_made_again and self.is_done()

        def leave_on_disk(model: Model, shard: int) -> None:
            if not is_made_meanwhile():
                self._kept_shard(model, inputs, about, shard)

        title = f"{models[0].name} {self.label}"
        with tqdm(total=len(shards), desc=title, unit="shard", disable=not progress) as bar:
            for _ in on_all(models, leave_on_disk, shards):
                bar.update()
        if is_made_meanwhile():
            shutil.rmtree(self.shard_folder, ignore_errors=True)

    def merge(self, models: Sequence[Model], progress: bool = False) -> Path:
        """The store, from its shards and whatever of them is missing; returns its path.

        Raises:
            UserError: as the measurement says.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for task in self.needed.values():
            task.merge(models, progress)
        with FileLock(self.path.with_suffix(".lock")):  # who wants the same store beside this run waits
            remove_unfinished(manifest_of(self.path))
            if not self.is_done():
                self.compute(models, self.shards, progress)
                self._merge_shards()
            shutil.rmtree(self.shard_folder, ignore_errors=True)  # a run killed just before it would have
        return self.path

    def _merge_shards(self) -> None:
        about_shards = [self._shard(shard).attrs for shard in self.shards]
        seconds = sum(float(about["seconds"]) for about in about_shards)
        own = {name: value for name, value in about_shards[0].items() if name not in OF_A_SHARD}
        attributes = {**own, **self.determined_by, "inputs_sha256": about_shards[0]["inputs"]}
        manifest_of(self.path).unlink(missing_ok=True)
        write_store(self._parts(attributes), self.path, self.measurement.along)
        about = attributes | {"sha256": open_store(self.path).attrs["sha256"]}
        write_manifest(manifest_of(self.path), seconds, source=self.model_name, **about)

    def computed_again(self, model: Model, shard: int) -> xr.Dataset:
        """A shard, computed whatever is on the disk, with its places in the order of the store."""
        made = self._measured(model, self.inputs(), shard)
        return made.sortby(self.measurement.along) if self.measurement.along in made.coords else made

    def _measured(self, model: Model, inputs: Inputs, shard: int) -> xr.Dataset:
        from selfrepair.engine.fast import fast_path
        from selfrepair.models.devices import unless_out_of_memory

        with fast_path(model) as quick:
            made = unless_out_of_memory(lambda: self.measurement.compute(quick, self.settings, inputs, shard))
        if made is None:
            raise UserError(
                f"{self.label} of {model.name}: {model.device} has too little memory for it; use shorter "
                "prompts, a dtype of 16 bits or a larger device"
            )
        return made

    def of_shard(self, merged: xr.Dataset, shard: int) -> xr.Dataset:
        """The part of the store that a shard made."""
        along = self.measurement.along
        chosen = {along: merged[MADE_IN_SHARD].values == shard} if along in merged.sizes else {}
        if SHARD in merged.sizes:
            chosen[SHARD] = [self.shards.index(shard)]
        return merged.isel(chosen)

    def _shard_path(self, shard: int) -> Path:
        return self.shard_folder / f"{shard:06d}.zarr"

    def _kept_shard(self, model: Model, inputs: Inputs, about: Mapping[str, object], shard: int) -> None:
        def compute() -> xr.Dataset:
            started = time.monotonic()
            made = self._measured(model, inputs, shard)
            seconds = time.monotonic() - started
            own = {"seconds": seconds, "inputs": _checksums(inputs), N_SHARDS: len(self.shards)}
            return made.assign_attrs({**about, **made.attrs, **own})

        kept(self._shard_path(shard), compute, lambda found: found.attrs["inputs"] == _checksums(inputs))

    def _shard(self, shard: int) -> xr.Dataset:
        """Opened anew each time: what was read of it does not stay in memory."""
        return open_store(self._shard_path(shard))

    def _parts(self, attributes: Mapping[str, object]) -> Iterator[xr.Dataset]:
        """What lies along the shards, in order of its places; then, shard by shard, what is one for each."""
        along = self.measurement.along
        for shard, places in self._runs():
            run = (
                self._shard(shard)
                .drop_dims(SHARD, errors="ignore")
                .drop_attrs(deep=False)
                .assign_attrs(attributes)
            )
            if along in run.dims:
                made_in = np.full(run.sizes[along], shard)
                run = run.assign_coords({MADE_IN_SHARD: (along, made_in)}).isel({along: places})
            yield run
        for shard in self.shards:
            yield self._shard(shard).drop_dims(along, errors="ignore")

    def _runs(self) -> list[tuple[int, slice]]:
        """Runs of consecutive places, in order: the shard that holds each, and where in it; one at least."""
        runs: list[tuple[int, int, slice]] = []
        for number, shard in enumerate(self.shards):
            data = self._shard(shard)
            if self.measurement.along in data.coords:
                places = data[self.measurement.along].values
                borders = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
                runs += [(int(places[a]), shard, slice(a, b)) for a, b in pairwise(borders) if a < b]
            elif data.sizes.get(self.measurement.along, 0):
                runs.append((number, shard, slice(None)))
        in_order = sorted(runs, key=lambda run: run[0])
        return [(shard, places) for _, shard, places in in_order] or [(self.shards[0], slice(None))]


def described(model: Model) -> dict[str, object]:
    """What a store says of the model that it is of."""
    return {
        "model": model.name,
        "architecture": model.hf.config.model_type,
        "parallel": model.parallel,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "weights_sha256": model.weights_sha256,
        "dtype": model.precision,
    }


def _checksums(inputs: Inputs) -> dict[str, str]:
    return {name: str(data.attrs["sha256"]) for name, data in inputs.items()}


def on_all(
    models: Sequence[Model], work: Callable[[Model, Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """``work(model, item)`` for every item, in order, each on whichever of the models is free."""
    if len(models) == 1:
        yield from (work(models[0], item) for item in items)
        return
    free: queue.SimpleQueue[Model] = queue.SimpleQueue()
    for model in models:
        free.put(model)

    def on_a_free_one(item: Item) -> Result:
        model = free.get()
        try:
            return work(model, item)
        finally:
            free.put(model)

    with ThreadPoolExecutor(len(models)) as pool:
        yield from pool.map(on_a_free_one, items)
