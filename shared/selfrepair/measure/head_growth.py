"""Who repairs? How much the direct effect of every later head grows when a head is ablated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfrepair.engine.ablations import Replacement
from selfrepair.engine.batches import in_halves, pairs_at_once, partner_batches, rows_that_fit
from selfrepair.engine.forward import Replay, carry, z_reached
from selfrepair.engine.hooks import watching
from selfrepair.engine.reading import Reading
from selfrepair.errors import NotMeasurable
from selfrepair.measure.judged_tokens import SELECTED, judged_tokens
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import (
    head_replacement,
    needs_of_ablation,
    pair_shards,
    prompts_of_shard,
    tokens_of,
)
from selfrepair.models.devices import on_device

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Pairs of prompts that are run; heads' tokens are selected among those of all.
MOST_PAIRS = 32


class HeadGrowth(Measurement):
    """Sums over an ablated head's tokens (logits), by prompt.

    ``growth [selection, ablated_layer, ablated_head, layer, head, prompt]``: of the change of a head's direct
    effect, 0 for heads that are not of a later layer; ``clean_effect``, the same without ``selection``: of
    its clean direct effect on the top tokens, for every head; ``count [selection, ablated_layer,
    ablated_head, prompt]``: tokens. Attribute ``selections``: see :mod:`selfrepair.measure.judged_tokens`.
    Our own question, after Wang et al. 2022 (arXiv 2211.00593) and McDougall et al. 2023 (arXiv 2310.04625).
    """

    name: ClassVar[str] = "head_growth"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "ablation", "fraction")

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return (*needs_of_ablation(settings), "heads")

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings, MOST_PAIRS)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        if model.n_layers < 2:
            raise NotMeasurable(f"{model.name}: has one layer, so that no head comes after another")
        prompts = prompts_of_shard(inputs, shard)
        judged = judged_tokens(inputs["heads"], float(settings["fraction"]), prompts)
        tokens = tokens_of(model, inputs, prompts)
        found = head_growth(model, tokens, head_replacement(model, settings, inputs), judged)
        ablated, other = ("ablated_layer", "ablated_head"), ("layer", "head")
        return xr.Dataset(
            {
                "growth": (("selection", *ablated, *other, "prompt"), found.growth.numpy()),
                "clean_effect": ((*ablated, *other, "prompt"), found.clean_effect.numpy()),
                "count": (("selection", *ablated, "prompt"), judged.sum(-1)),
            },
            {"prompt": prompts},
            {"selections": list(SELECTED)},
        )


MEASUREMENT = HeadGrowth()


class Growth(NamedTuple):
    """What :class:`HeadGrowth` measures, on the host."""

    growth: Float[Tensor, "selection layer head layer head prompt"]
    clean_effect: Float[Tensor, "layer head layer head prompt"]


@torch.no_grad()
def head_growth(
    model: Model,
    tokens: Int[Tensor, "prompt token_position"],
    replacement: Replacement,
    judged: Bool[np.ndarray, "selection layer head prompt position"],
) -> Growth:
    """Ablates each head on the prompts that hold tokens of it; ``judged`` are those tokens.

    The two halves of the prompts are each other's donors.
    """
    places = model.n_layers, model.n_heads
    replay = Replay(model, tokens.shape[1])
    wide = torch.promote_types(torch.float32, model.dtype)
    growth = torch.zeros(*places, len(tokens), len(SELECTED), *places, dtype=wide)
    clean_effect = torch.zeros(*places, len(tokens), *places, dtype=wide)
    for batch in partner_batches(len(tokens), pairs_at_once(model, tokens.shape[1])):
        reading = Reading(model, on_device(tokens[batch], model.device))
        of_batch = torch.from_numpy(judged[..., batch.numpy(), :]).to(model.device)
        clean = torch.stack([reading.effects(layer, z) for layer, z in enumerate(reading.clean.z)])
        clean_effect[:, :, batch] = torch.einsum("ahpk,lpkg->ahplg", of_batch[0].to(wide), clean).cpu()
        growth[:, :, batch] = _Batch(reading, replay, replacement, of_batch).growth().cpu()
    return Growth(growth.permute(3, 0, 1, 4, 5, 2), clean_effect.movedim(2, -1))


class _Batch:
    """Ablates heads on some prompts and their donors."""

    def __init__(
        self,
        reading: Reading,
        replay: Replay,
        replacement: Replacement,
        judged: Bool[Tensor, "selection layer head prompt position"],
    ):
        self.model, self.reading, self.replay, self.replacement = reading.model, reading, replay, replacement
        self.judged = judged
        self.along = [reading.along(layer) for layer in range(self.model.n_layers)]
        self.rows = rows_that_fit(self.model, judged.shape[-1] + 1)

    def growth(self) -> Float[Tensor, "layer head prompt selection layer head"]:
        """Sums of changes over the selected tokens."""
        selections, *places, prompts, _ = self.judged.shape
        found = self.reading.direction.new_zeros(*places, prompts, selections, *places)
        for layer in range(self.model.n_layers - 1):
            self._ablate(layer, found[layer])
        return found

    def _ablate(self, layer: int, found: Float[Tensor, "head prompt selection layer head"]) -> None:
        """Fills in what ablating the heads of one layer does."""
        change = self.reading.change(layer, self.replacement)
        W_O = self.model.W_O(layer).to(found.dtype)
        heads, prompts = self.judged[:, layer].any(-1).any(0).nonzero(as_tuple=True)

        def ablate(first: int, last: int) -> bool:
            """Those of the head and prompt of rows ``first`` to ``last``, side by side in one pass."""
            head, prompt = heads[first:last], prompts[first:last]
            tokens = self.judged[:, layer, head, prompt].to(found.dtype)
            delta = torch.einsum("rke,red->rkd", change[prompt, :, head], W_O[head])

            def see(above: int, z: Tensor) -> None:
                later = layer + 1 + above
                grown = self._change(later, z, prompt)
                found[:, :, :, later][head, prompt] = torch.einsum("srk,rkh->rsh", tokens, grown)

            last_layer = self.model.n_layers - 1
            below = self.model.output_projections[layer + 1 : last_layer]
            run = partial(carry, self.model, self.replay, self.reading.clean, layer, delta[None], prompt)
            with watching(below, lambda above, z, _: see(above, z)):
                see(last_layer - layer - 1, z_reached(self.model, last_layer, run))
            return True

        in_halves(ablate, len(heads), self.rows)

    def _change(
        self, layer: int, z: Float[Tensor, "*batch d_model"], prompt: Int[Tensor, " row"]
    ) -> Float[Tensor, "row position head"]:
        """Of the direct effects of a layer's heads, whose ``z`` is now this in rows of these prompts."""
        clean = self.reading.clean.z[layer][prompt]
        change = (z.reshape(clean.shape) - clean)[:, :-1].to(self.reading.direction.dtype)
        return torch.einsum("rkhe,rkhe->rkh", change, self.along[layer][prompt])
