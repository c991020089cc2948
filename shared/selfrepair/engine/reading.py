"""The clean run of some prompts, and how to read along their correct tokens whatever is written there."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from selfrepair.engine.direct_effect import FinalNorm, token_directions
from selfrepair.engine.forward import run_clean
from selfrepair.models.loading import Model

if TYPE_CHECKING:
    from selfrepair.engine.ablations import Replacement


class Reading:
    """One clean pass over ``tokens``, and direct effects (logits) read with its final norm's scale.

    ``clean`` is the pass, ``direction`` the ``u`` of every correct next token, ``sigma`` the final norm's
    scale, ``norm`` the final norm. The last position has no next token and is not read. All in float32 or
    better.
    """

    @torch.no_grad()
    def __init__(
        self, model: Model, tokens: Int[Tensor, "prompt position"], cache: DynamicCache | None = None
    ):
        """``cache`` is given the pass' keys and values."""
        self.model = model
        self.clean = run_clean(model, tokens, cache=cache)
        self.norm = FinalNorm.of(model.final_norm)
        self.direction, _ = token_directions(model, tokens)
        self.sigma = self.norm.sigma(self.clean.final_residual[:, :-1])

    @cached_property
    def final(self) -> Float[Tensor, "prompt read_position"]:
        """``u · r`` of the final residual stream ``r``."""
        return self.read(self.clean.final_residual)

    @cached_property
    def scaled_direction(self) -> Float[Tensor, "prompt read_position d_model"]:
        """``u / σ_clean``: its product with what a component writes is that component's direct effect."""
        return self.direction / self.sigma[..., None]

    @cached_property
    def _padded(self) -> Float[Tensor, "prompt position d_model"]:
        return nn.functional.pad(self.direction, (0, 0, 0, 1))

    @torch.no_grad()
    def read(
        self, written: Float[Tensor, "*variant prompt position d_model"]
    ) -> Float[Tensor, "*variant prompt position-1"]:
        """``u · written``, not divided by σ."""
        return torch.linalg.vecdot(written.to(self.direction.dtype), self._padded)[..., :-1]

    @torch.no_grad()
    def effects(
        self, layer: int, z: Float[Tensor, "*variant prompt position head d_head"]
    ) -> Float[Tensor, "*variant prompt position-1 head"]:
        """Direct effects of heads of ``layer``, were ``z`` this: ``u · (z_h − b_V,h) W_O,h / σ_clean``."""
        return self._effects(layer, z[..., :-1, :, :], slice(None))

    @torch.no_grad()
    def effects_at(
        self, layer: int, z: Float[Tensor, "*variant prompt head d_head"], position: int
    ) -> Float[Tensor, "*variant prompt head"]:
        """The same at one position, where ``z`` is this."""
        return self._effects(layer, z[..., None, :, :], slice(position, position + 1))[..., 0, :]

    def _effects(
        self, layer: int, z: Float[Tensor, "*variant prompt some_position head d_head"], positions: slice
    ) -> Float[Tensor, "*variant prompt some_position head"]:
        z, bias = self._wide(z, self.model.value_biases[layer])
        return torch.einsum("...pkhe,pkhe->...pkh", z - bias, self.along(layer, positions))

    @torch.no_grad()
    def along(
        self, layer: int, positions: slice = slice(None)
    ) -> Float[Tensor, "prompt some_position head d_head"]:
        """``u W_Oᵀ / σ_clean``: its product with ``z − b_V`` of a head is that head's direct effect."""
        (W_O,) = self._wide(self.model.W_O(layer))
        return torch.einsum("pkd,hed->pkhe", self.scaled_direction[:, positions], W_O)

    @torch.no_grad()
    def output(
        self, layer: int, head: int, position: int | None = None
    ) -> Float[Tensor, "prompt *position d_model"]:
        """What a head writes, ``(z_h − b_V,h) W_O,h``: at all positions, or at one."""
        z = self.clean.z[layer][:, :, head]
        z = z if position is None else z[:, position]
        z, bias, W_O = self._wide(z, self.model.value_biases[layer][head], self.model.W_O(layer)[head])
        return (z - bias) @ W_O

    @torch.no_grad()
    def change(self, layer: int, replacement: Replacement) -> Float[Tensor, "prompt position head d_head"]:
        """What an ablation changes ``z`` of all heads of ``layer`` by."""
        clean = self.clean.z[layer]
        clean, replaced = self._wide(clean, replacement(layer, clean))
        return replaced - clean

    @torch.no_grad()
    def written(
        self, layer: int, change: Float[Tensor, "prompt position some_heads d_head"], first: int
    ) -> Float[Tensor, "some_heads prompt position d_model"]:
        """What changes of ``z`` of the heads from number ``first`` on write: ``Δz_h W_O,h``."""
        change, W_O = self._wide(change, self.model.W_O(layer)[first : first + change.shape[2]])
        return torch.einsum("pkhe,hed->hpkd", change, W_O)

    def _wide(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.direction.dtype) for tensor in tensors)
