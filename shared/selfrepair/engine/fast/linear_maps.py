"""Faster ways to compute what a model's modules compute, for float32 on a CPU; LayerNorms that take wider inputs.

PyTorch hands float32 matrix products to MKL, which leaves AMD processors' AVX-512 unused; oneDNN, which
PyTorch also ships and uses for narrower types, is about twice as fast there and computes GELU on the way.
Weights laid out as it wants them save it the work of doing so in every product.
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

#: Activation modules that are exactly GELU, and the name of the formula.
GELUS: dict[type[nn.Module], str] = {GELUActivation: "none", NewGELUActivation: "tanh", GELUTanh: "tanh"}
#: Rows from which a product is worth a second copy of its weight, laid out for oneDNN.
PACKED_FROM_ROWS = 256
#: The first linear map and the activation after it, by the names that Hugging Face gives them in one module.
MLP_PARTS = (("c_fc", "act"), ("dense_h_to_4h", "act"))


def use_fast_kernels(module: nn.Module) -> None:
    """Replaces the ``forward`` of every linear map inside ``module``, and fuses GELUs into them where it can.

    Weights stay where they are and may change later; those of large products are kept in a second layout
    too. Outside float32 on a CPU, and while gradients are recorded, the modules' own code runs, but for
    GELU, which is always one kernel instead of eight. ``fused_gelu`` says which GELU, if any, a linear map
    computes on the way.
    """
    for part in list(module.modules()):
        for name, child in part.named_children():
            if type(child) in GELUS:
                part._modules[name] = nn.GELU(approximate=GELUS[type(child)])
        if type(part) is nn.LayerNorm:
            part.forward = partial(_layer_norm, part)
    _keep_freed_memory()
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
            part.forward = partial(_linear, part, _Packed(), fused.get(id(part)))


def _keep_freed_memory() -> None:
    """Makes glibc keep freed blocks for the next operation, where it would give them back and take them page by page again."""
    if hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**25)


def compile_norms(module: nn.Module) -> None:
    """Makes one kernel of every norm inside ``module`` by ``torch.compile``: RMSNorm is six otherwise.

    Only they are compiled: the engine hooks into blocks, which compiled code would not notice.
    """
    for part in module.modules():
        if "Norm" in type(part).__name__:
            part.forward = torch.compile(part.forward)


def fused_gelu(linear: nn.Module) -> nn.GELU | None:
    """The GELU that ``linear`` computes on its output since :func:`use_fast_kernels`, if any."""
    forward = linear.__dict__.get("forward")
    return forward.args[2] if isinstance(forward, partial) else None


def _layer_norm(module: nn.LayerNorm, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The module's, for inputs wider than its weights too."""
    weight, bias = (None if parameter is None else parameter.to(x.dtype) for parameter in (module.weight, module.bias))
    return nn.functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


class _Packed:
    """A weight in oneDNN's own layout, made again when the weight has changed."""

    def __init__(self) -> None:
        self._of: tuple[int, int] | None = None
        self._packed: Tensor | None = None

    def __call__(self, weight: Float[Tensor, "d_out d_in"], rows: int) -> Tensor:
        of = (weight.data_ptr(), weight._version)
        if self._of != of:
            self._packed, self._of = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows), of
        return self._packed


def linear_map(
    x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*batch d_out"]:
    """``x Wᵀ + b`` by the faster kernel where there is one."""
    if _is_fast(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _linear(module: nn.Module, packed: _Packed, gelu: nn.GELU | None, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    if not _is_fast(x, module.weight):
        output = type(module).forward(module, x)
        return output if gelu is None else gelu(output)
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    rows = x.shape[:-1].numel()
    if rows >= PACKED_FROM_ROWS:
        weight = packed(weight, rows)
    kind, formula = ("none", "") if gelu is None else ("gelu", gelu.approximate)
    return torch.ops.mkldnn._linear_pointwise(x, weight, module.bias, kind, [], formula)


def _is_fast(x: Tensor, weight: Tensor) -> bool:
    return _has_onednn() and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.is_grad_enabled()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
