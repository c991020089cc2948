"""The first linear maps after a head's ablation, from what the head's change of rank ``d_head`` does to them.

An ablation changes the residual stream ``r`` by ``δ = Δz W_O``, and a norm is linear but for its scale σ,
so that a map behind it gives ``((r + δ) W + …)/σ' = (r W)/σ' + Δz (W_O W)/σ' + c``: of the large products
only ``r W``, the same for all heads of a layer, is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfrepair.engine.direct_effect import FinalNorm
from selfrepair.engine.fast.linear_maps import forward_by, fused_gelu, linear_map
from selfrepair.engine.forward import CleanRun
from selfrepair.models.loading import Model
from selfrepair.models.parts import NormedMaps, weight_out_in

#: Where the passes over memory that take the large product's place are known to cost less than it.
PAYS_ON_CPU_FROM_D_MODEL = 512


@dataclass(frozen=True)
class _Map:
    """A linear map behind a norm: its clean output, and the ``constant`` ``W β + b`` that is not in it."""

    module: nn.Module
    weight: Float[Tensor, "d_out d_model"]
    clean: Float[Tensor, "prompt position d_out"]
    constant: Float[Tensor, " d_out"]
    gelu: nn.GELU | None


@dataclass(frozen=True)
class _Norm:
    """A norm of the first block after the ablations, its scale in the clean run, and the maps behind it."""

    module: nn.Module
    norm: FinalNorm
    sigma: Float[Tensor, "prompt position"]
    maps: list[_Map]


class FirstMaps:
    """Stands in for the first linear maps after the ablations of ``layer``.

    They are the MLP's of its own block or, in a parallel model, those of the block above.
    """

    def __init__(self, model: Model, clean: CleanRun, layer: int):
        self.W_O = model.W_O(layer)
        if model.parallel:
            residual, norms = clean.residuals[layer + 1], model.first_maps[layer + 1]
        else:
            residual, norms = (
                clean.residuals[layer] + clean.attention_outputs[layer],
                model.first_maps[layer][1:],
            )
        self._norms = [_on_clean(residual, normed) for normed in norms]

    @classmethod
    def of(cls, model: Model, clean: CleanRun, layer: int) -> FirstMaps | None:
        """Those of ``layer`` where a model computes by the fast path and they pay."""
        return cls(model, clean, layer) if model.fast and cls.pay(model, layer) else None

    @staticmethod
    def pay(model: Model, layer: int) -> bool:
        """Whether this is faster than the maps themselves."""
        wide = model.device.type == "cpu" and model.W_U.shape[1] >= PAYS_ON_CPU_FROM_D_MODEL
        return (
            wide and model.dtype in (torch.float32, torch.float64) and layer + model.parallel < model.n_layers
        )

    @contextmanager
    def given(self, change: Float[Tensor, "prompt position variant d_head"], first: int) -> Iterator[None]:
        """Inside, maps work from changes of ``z`` of the heads from ``first`` on, outermost in the batch."""
        change = change.permute(2, 0, 1, 3)
        W_O = self.W_O[first : first + len(change)]
        with ExitStack() as stack:
            for norm in self._norms:
                scale = _ScaleOnly(norm.norm)
                stack.enter_context(forward_by(norm.module, scale))
                written = (W_O - W_O.mean(-1, keepdim=True) if norm.norm.centred else W_O) * norm.norm.gamma
                for linear in norm.maps:
                    through = [linear_map(head, linear.weight).T for head in written]
                    stack.enter_context(
                        forward_by(linear.module, partial(_output, norm, linear, change, through, scale))
                    )
            yield


def _on_clean(residual: Float[Tensor, "prompt position d_model"], normed: NormedMaps) -> _Norm:
    norm = FinalNorm.of(normed.norm)
    sigma = norm.sigma(residual)
    centred = residual - residual.mean(-1, keepdim=True) if norm.centred else residual
    scaled = centred / sigma[..., None] * norm.gamma
    maps = []
    for linear in normed.maps:
        weight = weight_out_in(linear)
        constant = torch.zeros_like(weight[:, 0]) if norm.beta is None else weight @ norm.beta
        constant = constant if linear.bias is None else constant + cast(Tensor, linear.bias)
        maps.append(_Map(linear, weight, linear_map(scaled, weight), constant, fused_gelu(linear)))
    return _Norm(normed.norm, norm, sigma, maps)


class _ScaleOnly:
    """In the place of a norm: keeps its scale σ for the maps behind it, and hands the residual stream on."""

    def __init__(self, norm: FinalNorm):
        self.norm = norm
        self.sigma: Float[Tensor, "*row"] | None = None

    def __call__(self, residual: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        self.sigma = self.norm.sigma(residual)
        return residual


def _output(
    norm: _Norm,
    linear: _Map,
    change: Float[Tensor, "variant prompt position d_head"],
    through: list[Float[Tensor, "d_out d_head"]],
    scale: _ScaleOnly,
    x: Float[Tensor, "*batch d_model"],
) -> Float[Tensor, "*batch d_out"]:
    """``linear``'s output for every variant; of the residual stream ``x`` only the shape is asked."""
    assert scale.sigma is not None  # the norm runs before its maps
    shrunk = scale.sigma.reciprocal().view(*change.shape[:3], 1)
    outputs = [
        linear_map(c, weight, linear.constant) for c, weight in zip(change * shrunk, through, strict=True)
    ]
    output = outputs[0][None] if len(outputs) == 1 else torch.stack(outputs)
    output.addcmul_(linear.clean, shrunk * norm.sigma[..., None])
    if linear.gelu is not None:
        torch.ops.aten.gelu_(output, approximate=linear.gelu.approximate)
    return output.view(*x.shape[:-1], -1)
