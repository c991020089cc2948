"""The constants with which a model's loss is least: what optimal ablation puts in the place of activations.

Li & Janson 2024 (arXiv 2409.09951). What a constant costs is :meth:`Site.loss_gradient`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from selfrepair.engine.ablations import Site
    from selfrepair.models.loading import Model

#: Steps of Adam, and prompts that each of them sees.
N_STEPS, PROMPTS_A_STEP = 24, 1
#: Prompts of which every step has its own.
N_PROMPTS = N_STEPS * PROMPTS_A_STEP
#: Size of Adam's first step, in standard deviations of what is replaced; it falls linearly to 0.
FIRST_STEP = 0.15
#: Adam's ε, in nats per standard deviation: of gradients that are smaller, rounding would decide the step.
EPSILON = 1e-5


def least_loss(
    model: Model,
    batches: Sequence[Int[Tensor, "_ _"]],
    site: Site,
    start: Sequence[Float[Tensor, "*what"]],
) -> list[Float[Tensor, "*what"]]:
    """By place, constants near those that minimise the mean next-token loss on the prompts of ``batches``.

    Each part of a place (a head of a layer) has its own, found with all else as in the clean run: by
    ``N_STEPS`` steps of Adam from ``start``, ``PROMPTS_A_STEP`` prompts each, in an order drawn from a fixed
    seed.
    """
    few = [part for tokens in batches for part in tokens.to(model.device).split(PROMPTS_A_STEP)]
    order = torch.randperm(len(few), generator=torch.Generator().manual_seed(0)).tolist()
    dtype = torch.promote_types(torch.float32, model.dtype)
    first = [values.to(dtype).reshape(-1, values.shape[-1]) for values in start]
    spread = _spread(model, batches, site, first)
    moved = [torch.zeros_like(values) for values in first]
    adam = torch.optim.Adam(moved, lr=FIRST_STEP, eps=EPSILON)
    for step, chosen in enumerate(itertools.islice(itertools.cycle(order), N_STEPS)):
        here = site.prepared(model, few[chosen])
        for place, theta in enumerate(moved):
            values = first[place] + spread[place] * theta
            theta.grad = spread[place] * site.loss_gradient(model, here, place, values)[1]
        for group in adam.param_groups:
            group["lr"] = FIRST_STEP * (1 - step / N_STEPS)
        adam.step()
    found = [values + width * theta for values, width, theta in zip(first, spread, moved, strict=True)]
    return [values.view(own.shape) for values, own in zip(found, start, strict=True)]


def _spread(
    model: Model,
    batches: Sequence[Int[Tensor, "_ _"]],
    site: Site,
    centre: Sequence[Float[Tensor, "part width"]],
) -> list[Float[Tensor, "part 1"]]:
    """Of each part, the root mean square distance of its activations from ``centre``, over its width too."""
    totals = [torch.zeros(len(values), 1, dtype=torch.float64, device=values.device) for values in centre]
    n_tokens = 0
    for tokens in batches:
        n_tokens += tokens.numel()
        for total, values, activation in zip(
            totals, centre, site.activations(model, tokens.to(model.device)), strict=True
        ):
            away = activation.unflatten(-1, (1, -1)) if activation.ndim == 3 else activation
            total += (away.double() - values.double()).square().mean(-1, keepdim=True).sum((0, 1))
    return [(total / n_tokens).sqrt().to(values.dtype) for total, values in zip(totals, centre, strict=True)]
