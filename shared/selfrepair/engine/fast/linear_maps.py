"""GELU in one kernel, and linear maps by oneDNN where a model multiplies in float32 on a CPU.

PyTorch hands float32 matrix products to MKL, which leaves AMD processors' AVX-512 unused; oneDNN, which
PyTorch also ships and uses for narrower types, is about twice as fast there and computes GELU on the way.
Weights laid out as it wants them save it the work of doing so in every product. Its operators are private
ones of PyTorch's, so that this file may need an edit when PyTorch is replaced; the plain path does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from selfrepair.engine.hooks import standing_in
from selfrepair.models.parts import weight_out_in

#: Activation modules that are exactly GELU, and the name of the formula.
GELUS: dict[type[nn.Module], str] = {GELUActivation: "none", NewGELUActivation: "tanh", GELUTanh: "tanh"}
#: Rows from which a product is worth a second copy of its weight, laid out for oneDNN.
PACKED_FROM_ROWS = 256
#: The first linear map and the activation after it, by the names that Hugging Face gives them in one module.
MLP_PARTS = (("c_fc", "act"), ("dense_h_to_4h", "act"))


@contextmanager
def faster_modules(module: nn.Module) -> Iterator[None]:
    """Inside, GELUs of ``module`` are one kernel instead of eight, and linear maps oneDNN's, GELU on the way.

    Weights stay where they are and may change; those of large products are kept in a second layout too, as
    long as their module lives. Outside float32 on a CPU, and while gradients are recorded, linear maps run
    their own code. ``fused_gelu`` says which GELU, if any, a linear map computes on the way.
    """
    with ExitStack() as swapped:
        for part in list(module.modules()):
            for name, child in part.named_children():
                if type(child) in GELUS:
                    swapped.enter_context(standing_in(part, name, nn.GELU(approximate=GELUS[type(child)])))
        if _has_onednn():
            gelus = {id(linear): gelu for linear, gelu in _fuse_gelus(module, swapped)}
            for part in module.modules():
                if type(part) in (nn.Linear, Conv1D) and not _is_swapped(part):
                    faster = partial(_linear, part, _PACKED.setdefault(part, _Packed()), gelus.get(id(part)))
                    swapped.enter_context(forward_by(part, faster))
        yield


def _fuse_gelus(module: nn.Module, swapped: ExitStack) -> list[tuple[nn.Module, nn.GELU]]:
    """Takes the GELUs out that a linear map can compute on the way; gives these maps and their GELUs."""
    fused = []
    for part in list(module.modules()):
        children = dict(part.named_children())
        for linear, activation in MLP_PARTS:
            gelu = children.get(activation)
            if linear in children and type(gelu) is nn.GELU:
                fused.append((children[linear], gelu))
                swapped.enter_context(standing_in(part, activation, nn.Identity()))
    return fused


@contextmanager
def forward_by(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives ``module`` another ``forward``."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def fused_gelu(linear: nn.Module) -> nn.GELU | None:
    """The GELU that ``linear`` computes on its output, if any."""
    return cast(partial, linear.forward).args[2] if _is_swapped(linear) else None


def _is_swapped(linear: nn.Module) -> bool:
    forward = linear.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _linear


class _Packed:
    """A weight in oneDNN's own layout, made again when the weight has changed."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self, weight: Float[Tensor, "d_out d_in"], rows: int) -> Tensor:
        of = (weight.data_ptr(), weight._version)
        if self._kept is None or self._kept[0] != of:
            self._kept = of, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        return self._kept[1]


#: Kept from one use of the fast path to the next.
_PACKED: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def linear_map(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """``x Wᵀ + b`` by the faster kernel where there is one."""
    if _is_fast(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _linear(
    module: nn.Module, packed: _Packed, gelu: nn.GELU | None, x: Float[Tensor, "*batch d_in"]
) -> Float[Tensor, "*batch d_out"]:
    if not _is_fast(x, cast(Tensor, module.weight)):
        output = type(module).forward(module, x)
        return output if gelu is None else gelu(output)
    weight = weight_out_in(module)
    rows = x.shape[:-1].numel()
    if rows >= PACKED_FROM_ROWS:
        weight = packed(weight, rows)
    kind, formula = ("none", "") if gelu is None else ("gelu", gelu.approximate)
    return torch.ops.mkldnn._linear_pointwise(x, weight, module.bias, kind, [], formula)


def _is_fast(x: Tensor, weight: Tensor) -> bool:
    on_cpu = _has_onednn() and x.device.type == "cpu"
    return on_cpu and x.dtype == weight.dtype == torch.float32 and not torch.is_grad_enabled()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
