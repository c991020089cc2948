"""Every head resample-ablated again with other donors: how much hangs on which prompts are paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int

from selfrepair.engine.ablations import FromDonors
from selfrepair.engine.head_ablation import ablate_pairs
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import tokens_of

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Most prompts that are paired anew: the first ones.
MOST_PROMPTS = 48
#: What is kept of the heads' ablations: all that self-repair and its parts follow from.
KEPT = ("direct_effect", "ablated_direct_effect", "logit_change", "self_repair_heads", "self_repair_mlps")


class DonorDraws(Measurement):
    """``KEPT`` (logits) ``[draw, layer, head, prompt, position]``, and ``donor [draw, prompt]``.

    A draw, of which ``donor_draws`` says how many, pairs the first prompts anew: in the order of a seeded
    permutation, each with the one half of them further. A shard is a draw; they are numbered from 1, as
    draw 0 is the pairing of :class:`~selfrepair.measure.heads.Heads`.
    """

    name: ClassVar[str] = "donor_draws"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "donor_draws", "seed")
    along: ClassVar[str] = "draw"

    def applies_to(self, settings: Settings) -> bool:
        return int(settings["donor_draws"]) > 0

    def shards(self, settings: Settings) -> Sequence[int]:
        return range(1, 1 + int(settings["donor_draws"]))

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        prompts = np.arange(min(inputs["tokens"].sizes["prompt"], MOST_PROMPTS))
        order = pairing(len(prompts), int(settings["seed"]), shard)
        found = ablate_pairs(model, tokens_of(model, inputs, order), FromDonors())
        place = torch.from_numpy(np.argsort(order))
        dims = ("draw", "layer", "head", "prompt", "position")
        effects = {name: (dims, getattr(found, name)[None, :, :, place].numpy()) for name in KEPT}
        donor = np.empty_like(order)
        donor[order] = np.roll(order, len(order) // 2)
        coords = {"draw": [shard], "prompt": prompts}
        return xr.Dataset({**effects, "donor": (("draw", "prompt"), donor[None])}, coords)


MEASUREMENT = DonorDraws()


def pairing(n_prompts: int, seed: int, draw: int) -> Int[np.ndarray, " prompt"]:
    """Prompts in an order in which each is paired with the one half of them further."""
    return np.random.Generator(np.random.PCG64([seed, draw])).permutation(n_prompts)
