"""Tasks of tests: the heads of a small model on given tokens, and a measurement without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import xarray as xr
from families import random_tokens

from selfrepair.measure import task as task_module
from selfrepair.measure.measurement import (
    Inputs,
    Measurement,
    Settings,
    find_measurement,
    measurement_names,
)
from selfrepair.measure.task import Task

#: Prompts of the small model that ``conftest.py`` has in a ``folder``.
TOKENS = random_tokens(22).numpy()
#: Variables of the heads' ablations that have an axis of heads.
OF_HEADS = (
    "direct_effect",
    "ablated_direct_effect",
    "logit_change",
    "self_repair_heads",
    "self_repair_mlps",
    "sigma_ablated",
)


def wanted_settings(tokens: Path, **changes: object) -> dict[str, object]:
    """What a measurement may use, for the prompts of an ``.npy`` file."""
    n_prompts, length = np.load(tokens).shape
    amounts = {"n_prompts": n_prompts, "prompt_len": length}
    source = {"tokens": str(tokens), "text": None, "dataset": None, "seed": 0}
    return {**source, **amounts, "dtype": "float32", "ablation": "zero", **changes}


def heads_task(model: Path, tokens: Path, out: Path, **changes: object) -> Task:
    return Task("heads", str(model), wanted_settings(tokens, **changes), out)


def of_prompts() -> tuple[str, ...]:
    """Measurements of prompts: all that can be measured of a model that knows no facts."""
    kind = {"ablation": "resample"}
    names = (name for name in measurement_names() if not find_measurement(name).on_demand)
    return tuple(name for name in names if "tokens" in find_measurement(name).needs(kind))


class Made(Measurement):
    """``compute(shard)`` of its own; ``computed`` notes what was computed."""

    name: ClassVar[str] = "made"
    uses: ClassVar[tuple[str, ...]] = ("seed",)

    def __init__(
        self, compute: Callable[[int], xr.Dataset], shards: Sequence[int], needs: tuple[str, ...] = ()
    ):
        self.make, self.numbers, self.needed = compute, shards, needs
        self.computed: list[int] = []

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return self.needed

    def shards(self, settings: Settings) -> Sequence[int]:
        return self.numbers

    def compute(self, model: object, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        self.computed.append(shard)
        return self.make(shard)


#: Stands in for a model where only what stores say of it counts.
NO_MODEL = SimpleNamespace(name="none", fast=True)


def register(monkeypatch, measurements: Mapping[str, Measurement]) -> None:
    """Lets tasks find these measurements, and no others, of a model that is none."""
    monkeypatch.setattr(task_module, "find_measurement", measurements.__getitem__)
    monkeypatch.setattr(task_module, "settings_of", lambda name, wanted: {"seed": wanted["seed"]})
    monkeypatch.setattr(task_module, "model_identity", lambda name: "files")
    monkeypatch.setattr(task_module, "code_version", lambda *modules: f"code of {modules[0]}")
    monkeypatch.setattr(task_module, "described", lambda model: {"model": model.name, "dtype": "float32"})
