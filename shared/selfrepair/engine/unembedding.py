"""From a final residual stream to logits, and to the next token's loss."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.engine.forward import float32_residual
from selfrepair.models.loading import Model


def unembed(model: Model, final: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocabulary"]:
    """Logits (not centred, in float32 or better) of final residual streams, final norm included."""
    with float32_residual(model):
        logits = model.hf.get_output_embeddings()(model.final_norm(final))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_token_losses(
    model: Model,
    final: Float[Tensor, "*variant prompt position d_model"],
    tokens: Int[Tensor, "prompt position"],
) -> Float[Tensor, "*variant prompt position-1"]:
    """Negative log-probability (nats) of each next token where ``final`` is the final residual stream."""
    logits = unembed(model, final[..., :-1, :])
    correct = tokens[:, 1:].expand(logits.shape[:-1])
    losses = nn.functional.cross_entropy(logits.flatten(0, -2), correct.flatten(), reduction="none")
    return losses.view(correct.shape)
