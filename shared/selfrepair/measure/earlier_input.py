"""One layer earlier: layers fed their predecessor's input, or whose predecessor lacks its strongest head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from selfrepair.engine.ablations import Replacement
from selfrepair.engine.batches import pairs_at_once, partner_batches
from selfrepair.engine.forward import Replay, attention_z, carry, z_reached
from selfrepair.engine.reading import Reading
from selfrepair.errors import NotMeasurable
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import (
    head_replacement,
    needs_of_ablation,
    pair_shards,
    prompts_of_shard,
    tokens_of,
)
from selfrepair.models.devices import on_device
from selfrepair.statistics import select_top

if TYPE_CHECKING:
    from selfrepair.models.loading import Model


class EarlierInput(Measurement):
    """Changes of the direct effects of the heads of every layer but the first, summed per prompt (logits).

    ``earlier [later_layer, head, prompt]``: the layer reads the residual stream before its predecessor
    instead of its own. ``ablated``, of the same shape: it reads its own, with the strongest head of the layer
    before ablated, ``ablated_head [later_layer]``. That head has the largest mean direct effect over its own
    top ``fraction`` of tokens; the sums run over these tokens, ``count [later_layer, prompt]`` of them.
    Rushing & Nanda 2024, §5.3.
    """

    name: ClassVar[str] = "earlier_input"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "ablation", "fraction")

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return (*needs_of_ablation(settings), "heads")

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        if model.n_layers < 2:
            raise NotMeasurable(
                f"{model.name} has one layer, which has no predecessor: give a model of at least two"
            )
        prompts = prompts_of_shard(inputs, shard)
        tokens = on_device(tokens_of(model, inputs, prompts), model.device)
        effects = inputs["heads"]["direct_effect"]
        ablated = [
            strongest_head(effects[layer].values, float(settings["fraction"]))
            for layer in range(model.n_layers - 1)
        ]
        chosen = np.stack([head.tokens[prompts] for head in ablated])
        sums = _sum_changes(
            model, tokens, head_replacement(model, settings, inputs), [head.head for head in ablated], chosen
        )
        changes = {name: (("later_layer", "head", "prompt"), values) for name, values in sums.items()}
        return xr.Dataset(
            {
                **changes,
                "count": (("later_layer", "prompt"), chosen.sum(-1, dtype=np.float64)),
                "ablated_head": ("later_layer", [head.head for head in ablated]),
            },
            {"prompt": prompts},
        )


MEASUREMENT = EarlierInput()


@dataclass(frozen=True)
class StrongestHead:
    """The strongest head of a layer, and the tokens where its direct effect is largest."""

    head: int
    tokens: Bool[np.ndarray, "prompt position"]


def strongest_head(effects: Float[np.ndarray, "head prompt position"], fraction: float) -> StrongestHead:
    """The head with the largest mean direct effect over its top ``fraction`` of tokens.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    tops = [select_top(head, fraction) for head in effects]
    head = int(np.argmax([values[top].mean() for values, top in zip(effects, tops, strict=True)]))
    return StrongestHead(head, tops[head])


@torch.no_grad()
def _sum_changes(
    model: Model,
    tokens: Tensor,
    replacement: Replacement,
    ablated_heads: Sequence[int],
    chosen: Bool[np.ndarray, "later_layer prompt position"],
) -> dict[str, Float[np.ndarray, "later_layer head prompt"]]:
    """``earlier`` and ``ablated`` of prompts whose second half holds the partners of the first."""
    replay = Replay(model, tokens.shape[1])
    shape = (model.n_layers - 1, model.n_heads, len(tokens))
    sums = {"earlier": np.zeros(shape), "ablated": np.zeros(shape)}
    for batch in partner_batches(len(tokens), pairs_at_once(model, tokens.shape[1])):
        reading = Reading(model, tokens[batch])
        for before, head in enumerate(ablated_heads):
            layer = before + 1
            own = reading.effects(layer, reading.clean.z[layer])
            here = torch.from_numpy(chosen[before][batch.numpy()]).to(own)[..., None]
            changed = {
                "earlier": attention_z(model, replay, layer, reading.clean.residuals[before]),
                "ablated": _z_without(reading, replay, replacement, before, head),
            }
            for name, z in changed.items():
                change = ((reading.effects(layer, z) - own) * here).sum(1)
                sums[name][before][:, batch.numpy()] = change.T.cpu().numpy()
    return sums


def _z_without(
    reading: Reading, replay: Replay, replacement: Replacement, layer: int, head: int
) -> Float[Tensor, "prompt position head d_head"]:
    """``z`` of the layer after ``layer`` when that lacks ``head``."""
    change = reading.change(layer, replacement)[:, :, head : head + 1]
    delta = reading.written(layer, change, head)
    run = partial(carry, reading.model, replay, reading.clean, layer, delta)
    return z_reached(reading.model, layer + 1, run)
