"""Every head of a model ablated on every prompt: the suite's main measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from selfrepair.engine.ablations import Replacement
from selfrepair.engine.batches import pairs_that_fit, partner_batches, rows_that_fit
from selfrepair.engine.head_ablation import HeadAblations, ablate_heads
from selfrepair.errors import UserError
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import (
    head_replacement,
    needs_of_ablation,
    pair_shards,
    prompts_of_shard,
    tokens_of,
)
from selfrepair.models.devices import on_device, on_host, unless_out_of_memory

if TYPE_CHECKING:
    from selfrepair.models.loading import Model


class Heads(Measurement):
    """What :class:`~selfrepair.engine.head_ablation.HeadAblations` holds (logits).

    ``[layer, head, prompt, position]``; beside them ``sigma_clean [prompt, position]`` and
    ``token [prompt, token_position]``. Rushing & Nanda 2024, §2 and §3.
    """

    name: ClassVar[str] = "heads"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "ablation")
    every_ablation: ClassVar[bool] = True

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return needs_of_ablation(settings)

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        prompts = prompts_of_shard(inputs, shard)
        tokens = tokens_of(model, inputs, prompts)
        found = ablate_pairs(model, tokens, head_replacement(model, settings, inputs))
        if not all(values.isfinite().all() for values in vars(found).values()):
            raise UserError(
                f"{model.name}: some effects are not finite; the weights are damaged or {model.dtype} "
                f"is too narrow for them"
            )
        dims = ("layer", "head", "prompt", "position")
        variables = {name: (dims[-values.ndim :], values.numpy()) for name, values in vars(found).items()}
        variables["token"] = (("prompt", "token_position"), tokens.numpy())
        n_prompts = inputs["tokens"].sizes["prompt"]
        coords = {
            "prompt": prompts,
            "donor": ("prompt", (prompts + n_prompts // 2) % n_prompts),
            "position": np.arange(tokens.shape[1] - 1),
        }
        return xr.Dataset(variables, coords, {"corpus": str(inputs["tokens"].attrs["corpus"])})


MEASUREMENT = Heads()


def ablate_pairs(
    model: Model, tokens: Int[Tensor, "prompt position"], replacement: Replacement
) -> HeadAblations:
    """The ablations of prompts whose second half holds the partners of the first, on the host.

    Raises:
        UserError: the device has too little memory for one pair of prompts.
    """
    length = tokens.shape[1]
    at_once = max(1, min(rows_that_fit(model, length) // 2, pairs_that_fit(model, length)))
    pending = list(partner_batches(len(tokens), at_once))
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
        axis = values[0].ndim - 2
        halves = [value.chunk(2, dim=axis) for value in values]
        joined[field.name] = torch.cat([half[i] for i in (0, 1) for half in halves], dim=axis).to(dtype)
    return HeadAblations(**joined)
