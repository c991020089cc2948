"""The places in a model that can be ablated: heads of every layer, and whole attention layers and MLPs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfrepair.engine.batches import prompts_that_fit
from selfrepair.engine.forward import CleanRun, Replay, carry, run_clean
from selfrepair.models.loading import Model


class Heads:
    """``z`` of all heads of a layer; places are layers. A head that adds nothing leaves its value bias."""

    def activations(
        self, model: Model, tokens: Int[Tensor, "prompt position"]
    ) -> list[Float[Tensor, "prompt position head d_head"]]:
        return self.clean(model, tokens).z

    def nothing(self, model: Model) -> list[Float[Tensor, "head d_head"]]:
        return model.value_biases

    def clean(self, model: Model, tokens: Int[Tensor, "prompt position"]) -> CleanRun:
        return run_clean(model, tokens)

    def carried(
        self,
        model: Model,
        replay: Replay,
        clean: CleanRun,
        place: int,
        first: int,
        values: Float[Tensor, "part d_head"],
    ) -> Float[Tensor, "part prompt position d_model"]:
        heads = slice(first, first + len(values))
        change = values - clean.z[place][:, :, heads]
        W_O = model.W_O(place)[heads].to(change.dtype)
        return carry(model, replay, clean, place, torch.einsum("pkhe,hed->hpkd", change, W_O))


class Components:
    """What attention layers and MLPs write, biases included; of layer ``l`` places ``2l`` and ``2l + 1``."""

    def activations(
        self, model: Model, tokens: Int[Tensor, "prompt position"]
    ) -> list[Float[Tensor, "prompt position d_model"]]:
        return self.clean(model, tokens).outputs

    def nothing(self, model: Model) -> list[Float[Tensor, " d_model"]]:
        d_model = model.hf.config.hidden_size
        return [torch.zeros(d_model, device=model.device, dtype=model.dtype)] * (2 * model.n_layers)

    def clean(self, model: Model, tokens: Int[Tensor, "prompt position"]) -> CleanRun:
        return run_clean(model, tokens, mlps=True)

    def carried(
        self,
        model: Model,
        replay: Replay,
        clean: CleanRun,
        place: int,
        first: int,
        values: Float[Tensor, "part d_model"],
    ) -> Float[Tensor, "part prompt position d_model"]:
        layer, is_mlp = divmod(place, 2)
        delta = values[:, None, None] - clean.outputs[place]
        if not is_mlp:
            return carry(model, replay, clean, layer, delta)
        residual = ([*clean.residuals, clean.final_residual][layer + 1] + delta).flatten(0, 1)
        for above in range(layer + 1, model.n_layers):
            residual = replay.block(above, residual)
        return residual.unflatten(0, delta.shape[:2])


HEADS, COMPONENTS = Heads(), Components()


def batches_that_fit(
    model: Model, tokens: Int[Tensor, "prompt position"]
) -> Iterator[Int[Tensor, "batch position"]]:
    """All prompts, as many at a time as a clean run has memory for."""
    yield from tokens.split(prompts_that_fit(model, tokens.shape[1]))
