"""The floating-point operations that the scheme needs, whoever does them."""

from __future__ import annotations

from collections.abc import Collection

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from selfrepair.models.loading import Model
from selfrepair.models.parts import weight_out_in


def needed_flops(model: Model, n_prompts: int, length: int, layers: Collection[int], low_rank: bool) -> int:
    """Floating-point operations of matrix products for ablating every head of ``layers`` on a batch.

    Clean pass; for each head the blocks above its own and, in a sequential model, its own block's MLP;
    the heads' writes ``z W_O`` and directions ``u W_Oᵀ``. Scores and values of attention are counted in
    full, their causal half not taken off. Elementwise work counts as nothing.

    With ``low_rank``, the maps that are the first to read the residual stream after an ablation act on a
    change of rank ``d_head`` wherever that is less work: with ``d_head`` columns instead of ``d_model``, and
    once per head the product of its ``W_O`` with the map.
    """
    tokens = n_prompts * length
    n_heads, d_head, d_model = model.W_O(0).shape
    width = n_heads * d_head
    in_block = sum(weight.numel() for weight in matrices(model.blocks[0]))
    in_mlp = in_block - sum(weight.numel() for weight in matrices(model.attentions[0]))
    block = 2 * in_block * tokens + 4 * length * length * width * n_prompts
    blocks_above = n_heads * sum(model.n_layers - 1 - layer for layer in layers)
    own_mlps = 0 if model.parallel else n_heads * len(layers)
    projections = len(layers) * 2 * width * d_model * (tokens + n_prompts * (length - 1))
    total = (model.n_layers + blocks_above) * block + own_mlps * 2 * in_mlp * tokens + projections
    if low_rank:
        read = n_heads * sum(layer + 1 < model.n_layers for layer in layers) if model.parallel else own_mlps
        total -= read * 2 * first_outputs(model) * max(0, tokens * (d_model - d_head) - d_head * d_model)
    return total


def first_outputs(model: Model) -> int:
    """Outputs, together, of the maps that are the first to read an ablation.

    In a sequential model these are the MLP's in the head's own block, in a parallel one the attention's and
    the MLP's in the next.
    """
    norms = model.first_maps[0] if model.parallel else model.first_maps[0][1:]
    return sum(weight_out_in(linear).shape[0] for normed in norms for linear in normed.maps)


def matrices(module: nn.Module) -> list[Float[Tensor, "d_in d_out"]]:
    """The weight matrices inside ``module``, as right factors, in the layout in which it uses them."""
    return [
        weight_out_in(part).detach().T for part in module.modules() if isinstance(part, Conv1D | nn.Linear)
    ]
