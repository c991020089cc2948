"""What a measurement is: its name, settings, shards, what it reads, and how a shard is computed."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import xarray as xr

from selfrepair.paths import PACKAGE

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: JSON values by name; a model's own settings out of a profile, or those that determine one store.
#: ``model_name`` is for what reads more of the model's folder than the model: training checkpoints, or the
#: record of its training.
Settings = Mapping[str, Any]
#: What a measurement reads, by the names of the measurements that made it.
Inputs = Mapping[str, xr.Dataset]


class Measurement(ABC):
    """One kind of measurement. A module of this folder that holds one as ``MEASUREMENT`` adds it.

    ``name`` is the module's. ``uses`` names the settings that determine its numbers, beside those of what it
    ``needs``. Shards divide its data along the dimension ``along``: each variable has that dimension, or the
    dimension ``shard`` (one value for each), or is the same in every shard. A coordinate named as ``along``
    says in which order the parts of shards are merged.
    """

    name: ClassVar[str]
    uses: ClassVar[tuple[str, ...]] = ()
    along: ClassVar[str] = "prompt"
    #: Measured for every kind of ablation of a profile, not for its first alone.
    every_ablation: ClassVar[bool] = False
    #: Made only where another measurement needs it.
    on_demand: ClassVar[bool] = False
    #: Made before everything else, on a machine that has the network.
    needs_network: ClassVar[bool] = False

    def needs(self, settings: Settings) -> tuple[str, ...]:
        """Names of the measurements that it reads, of the same model with the same settings."""
        return ("tokens",)

    def applies_to(self, settings: Settings) -> bool:
        """Whether there is anything to measure; ``settings`` are all that a measurement may use."""
        return True

    def fingerprint(self, settings: Settings) -> dict[str, object]:
        """What else determines its numbers: hashes of files that it reads, by name."""
        return {}

    @abstractmethod
    def shards(self, settings: Settings) -> Sequence[int]:
        """Numbers of its shards, in order."""

    @abstractmethod
    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        """One shard, computed by itself.

        Raises:
            UserError: the model or the prompts cannot be measured; says why.
        """


def find_measurement(name: str) -> Measurement:
    """The measurement of that name.

    Raises:
        KeyError: there is none.
    """
    if name not in measurement_names():
        raise KeyError(f"no measurement '{name}'; there are {', '.join(measurement_names())}")
    return importlib.import_module(f"selfrepair.measure.{name}").MEASUREMENT


@cache
def measurement_names() -> tuple[str, ...]:
    """All of them, in alphabetical order."""
    folder = PACKAGE / "measure"
    modules = [info.name for info in pkgutil.iter_modules([str(folder)])]
    sources = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in modules}
    return tuple(sorted(name for name, source in sources.items() if "\nMEASUREMENT = " in source))


def settings_of(name: str, wanted: Settings) -> dict[str, Any]:
    """Those of ``wanted`` that determine a measurement's numbers: its own, and those of all that it needs."""
    measurement = find_measurement(name)
    chosen = {key: wanted[key] for key in measurement.uses}
    for needed in measurement.needs(wanted):
        chosen |= settings_of(needed, wanted)
    return chosen
