"""Measurements on prompts that are each other's donors: shards of pairs, and what such a shard holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from selfrepair.engine.ablations import Constants, Replacement, find_ablation
from selfrepair.engine.identity_check import check_tokens
from selfrepair.engine.sites import HEADS
from selfrepair.measure.measurement import Inputs, Settings

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Pairs of prompts in a shard.
SHARD_PAIRS = 16


def pair_shards(settings: Settings, most: int | None = None) -> Sequence[int]:
    """The first pair of every shard; pair ``i`` of ``N`` prompts is of ``i`` and ``i + N / 2``.

    Only shards that begin before pair ``most``, if it is given.
    """
    n_pairs = int(settings["n_prompts"]) // 2
    return range(0, n_pairs if most is None else min(n_pairs, most), SHARD_PAIRS)


def prompts_of_shard(inputs: Inputs, shard: int) -> Int[np.ndarray, " prompt"]:
    """Numbers of a shard's prompts: the first members of its pairs, then their partners."""
    half = inputs["tokens"].sizes["prompt"] // 2
    first = np.arange(shard, min(shard + SHARD_PAIRS, half))
    return np.concatenate([first, first + half])


def tokens_of(
    model: Model, inputs: Inputs, prompts: Int[np.ndarray, " prompt"]
) -> Int[Tensor, "prompt position"]:
    """Tokens of some prompts, on the host.

    Raises:
        UserError: the prompts as a whole cannot be measured, or the model cannot.
    """
    everything = torch.from_numpy(inputs["tokens"]["token"].values)
    check_tokens(model, everything, str(inputs["tokens"].attrs["corpus"]))
    return everything[prompts]


def head_replacement(model: Model, settings: Settings, inputs: Inputs) -> Replacement:
    """What the settings' ablation puts in the place of heads; what it learnt of all prompts is an input."""
    ablation = find_ablation(str(settings["ablation"]))
    if not ablation.is_fitted:
        return ablation.prepare(model, [], HEADS)
    values = torch.from_numpy(inputs["constants"]["z"].values).to(model.device)
    return Constants(list(values))


def needs_of_ablation(settings: Settings) -> tuple[str, ...]:
    """What measurements with heads ablated need."""
    return ("tokens", "constants") if find_ablation(str(settings["ablation"])).is_fitted else ("tokens",)
