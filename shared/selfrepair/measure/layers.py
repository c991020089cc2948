"""Whole layers ablated on prompts that ask for a fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr

from selfrepair.measure.layer_ablation import ablate_on_facts
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.unseen_tokens import needs_of_fit
from selfrepair.text.facts import trained_without_dropout

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: One shard ablates the attention layers, the other the MLPs: every model has both, and they take as long.
ATTENTION, MLP = 0, 1


class Layers(Measurement):
    """What ``layer_ablation.ablate_on_facts`` gives.

    Attribute ``trained_without_dropout``: true where that is known.
    """

    name: ClassVar[str] = "layers"
    uses: ClassVar[tuple[str, ...]] = ("model_name", "dtype", "ablation", "layer_positions", "seed")
    along: ClassVar[str] = "ablated"

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return ("facts", *needs_of_fit(settings))

    def fingerprint(self, settings: Settings) -> dict[str, object]:
        return {"trained_without_dropout": trained_without_dropout(str(settings["model_name"]))}

    def shards(self, settings: Settings) -> Sequence[int]:
        return [ATTENTION, MLP]

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        chosen = np.arange(shard, 2 * model.n_layers, 2)
        return ablate_on_facts(model, inputs["facts"], settings, inputs, chosen)


MEASUREMENT = Layers()
