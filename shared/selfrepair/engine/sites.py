"""The places in a model that can be ablated: heads of every layer, and whole attention layers and MLPs.

And what a constant there costs: only the blocks above run, all parts of a place side by side, each ablated by
itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfrepair.engine.batches import prompts_that_fit
from selfrepair.engine.forward import CleanRun, Replay, carry, next_token_losses, run_clean
from selfrepair.models.loading import Model

#: Parts times prompts in one pass with gradients: logits of the whole vocabulary are held for so many.
ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Prepared:
    """Prompts, their clean run, and how to run blocks for them again."""

    tokens: Int[Tensor, "prompt position"]
    clean: CleanRun
    replay: Replay


class _Places(ABC):
    """What kinds of places share."""

    @abstractmethod
    def clean(self, model: Model, tokens: Int[Tensor, "prompt position"]) -> CleanRun:
        """The clean run that the places are read in."""

    @abstractmethod
    def carried(
        self, model: Model, here: Prepared, place: int, first: int, values: Float[Tensor, "part width"]
    ) -> Float[Tensor, "part prompt position d_model"]:
        """Final residual streams with a constant at all positions, in one part of ``place`` at a time.

        ``values`` are of the parts from number ``first`` on. Gradients are recorded if they want them.
        """

    @torch.no_grad()
    def prepared(self, model: Model, tokens: Int[Tensor, "prompt position"]) -> Prepared:
        return Prepared(tokens, self.clean(model, tokens), Replay(model, tokens.shape[1]))

    def loss_gradient(
        self, model: Model, here: Prepared, place: int, values: Float[Tensor, "part width"]
    ) -> tuple[Float[Tensor, " part"], Float[Tensor, "part width"]]:
        """Mean next-token loss (nats) with each part's constant in its place, and its gradient by that."""
        losses, gradients = [], []
        at_once = max(1, ROWS_AT_ONCE // len(here.tokens))
        for first in range(0, len(values), at_once):
            with torch.enable_grad():
                some = values[first : first + at_once].detach().requires_grad_()
                final = self.carried(model, here, place, first, some)
                loss = next_token_losses(model, final, here.tokens).flatten(1).mean(1)
                (gradient,) = torch.autograd.grad(loss.sum(), some)
            losses.append(loss.detach())
            gradients.append(gradient)
        return torch.cat(losses), torch.cat(gradients)


class Heads(_Places):
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
        self, model: Model, here: Prepared, place: int, first: int, values: Float[Tensor, "part d_head"]
    ) -> Float[Tensor, "part prompt position d_model"]:
        heads = slice(first, first + len(values))
        change = values - here.clean.z[place][:, :, heads]
        W_O = model.W_O(place)[heads].to(change.dtype)
        return carry(model, here.replay, here.clean, place, torch.einsum("pkhe,hed->hpkd", change, W_O))


class Components(_Places):
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
        self, model: Model, here: Prepared, place: int, first: int, values: Float[Tensor, "part d_model"]
    ) -> Float[Tensor, "part prompt position d_model"]:
        layer, is_mlp = divmod(place, 2)
        clean = here.clean
        delta = values[:, None, None] - clean.outputs[place]
        if not is_mlp:
            return carry(model, here.replay, clean, layer, delta)
        after = [*clean.residuals, clean.final_residual][layer + 1]
        return here.replay.from_block(layer + 1, (after + delta).flatten(0, 1)).unflatten(0, delta.shape[:2])


HEADS, COMPONENTS = Heads(), Components()


def batches_that_fit(
    model: Model, tokens: Int[Tensor, "prompt position"]
) -> Iterator[Int[Tensor, "batch position"]]:
    """All prompts, as many at a time as a clean run has memory for."""
    yield from tokens.split(prompts_that_fit(model, tokens.shape[1]))
