"""The constants with which a model's loss is least: what optimal ablation puts in the place of activations.

Li & Janson 2024 (arXiv 2409.09951). Only the blocks above what is ablated run, with gradients recorded; all
heads of a layer side by side, each ablated by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.engine.forward import CleanRun, Replay, float32_residual
from selfrepair.models.loading import Model

if TYPE_CHECKING:
    from selfrepair.engine.ablations import Site

#: Steps of Adam, and prompts that each of them sees.
N_STEPS, PROMPTS_A_STEP = 24, 1
#: Prompts of which every step has its own.
N_PROMPTS = N_STEPS * PROMPTS_A_STEP
#: Size of Adam's first step, in standard deviations of what is replaced; it falls linearly to 0.
FIRST_STEP = 0.15
#: Adam's ε, in nats per standard deviation: of gradients that are smaller, rounding would decide the step.
EPSILON = 1e-5
#: Parts times prompts in one pass: logits of the whole vocabulary are held for so many.
ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Prepared:
    """Prompts, their clean run, and how to run blocks for them again."""

    tokens: Int[Tensor, "prompt position"]
    clean: CleanRun
    replay: Replay

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, tokens: Int[Tensor, "prompt position"], site: Site) -> Prepared:
        return cls(tokens, site.clean(model, tokens), Replay(model, tokens.shape[1]))


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
        here = Prepared.of(model, few[chosen], site)
        for place, theta in enumerate(moved):
            values = first[place] + spread[place] * theta
            theta.grad = spread[place] * loss_gradient(model, site, here, place, values)[1]
        for group in adam.param_groups:
            group["lr"] = FIRST_STEP * (1 - step / N_STEPS)
        adam.step()
    found = [values + width * theta for values, width, theta in zip(first, spread, moved, strict=True)]
    return [values.view(own.shape) for values, own in zip(found, start, strict=True)]


def loss_gradient(
    model: Model, site: Site, here: Prepared, place: int, values: Float[Tensor, "part width"]
) -> tuple[Float[Tensor, " part"], Float[Tensor, "part width"]]:
    """Mean next-token loss (nats) with each part's constant in its place, and the loss' gradient by it."""
    losses, gradients = [], []
    at_once = max(1, ROWS_AT_ONCE // len(here.tokens))
    for first in range(0, len(values), at_once):
        with torch.enable_grad():
            some = values[first : first + at_once].detach().requires_grad_()
            final = site.carried(model, here.replay, here.clean, place, first, some)
            loss = next_token_loss(model, final, here.tokens)
            (gradient,) = torch.autograd.grad(loss.sum(), some)
        losses.append(loss.detach())
        gradients.append(gradient)
    return torch.cat(losses), torch.cat(gradients)


def next_token_loss(
    model: Model,
    final: Float[Tensor, "part prompt position d_model"],
    tokens: Int[Tensor, "prompt position"],
) -> Float[Tensor, " part"]:
    """Mean over prompts and positions of the next token's negative log-probability (nats)."""
    with float32_residual(model):
        logits = model.hf.get_output_embeddings()(model.final_norm(final[..., :-1, :]))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    correct = tokens[:, 1:].expand(*final.shape[:2], -1).flatten()
    return nn.functional.cross_entropy(logits, correct, reduction="none").view(len(final), -1).mean(1)


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
