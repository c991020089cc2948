"""Faster ways to compute what a model's modules compute, for float32 on a CPU.

PyTorch hands float32 matrix products to MKL, which leaves AMD processors' AVX-512 unused; oneDNN, which
PyTorch also ships and uses for narrower types, is about twice as fast there and computes GELU on the way.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

#: Activation modules that are exactly GELU, and the name of the formula.
GELUS: dict[type[nn.Module], str] = {GELUActivation: "none", NewGELUActivation: "tanh", GELUTanh: "tanh"}
#: The first linear map and the activation after it, by the names that Hugging Face gives them in one module.
MLP_PARTS = (("c_fc", "act"), ("dense_h_to_4h", "act"))


def use_fast_kernels(module: nn.Module) -> None:
    """Replaces the ``forward`` of every linear map inside ``module``, and fuses GELUs into them where it can.

    Weights stay where they are and may change later. Outside float32 on a CPU, and while gradients are
    recorded, the modules' own code runs, but for GELU, which is always one kernel instead of eight.
    """
    for part in list(module.modules()):
        for name, child in part.named_children():
            if type(child) in GELUS:
                part._modules[name] = nn.GELU(approximate=GELUS[type(child)])
    if not _has_onednn():
        return
    fused = {}
    for part in module.modules():
        for linear, activation in MLP_PARTS:
            children = part._modules
            if type(children.get(activation)) is nn.GELU and linear in children:
                fused[id(children[linear])] = children[activation]
                children[activation] = nn.Identity()
    for part in module.modules():
        if type(part) in (nn.Linear, Conv1D):
            part.forward = partial(_linear, part, fused.get(id(part)))


def _linear(module: nn.Module, gelu: nn.GELU | None, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    if torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu":
        output = type(module).forward(module, x)
        return output if gelu is None else gelu(output)
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    kind, formula = ("none", "") if gelu is None else ("gelu", gelu.approximate)
    return torch.ops.mkldnn._linear_pointwise(x, weight, module.bias, kind, [], formula)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
