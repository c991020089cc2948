"""Whole layers ablated on natural prose: where else the Hydra effect is looked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr
from jaxtyping import Int

from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.sites import COMPONENTS, batches_that_fit
from selfrepair.measure.facts import PromptGroup
from selfrepair.measure.layer_ablation import ablate_layers
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import tokens_of
from selfrepair.measure.unseen_tokens import learnt_from, needs_of_fit
from selfrepair.text.facts import trained_without_dropout

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Most prompts of a shard, which are each other's donors.
SHARD_PROMPTS = 32


class LayersOnProse(Measurement):
    """What :func:`~selfrepair.measure.layer_ablation.ablate_layers` gives, on all prompts of text.

    Any other prompt of its shard may be a prompt's donor. Attribute as of
    :class:`~selfrepair.measure.layers.Layers`.
    """

    name: ClassVar[str] = "layers_on_prose"
    uses: ClassVar[tuple[str, ...]] = ("model_name", "dtype", "ablation", "layer_positions", "seed")

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return ("tokens", *needs_of_fit(settings))

    def fingerprint(self, settings: Settings) -> dict[str, object]:
        return {"trained_without_dropout": trained_without_dropout(str(settings["model_name"]))}

    def shards(self, settings: Settings) -> Sequence[int]:
        """The first prompt of every shard."""
        return [int(members[0]) for members in _shards(int(settings["n_prompts"]))]

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        every = np.arange(inputs["tokens"].sizes["prompt"])
        (members,) = (members for members in _shards(len(every)) if members[0] == shard)
        tokens = tokens_of(model, inputs, every)
        ablation = find_ablation(str(settings["ablation"]))
        batches = list(batches_that_fit(model, tokens.to(model.device)))
        replacement = ablation.prepare(model, learnt_from(model, settings, inputs, batches), COMPONENTS)
        number = np.arange(len(members))
        measured = ablate_layers(
            model,
            [PromptGroup(number, tokens[members].numpy())],
            number,
            replacement,
            str(settings["layer_positions"]),
            int(settings["seed"]) + shard,
        )
        return measured.assign_coords(prompt=members)


MEASUREMENT = LayersOnProse()


def _shards(n_prompts: int) -> list[Int[np.ndarray, " prompt"]]:
    """Prompts of every shard: of much the same number, so that none is left with few donors."""
    return np.array_split(np.arange(n_prompts), -(-n_prompts // SHARD_PROMPTS))
