"""Direct effects: what is written, read along the correct token's direction through the frozen final norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.models.loading import Model


@dataclass(frozen=True)
class FinalNorm:
    """``Norm(r) = γ ⊙ (r − mean(r)) / σ(r) + β``, or RMSNorm, which has no mean and no β."""

    gamma: Float[Tensor, " d_model"]
    beta: Float[Tensor, " d_model"] | None
    epsilon: float
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module) -> FinalNorm:
        if isinstance(norm, nn.LayerNorm):
            return cls(
                norm.weight.detach(), None if norm.bias is None else norm.bias.detach(), norm.eps, True
            )
        rms_norm: Any = norm  # each architecture has a class of its own
        return cls(rms_norm.weight.detach(), None, rms_norm.variance_epsilon, False)

    def sigma(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """``sqrt(var + ε)`` for LayerNorm, ``sqrt(mean square + ε)`` for RMSNorm, in float32 or better."""
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        if self.centred:
            return torch.native_layer_norm(residual, residual.shape[-1:], None, None, self.epsilon)[2][
                ..., 0
            ].reciprocal()  # quicker than var
        return (residual.square().mean(-1) + self.epsilon).sqrt()


def token_directions(
    model: Model, tokens: Int[Tensor, "prompt position"]
) -> tuple[Float[Tensor, "prompt position-1 d_model"], Float[Tensor, "prompt position-1"]]:
    """Direction ``u`` of each correct next token and the part of its logit that no component changes.

    ``u = γ ⊙ (W_U[:, t] − mean_v W_U[:, v])``, with its mean over ``d_model`` removed for LayerNorm,
    so that ``u · r / σ(r)`` plus the second result, ``β · (W_U[:, t] − mean_v W_U[:, v])`` and the
    centred unembedding bias, is the centred logit of ``t = tokens[:, k + 1]`` (in float32 or better).
    """
    norm = FinalNorm.of(model.final_norm)
    work = torch.promote_types(model.dtype, torch.float32)
    centre = model.W_U.mean(0, dtype=work)
    correct = tokens[:, 1:]
    unembedded = model.W_U[correct].to(work) - centre
    direction = norm.gamma.to(work) * unembedded
    if norm.centred:
        direction = direction - direction.mean(-1, keepdim=True)
    constant = torch.zeros(correct.shape, dtype=work, device=correct.device)
    if norm.beta is not None:
        constant = constant + unembedded @ norm.beta.to(work)
    if model.b_U is not None:
        constant = constant + (model.b_U[correct].to(work) - model.b_U.mean(dtype=work))
    return direction, constant
