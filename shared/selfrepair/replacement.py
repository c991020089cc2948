"""What takes the place of a head's ``z``, and the batches in which every prompt meets its donor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfrepair.choices import ABLATIONS
from selfrepair.errors import UserError
from selfrepair.models import Model
from selfrepair.replay import run_clean

CLEAN_RUN_BYTES = 1 << 30

#: ``(layer, z) → z`` of the same shape ``[prompt, position, head, d_head]`` to put in its place.
Replacement = Callable[[int, Tensor], Tensor]


def replacement_for(ablation: str, model: Model, means: list[Float[Tensor, "head d_head"]] | None) -> Replacement:
    """The replacement for a batch whose second half holds the partners of its first; ``mean`` needs :func:`mean_z`.

    Raises:
        UserError: unknown ablation.
    """
    match ablation:
        case "resample":
            return lambda layer, z: z.roll(z.shape[0] // 2, dims=0)
        case "mean":
            return lambda layer, z: means[layer].to(z.dtype).expand_as(z)
        case "zero":
            return lambda layer, z: model.value_biases[layer].expand_as(z)
    raise UserError(f"unknown ablation '{ablation}'; known are {', '.join(ABLATIONS)}")


def partner_batches(n_prompts: int, pairs_at_once: int) -> Iterator[Int[Tensor, " prompt"]]:
    """Indices of all prompts in batches that hold prompts ``i`` and, in the same order after them, ``i + n_prompts/2``."""
    half = n_prompts // 2
    for batch in torch.arange(half).split(pairs_at_once):
        yield torch.cat([batch, batch + half])


def pairs_that_fit(model: Model, prompt_len: int) -> int:
    """Pairs of prompts whose clean runs take no more than a gibibyte."""
    one_prompt = 3 * model.n_layers * prompt_len * model.hf.config.hidden_size * model.dtype.itemsize
    return max(1, CLEAN_RUN_BYTES // (2 * one_prompt))


@torch.no_grad()
def mean_z(model: Model, tokens: Int[Tensor, "prompt position"]) -> list[Float[Tensor, "head d_head"]]:
    """Mean of every layer's ``z`` over all prompts and positions, in float64."""
    total: list[Tensor] = []
    for batch in tokens.split(2 * pairs_that_fit(model, tokens.shape[1])):
        sums = [z.double().sum((0, 1)) for z in run_clean(model, batch).z]
        total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
    return [z / tokens.numel() for z in total]
