"""Do heads attend alike? Cosines between the attention patterns of every two heads of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.engine.forward import float32_residual
from selfrepair.engine.hooks import eager_attention, watching
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import pair_shards, prompts_of_shard, tokens_of
from selfrepair.models.devices import on_device

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Pairs of prompts that are run.
MOST_PAIRS = 32


class AttentionCosines(Measurement):
    """Cosines between what two heads attend to from the same token, means over a prompt's tokens.

    ``heads [any_head, other_head, prompt]``, in order of layer, then head. The first token, which can attend
    to itself alone, is left out, and so is the last.
    """

    name: ClassVar[str] = "attention_cosines"
    uses: ClassVar[tuple[str, ...]] = ("dtype",)

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings, MOST_PAIRS)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        prompts = prompts_of_shard(inputs, shard)
        tokens = on_device(tokens_of(model, inputs, prompts), model.device)
        cosines = torch.stack([_mean_cosines(model, prompt) for prompt in tokens], dim=-1)
        dims = ("any_head", "other_head", "prompt")
        return xr.Dataset({"heads": (dims, cosines.cpu().numpy())}, {"prompt": prompts})


MEASUREMENT = AttentionCosines()


@torch.no_grad()
def _mean_cosines(model: Model, prompt: Int[Tensor, " position"]) -> Float[Tensor, "any_head any_head"]:
    """Of all heads, mean over one prompt's tokens; NaN if it has only two."""
    patterns: list[Tensor] = []
    with (
        float32_residual(model),
        eager_attention(model.hf),
        watching(model.attentions, lambda _, __, output: patterns.append(output[1][0, :, 1:-1])),
    ):
        model.hf.base_model(input_ids=prompt[None], use_cache=False)
    wide = torch.cat(patterns).to(torch.promote_types(model.dtype, torch.float32))
    units = nn.functional.normalize(wide, dim=-1).flatten(1)
    return units @ units.T / wide.shape[1]
