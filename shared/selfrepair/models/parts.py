"""Parts of a model: weights in one orientation, modules without hooks, norms with the maps that read them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class NormedMaps(NamedTuple):
    """A norm that reads the residual stream, and all linear maps that read the norm."""

    norm: nn.Module
    maps: list[nn.Module]


def weight_out_in(linear: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The weight of a linear map as ``nn.Linear`` has it; GPT-2's ``Conv1D`` has it transposed."""
    weight = cast(Tensor, linear.weight)
    return weight.T if isinstance(linear, Conv1D) else weight


def unhooked(bridge: TransformerBridge) -> tuple[PreTrainedModel, Callable[[nn.Module], nn.Module]]:
    """The model without TransformerLens' hooks, and a function from the bridge's components to its modules.

    It is a twin of what the bridge wraps: weights and buffers are shared, modules and configuration its own.
    Its attention is PyTorch's fused one where the architecture has it; the bridge's stays eager.
    """
    original = cast(PreTrainedModel, bridge.original_model.eval())
    twins: dict[int, nn.Module] = {}
    twin = cast(PreTrainedModel, _unhooked(original, twins))
    twin.config = copy.deepcopy(original.config)
    if twin._supports_sdpa:
        twin.config._attn_implementation = "sdpa"
    module: Any
    for module in twin.modules():
        if getattr(module, "config", None) is original.config:
            module.config = twin.config
    return twin, lambda component: twins[id(component.original_component)]


def _unhooked(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """The twin of a module; ``twins`` has all that were made, by the ``id`` of the original."""
    from transformer_lens.model_bridge.generalized_components import base  # not above: see load_model

    while isinstance(module, base.GeneralizedComponent):
        module = cast(nn.Module, module.original_component)
    if id(module) not in twins:
        twin = copy.copy(module)
        twin.__dict__.pop("forward", None)
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {
            name: child if child is None else _unhooked(child, twins)
            for name, child in module._modules.items()
        }
        twins[id(module)] = twin
    return twins[id(module)]


def first_maps(block: Any) -> list[NormedMaps]:
    """The norms of a bridge's block and the linear maps behind each; one norm may be for all."""
    attention, mlp = block.attn.submodules, block.mlp.submodules
    names = ("qkv",) if "qkv" in attention else ("q", "k", "v")
    to_attention = [attention[name] for name in names]
    to_mlp = [mlp[name] for name in ("in", "gate") if name in mlp]
    if "ln2" in block.submodules:
        return [NormedMaps(block.ln1, to_attention), NormedMaps(block.ln2, to_mlp)]
    return [NormedMaps(block.ln1, to_attention + to_mlp)]


def value_biases(bridge: TransformerBridge) -> list[Float[Tensor, "head d_head"]]:
    """By layer, the value bias of every head: zero where there is none, repeated where heads share values."""
    n_heads, hf = bridge.cfg.n_heads, cast(PreTrainedModel, bridge.original_model)
    biases = []
    for block in bridge.blocks:
        bias = block.attn.b_V
        if bias is None:
            bias = torch.zeros(n_heads, bridge.cfg.d_head, device=hf.device, dtype=hf.dtype)
        biases.append(bias.detach().repeat_interleave(n_heads // bias.shape[0], dim=0))
    return biases
