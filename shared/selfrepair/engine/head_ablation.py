"""One clean pass, and what every head's ablation does to it: the engine's hot path.

A head's ablation is carried through the blocks above it only, for all heads of a layer at once,
stacked along the batch; nothing the size of the vocabulary is made.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.models.devices import unless_out_of_memory
from selfrepair.engine.direct_effect import FinalNorm, token_directions
from selfrepair.engine.fast.low_rank import FirstMaps
from selfrepair.models.loading import Model
from selfrepair.engine.ablations import Replacement
from selfrepair.engine.batches import rows_that_fit
from selfrepair.engine.forward import Replay, carry, run_clean, watching


@dataclass(frozen=True)
class HeadAblations:
    """Effects of ablating each head of the layers swept, in logits; definitions in the design's terms.

    All but ``sigma_clean`` (``[prompt, position]``) are ``[layer, head, prompt, position]``; the last
    position, which has no next token, is dropped.
    """

    direct_effect: Tensor
    ablated_direct_effect: Tensor
    logit_change: Tensor
    self_repair_heads: Tensor
    self_repair_mlps: Tensor
    sigma_ablated: Tensor
    sigma_clean: Tensor


@torch.no_grad()
def ablate_heads(
    model: Model,
    tokens: Int[Tensor, "prompt position"],
    replacement: Replacement,
    layers: range | None = None,
    rows: int | None = None,
) -> HeadAblations:
    """Ablates every head of ``layers`` (all), one at a time, on every prompt at all positions.

    ``rows`` bounds the prompts × heads in one pass, and with it the memory; by default what the caches
    of a CPU or the free memory of a GPU hold. A pass that runs out of memory is done again in halves.
    Rushing & Nanda 2024, §2 and §4.

    Raises:
        torch.OutOfMemoryError: one head on these prompts is too much for the device.
    """
    rows = rows_that_fit(model, tokens.shape[1]) if rows is None else rows
    prompts = _Prompts(model, tokens)
    parts = [_ablate_layer(model, prompts, replacement, layer, rows) for layer in (range(model.n_layers) if layers is None else layers)]
    return HeadAblations(*map(torch.stack, zip(*parts, strict=True)), prompts.sigma)


class _Prompts:
    """What the clean pass over a batch says, and how to read a residual stream there."""

    def __init__(self, model: Model, tokens: Int[Tensor, "prompt position"]):
        self.clean = run_clean(model, tokens)
        self.replay = Replay(model, tokens.shape[1])
        self.norm = FinalNorm.of(model.final_norm)
        self.direction, _ = token_directions(model, tokens)
        self._padded = nn.functional.pad(self.direction, (0, 0, 0, 1))
        self.sigma = self.norm.sigma(self.clean.final_residual[:, :-1])
        self.final = self.read(self.clean.final_residual)
        self.attention = [self.read(output) for output in self.clean.attention_outputs]

    def read(self, residual: Float[Tensor, "*variant prompt position d_model"]) -> Float[Tensor, "*variant prompt position-1"]:
        """``u · r``, not divided by σ."""
        return torch.linalg.vecdot(residual.to(self.direction.dtype), self._padded)[..., :-1]


def _ablate_layer(
    model: Model, prompts: _Prompts, replacement: Replacement, layer: int, rows: int
) -> tuple[Float[Tensor, "head prompt read_position"], ...]:
    """The fields of :class:`HeadAblations`, in their order, for one layer."""
    clean, direction, sigma = prompts.clean, prompts.direction, prompts.sigma
    replaced = replacement(layer, clean.z[layer])
    z, replaced, bias, W_O = (x.to(direction.dtype) for x in (clean.z[layer], replaced, model.value_biases[layer], model.W_O(layer)))
    along = torch.einsum("pkd,hed->pkhe", direction, W_O)  # u W_Oᵀ, per head
    effect, ablated_effect = (torch.einsum("pkhe,pkhe->hpk", (x - bias)[:, :-1], along) / sigma for x in (z, replaced))
    change = replaced - z
    first_maps = FirstMaps(model, clean, layer) if FirstMaps.pay(model, layer) else None
    attention_above = sum(prompts.attention[layer + 1 :], torch.zeros_like(prompts.final))
    logits, sigmas, heads, reads = (torch.empty_like(effect) for _ in range(4))

    def ablate(first: int, last: int) -> bool:
        """Writes what ablating heads ``first`` to ``last`` does into the tensors above."""
        delta = torch.einsum("pkhe,hed->hpkd", change[:, :, first:last], W_O[first:last])
        downstream = torch.zeros_like(heads[first:last])
        given = nullcontext() if first_maps is None else first_maps.given(change[:, :, first:last], first)
        with given, watching(model.output_projections[layer + 1 :], lambda _, __, output: _add(downstream, prompts.read, output)):
            final = carry(model, prompts.replay, clean, layer, delta)
        heads[first:last] = (downstream - attention_above) / sigma
        reads[first:last] = prompts.read(final) - prompts.final
        sigmas[first:last] = prompts.norm.sigma(final[..., :-1, :])
        logits[first:last] = (reads[first:last] + prompts.final) / sigmas[first:last] - prompts.final / sigma
        return True

    _in_halves(ablate, model.n_heads, max(1, rows // len(z)))
    unchanged = ~change.flatten(3).ne(0).any(-1).any(0).any(0)
    mlps = reads / sigma - (ablated_effect - effect) - heads
    if model.parallel and layer == model.n_layers - 1:
        mlps.zero_()  # nothing is above; rounding would leave 1e-6
    for tensor in (logits, heads, mlps):
        tensor[unchanged] = 0  # exactly, where rounding of differently stacked passes would leave 1e-7
    sigmas[unchanged] = sigma
    return effect, ablated_effect, logits, heads, mlps, sigmas


def _in_halves(work: Callable[[int, int], bool], n: int, at_once: int) -> None:
    """``work(first, last)`` on ranges that cover ``n``; one for which the device's memory is too small is done in halves."""
    pending = [(first, min(first + at_once, n)) for first in range(0, n, at_once)]
    while pending:
        first, last = pending.pop(0)
        if unless_out_of_memory(partial(work, first, last)):
            continue
        if last - first == 1:
            raise torch.OutOfMemoryError("one head on one batch of prompts is too much")
        middle = (first + last) // 2
        pending[:0] = [(first, middle), (middle, last)]


def _add(total: Float[Tensor, "variant prompt read_position"], read: Callable[[Tensor], Tensor], output: Tensor) -> None:
    total += read(output.unflatten(0, total.shape[:2]))
