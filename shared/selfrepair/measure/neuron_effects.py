"""Every neuron of the MLPs after a head, read on some tokens, before and after the head is ablated.

Neuron ``n`` of an MLP writes ``act_n W_out[n]``: its direct effect is ``DE_n = act_n (W_out[n] · u) /
σ_clean``, its self-repair the change of that when a head is ablated. Rushing & Nanda 2024, §4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfrepair.engine.ablations import Replacement
from selfrepair.engine.batches import pairs_at_once, partner_batches
from selfrepair.engine.forward import Replay, carry
from selfrepair.engine.hooks import watching
from selfrepair.engine.reading import Reading
from selfrepair.errors import UserError
from selfrepair.models.loading import Model
from selfrepair.statistics import Head

#: Tokens × neurons are held for so many tokens at a time.
TOKENS_AT_ONCE = 1024
#: What is held of a batch is as large as so many clean runs: its neurons are four times as wide as its heads.
CLEAN_RUNS = 3


def first_later_mlp(model: Model, layer: int) -> int:
    """First MLP that sees what the heads of ``layer`` write: their own block's, unless it runs beside them.

    Raises:
        UserError: there is none.
    """
    first = layer + 1 if model.parallel else layer
    if not 0 <= layer < model.n_layers or first >= model.n_layers:
        raise UserError(
            f"{model.name}: no MLP comes after the heads of layer {layer}; "
            f"choose a layer from 0 to {last_layer(model)}"
        )
    return first


def last_layer(model: Model) -> int:
    """Last layer whose heads have an MLP after them; −1 if there is none."""
    return model.n_layers - (2 if model.parallel else 1)


class Combination(NamedTuple):
    """An ablated head and one of the MLPs after it."""

    layer: int
    head: int
    mlp: int


@dataclass(frozen=True)
class NeuronEffects:
    """Direct effects (logits) of every neuron of an MLP on some tokens: clean, and how they change."""

    of: Combination
    prompt: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    clean: Float[Tensor, "token neuron"]
    change: Float[Tensor, "token neuron"]


def neuron_effects(
    model: Model,
    tokens: Int[Tensor, "prompt token_position"],
    replacement: Replacement,
    selected: Mapping[Head, Bool[np.ndarray, "prompt token_position-1"]],
) -> Iterator[NeuronEffects]:
    """Ablates each head of ``selected`` in turn; gives all neurons of all later MLPs on its selected tokens.

    The two halves of the prompts are each other's donors. Only selected tokens are taken from a pass, and no
    more than ``TOKENS_AT_ONCE`` of them with all neurons at a time.

    Raises:
        UserError: a head without a later MLP.
    """
    for layer, _ in selected:
        first_later_mlp(model, layer)
    tokens = tokens.to(model.device)
    replay = Replay(model, tokens.shape[1])
    for batch in partner_batches(len(tokens), pairs_at_once(model, tokens.shape[1], CLEAN_RUNS)):
        masks = {head: torch.from_numpy(of[batch.numpy()]).to(model.device) for head, of in selected.items()}
        yield from _effects_in_batch(model, replay, tokens, batch.to(model.device), replacement, masks)


def _effects_in_batch(
    model: Model,
    replay: Replay,
    tokens: Int[Tensor, "prompt token_position"],
    batch: Int[Tensor, " batch"],
    replacement: Replacement,
    masks: Mapping[Head, Bool[Tensor, "batch token_position-1"]],
) -> Iterator[NeuronEffects]:
    """Those of one batch of partners."""
    wanted = torch.stack(list(masks.values())).any(0)
    seen: dict[int, Tensor] = {}
    with watching(
        model.mlp_output_projections,
        lambda mlp, activations, _: seen.update({mlp: _taken(activations, wanted)}),
    ):
        reading = Reading(model, tokens[batch])
    for head, mask in masks.items():
        if not mask.any():
            continue
        prompt, position = mask.nonzero(as_tuple=True)
        for mlp, after in _ablated_activations(reading, replay, replacement, head, mask).items():
            before = seen[mlp][mask[wanted]]
            for part in torch.arange(len(prompt), device=mask.device).split(TOKENS_AT_ONCE):
                here = prompt[part], position[part]
                scaled = reading.scaled_direction[here]
                effects = _read_neurons(scaled, model.W_out(mlp), before[part], after[part])
                yield NeuronEffects(Combination(*head, mlp), batch[here[0]], here[1], *effects)


@torch.no_grad()
def _ablated_activations(
    reading: Reading,
    replay: Replay,
    replacement: Replacement,
    head: Head,
    mask: Bool[Tensor, "prompt read_position"],
) -> dict[int, Float[Tensor, "token neuron"]]:
    """Activations of the masked tokens in every MLP after ``head`` when it is ablated."""
    model, (layer, number) = reading.model, head
    first = first_later_mlp(model, layer)
    found: dict[int, Tensor] = {}
    change = reading.change(layer, replacement)[:, :, number : number + 1]
    with watching(
        model.mlp_output_projections[first:],
        lambda i, activations, _: found.update({first + i: _taken(activations, mask)}),
    ):
        carry(model, replay, reading.clean, layer, reading.written(layer, change, number))
    return found


@torch.no_grad()
def _read_neurons(
    scaled_direction: Float[Tensor, "token d_model"],
    W_out: Float[Tensor, "neuron d_model"],
    clean: Float[Tensor, "token neuron"],
    ablated: Float[Tensor, "token neuron"],
) -> tuple[Float[Tensor, "token neuron"], Float[Tensor, "token neuron"]]:
    """Direct effects of clean activations, and their change; ``scaled_direction`` is ``u / σ_clean``."""
    along = scaled_direction @ W_out.to(scaled_direction.dtype).T
    return clean.to(along.dtype) * along, (ablated - clean).to(along.dtype) * along


def _taken(
    activations: Float[Tensor, "*batch neuron"], mask: Bool[Tensor, "prompt read_position"]
) -> Float[Tensor, "token neuron"]:
    """The masked tokens of a batch, which some architectures have flattened to one dimension."""
    return activations.flatten(0, -2)[nn.functional.pad(mask, (0, 1)).flatten()]
