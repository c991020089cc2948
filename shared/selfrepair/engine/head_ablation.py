"""One clean pass, and what every head's ablation does to it: the engine's hot path.

A head's ablation is carried through the blocks above it only, for all heads of a layer at once,
stacked along the batch; nothing the size of the vocabulary is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfrepair.engine.ablations import Replacement
from selfrepair.engine.batches import in_halves, pairs_at_once, partner_batches, rows_that_fit
from selfrepair.engine.fast.low_rank import FirstMaps
from selfrepair.engine.forward import Replay, carry
from selfrepair.engine.hooks import watching
from selfrepair.engine.reading import Reading
from selfrepair.errors import UserError
from selfrepair.models.devices import on_device, on_host, unless_out_of_memory
from selfrepair.models.loading import Model


@dataclass(frozen=True)
class HeadAblations:
    """Effects (logits) of ablating each head, and the final norm's scale then and in the clean run.

    The last position, which has no next token, is dropped. Those of one layer have no axis of layers.
    """

    direct_effect: Float[Tensor, "*layer head prompt read_position"]
    ablated_direct_effect: Float[Tensor, "*layer head prompt read_position"]
    logit_change: Float[Tensor, "*layer head prompt read_position"]
    self_repair_heads: Float[Tensor, "*layer head prompt read_position"]
    self_repair_mlps: Float[Tensor, "*layer head prompt read_position"]
    sigma_ablated: Float[Tensor, "*layer head prompt read_position"]
    sigma_clean: Float[Tensor, "prompt read_position"]


#: The fields of :class:`HeadAblations` that are of a layer.
OF_LAYERS = tuple(field.name for field in dataclasses.fields(HeadAblations) if field.name != "sigma_clean")


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
    Rushing & Nanda 2024, §2 and §3.

    Raises:
        torch.OutOfMemoryError: one head on these prompts is too much for the device.
    """
    rows = rows_that_fit(model, tokens.shape[1]) if rows is None else rows
    swept = _Layers(
        Reading(model, tokens), Replay(model, tokens.shape[1]), replacement, max(1, rows // len(tokens))
    )
    layers = range(model.n_layers) if layers is None else layers
    parts = [swept.ablate(layer) for layer in layers]
    stacked = {name: torch.stack([getattr(part, name) for part in parts]) for name in OF_LAYERS}
    return HeadAblations(**stacked, sigma_clean=swept.reading.sigma)


def ablate_pairs(
    model: Model, tokens: Int[Tensor, "prompt position"], replacement: Replacement
) -> HeadAblations:
    """The ablations of prompts whose second half holds the partners of the first, on the host.

    Raises:
        UserError: the device has too little memory for one pair of prompts.
    """
    pending = list(partner_batches(len(tokens), pairs_at_once(model, tokens.shape[1])))
    parts: list[HeadAblations] = []
    while pending:
        batch = pending.pop(0)
        part = unless_out_of_memory(partial(_ablate_batch, model, tokens[batch], replacement))
        if part is not None:
            parts.append(part)
        elif len(batch) > 2:
            halves = [members.tensor_split(2) for members in batch.chunk(2)]
            pending[:0] = [torch.cat(half) for half in zip(*halves, strict=True)]
        else:
            raise UserError(
                f"{model.name}: {model.device} has too little memory for one pair of prompts; "
                "use shorter prompts, --dtype bfloat16 or a larger device"
            )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return _joined(parts, torch.promote_types(torch.float32, model.dtype))


def _ablate_batch(
    model: Model, tokens: Int[Tensor, "prompt position"], replacement: Replacement
) -> HeadAblations:
    found = ablate_heads(model, on_device(tokens, model.device), replacement)
    return HeadAblations(**{name: on_host(values) for name, values in vars(found).items()})


def _joined(parts: Sequence[HeadAblations], dtype: torch.dtype) -> HeadAblations:
    """Batches of pairs, one after the other: all first members, then all partners."""
    joined = {}
    for field in dataclasses.fields(HeadAblations):
        values = [getattr(part, field.name) for part in parts]
        halves = [value.chunk(2, dim=-2) for value in values]
        joined[field.name] = torch.cat([half[i] for i in (0, 1) for half in halves], dim=-2).to(dtype)
    return HeadAblations(**joined)


@dataclass(frozen=True)
class _Ablated:
    """What the passes over the blocks above a layer find, by head ablated.

    ``heads`` is the change (logits) of what the heads above write, ``read`` that of ``u · r`` of the final
    residual stream ``r`` (not divided by σ), ``sigma`` the final norm's scale.
    """

    heads: Float[Tensor, "head prompt read_position"]
    read: Float[Tensor, "head prompt read_position"]
    sigma: Float[Tensor, "head prompt read_position"]

    @classmethod
    def empty(cls, n_heads: int, like: Float[Tensor, "prompt read_position"]) -> _Ablated:
        def one() -> Float[Tensor, "head prompt read_position"]:
            return like.new_empty(n_heads, *like.shape)

        return cls(heads=one(), read=one(), sigma=one())


class _Layers:
    """Ablates the heads of one layer after another, ``at_once`` in a pass, on the prompts that were read."""

    def __init__(self, reading: Reading, replay: Replay, replacement: Replacement, at_once: int):
        self.model, self.reading, self.replay = reading.model, reading, replay
        self.replacement, self.at_once = replacement, at_once
        self.attention_read = [reading.read(output) for output in reading.clean.attention_outputs]

    def ablate(self, layer: int) -> HeadAblations:
        """Those of one layer."""
        reading, sigma = self.reading, self.reading.sigma
        z = reading.clean.z[layer]
        both = torch.stack([values.to(reading.direction.dtype) for values in (z, self.replacement(layer, z))])
        change = both[1] - both[0]
        direct_effect, ablated_direct_effect = reading.effects(layer, both).movedim(-1, 1)
        ablated = self._run_above(layer, change)
        logit_change = (ablated.read + reading.final) / ablated.sigma - reading.final / sigma
        mlps = ablated.read / sigma - (ablated_direct_effect - direct_effect) - ablated.heads
        if self.model.parallel and layer == self.model.n_layers - 1:
            mlps.zero_()  # nothing is above; rounding would leave 1e-6
        unchanged = _unchanged(change)
        for values in (logit_change, ablated.heads, mlps):
            values[unchanged] = 0  # exactly, where rounding of differently stacked passes would leave 1e-7
        ablated.sigma[unchanged] = sigma
        return HeadAblations(
            direct_effect=direct_effect,
            ablated_direct_effect=ablated_direct_effect,
            logit_change=logit_change,
            self_repair_heads=ablated.heads,
            self_repair_mlps=mlps,
            sigma_ablated=ablated.sigma,
            sigma_clean=sigma,
        )

    def _run_above(self, layer: int, change: Float[Tensor, "prompt position head d_head"]) -> _Ablated:
        """Carries the ``change`` of each head's ``z`` through the blocks above."""
        model, reading = self.model, self.reading
        projections_above = model.output_projections[layer + 1 :]
        attention_above = sum(self.attention_read[layer + 1 :], torch.zeros_like(reading.final))
        found = _Ablated.empty(model.n_heads, reading.sigma)
        first_maps = FirstMaps.of(model, reading.clean, layer)

        def ablate(first: int, last: int) -> bool:
            """Fills in what ablating heads ``first`` to ``last`` does."""
            some = change[:, :, first:last]
            delta = reading.written(layer, some, first)
            above = torch.zeros_like(found.heads[first:last])
            given = nullcontext() if first_maps is None else first_maps.given(some, first)
            with given, watching(projections_above, lambda _, __, output: _add(above, reading.read, output)):
                final = carry(model, self.replay, reading.clean, layer, delta)
            found.heads[first:last] = (above - attention_above) / reading.sigma
            found.read[first:last] = reading.read(final) - reading.final
            found.sigma[first:last] = reading.norm.sigma(final[..., :-1, :])
            return True

        in_halves(ablate, model.n_heads, self.at_once)
        return found


def _unchanged(change: Float[Tensor, "prompt position head d_head"]) -> Bool[Tensor, " head"]:
    """The heads whose ablation changes nothing anywhere."""
    return ~change.flatten(3).ne(0).any(-1).any(0).any(0)


def _add(
    total: Float[Tensor, "variant prompt read_position"], read: Callable[[Tensor], Tensor], output: Tensor
) -> None:
    total += read(output.unflatten(0, total.shape[:2]))
