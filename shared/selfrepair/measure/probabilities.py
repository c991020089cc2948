"""How likely a model finds each position's correct next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import pair_shards, prompts_of_shard, tokens_of

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

LOGIT_BYTES = 1 << 28


class Probabilities(Measurement):
    """``probability [prompt, position]`` of the correct next token in the clean model."""

    name: ClassVar[str] = "probabilities"
    uses: ClassVar[tuple[str, ...]] = ("dtype",)

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        prompts = prompts_of_shard(inputs, shard)
        probability = correct_probability(model, tokens_of(model, inputs, prompts))
        return xr.Dataset({"probability": (("prompt", "position"), probability.numpy())}, {"prompt": prompts})


MEASUREMENT = Probabilities()


@torch.no_grad()
def correct_probability(
    model: Model, tokens: Int[Tensor, "prompt token"]
) -> Float[Tensor, "prompt position"]:
    """Clean probability of each position's correct next token.

    Logits of the whole vocabulary are held for a few prompts at a time.
    """
    one_prompt = tokens.shape[1] * model.W_U.shape[0] * 4
    parts = []
    for batch in tokens.split(max(1, LOGIT_BYTES // one_prompt)):
        batch = batch.to(model.device)
        logits = model.hf(input_ids=batch, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        correct = logits.gather(-1, batch[:, 1:, None])[..., 0]
        parts.append((correct - logits.logsumexp(-1)).exp().cpu())
    return torch.cat(parts)
