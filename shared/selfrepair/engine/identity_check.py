"""Refusing a model whose direct effects would not mean what they should."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from selfrepair.engine.direct_effect import FinalNorm, token_directions
from selfrepair.engine.forward import run_clean
from selfrepair.errors import UserError
from selfrepair.models.loading import Model
from selfrepair.models.support import check_context, check_window

#: Logits of this many positions of two prompts are enough to know the final norm and the unembedding.
IDENTITY_POSITIONS = 16


def check_tokens(model: Model, tokens: Int[Tensor, "prompt position"], source: str) -> None:
    """Refuses prompts that the model cannot be measured on; ``source`` is what they came from.

    Raises:
        UserError: an odd number of prompts, prompts that do not fit the model, or as :func:`check_identity`.
    """
    if len(tokens) < 2 or len(tokens) % 2:
        raise UserError(f"{source}: {len(tokens)} prompts; an even number of at least 2 is needed")
    check_context(model.context_length, tokens.shape[1], model.name)
    check_window(model.hf.config, tokens.shape[1], model.name)
    if tokens.max() >= model.W_U.shape[0]:
        raise UserError(
            f"{source}: token id {int(tokens.max())} is outside {model.name}'s vocabulary of "
            f"{model.W_U.shape[0]}"
        )
    check_identity(model, tokens[:2, :IDENTITY_POSITIONS])


@torch.no_grad()
def check_identity(model: Model, tokens: Int[Tensor, "prompt position"]) -> None:
    """Refuses a model whose final residual, read along the token directions, is not the centred logit.

    Raises:
        UserError: it is not, so that no direct effect would mean what it should, or weights are not finite.
    """
    tokens = tokens.to(model.device)
    logits = (
        model.hf(input_ids=tokens, use_cache=False)
        .logits[:, :-1]
        .to(torch.promote_types(model.dtype, torch.float32))
    )
    if not logits.isfinite().all():
        raise UserError(
            f"{model.name}: its logits are not finite; the weights are damaged or {model.dtype} is too "
            "narrow for them"
        )
    centred = logits - logits.mean(-1, keepdim=True)
    wanted = centred.gather(-1, tokens[:, 1:, None])[..., 0]
    direction, constant = token_directions(model, tokens)
    final = run_clean(model, tokens).final_residual[:, :-1].to(direction.dtype)
    read = (final * direction).sum(-1) / FinalNorm.of(model.final_norm).sigma(final) + constant
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    error = ((read - wanted).abs().max() / centred.abs().max()).item()
    if not error < tolerance:
        raise UserError(
            f"{model.name}: direct effects do not sum to the logits (relative error {error:.1e}); this model "
            "is not supported"
        )
