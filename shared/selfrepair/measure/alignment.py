"""Do blocks descend? How every block's update of the residual stream lies to the loss' gradient there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from selfrepair.engine.forward import Replay, next_token_losses, run_clean
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import pair_shards, prompts_of_shard, tokens_of
from selfrepair.models.devices import on_device

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

GRADIENT_BYTES = 1 << 30


class Alignment(Measurement):
    """Means over the tokens of each prompt.

    ``gradient [layer, prompt]``: cosine of a block's update of the residual stream with minus the gradient,
    there, of the prompt's summed next-token loss; ``final``, of the same shape: cosine of the update with the
    final residual; ``loss [layer_after, prompt]`` (nats): of the final norm and unembedding read before each
    block and after the last (logit lens). Our own question: the papers' released code has no counterpart.
    """

    name: ClassVar[str] = "alignment"
    uses: ClassVar[tuple[str, ...]] = ("dtype",)

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        prompts = prompts_of_shard(inputs, shard)
        tokens = on_device(tokens_of(model, inputs, prompts), model.device)
        replay = Replay(model, tokens.shape[1])
        batches = tokens.split(_prompts_with_gradients(model, tokens.shape[1]))
        parts = [_align(model, replay, batch) for batch in batches]
        return xr.concat(parts, "prompt").assign_coords(prompt=prompts)


MEASUREMENT = Alignment()


@dataclass(frozen=True)
class Stream:
    """The residual stream before each block and after the last, and the loss' gradients before each block."""

    residuals: list[Float[Tensor, "prompt position d_model"]]
    gradients: list[Float[Tensor, "prompt position d_model"]]


def residual_gradients(model: Model, replay: Replay, tokens: Int[Tensor, "prompt position"]) -> Stream:
    """The residual stream and the gradients of each prompt's summed next-token loss.

    A gradient counts all that the residual touches later, through attention other positions' losses too.
    """
    residuals = [run_clean(model, tokens).residuals[0].detach().requires_grad_()]
    with torch.enable_grad():
        for layer in range(model.n_layers):
            residuals.append(replay.block(layer, residuals[-1]))
        gradients = torch.autograd.grad(next_token_losses(model, residuals[-1], tokens).sum(), residuals[:-1])
    return Stream([residual.detach() for residual in residuals], list(gradients))


@torch.no_grad()
def _align(model: Model, replay: Replay, tokens: Int[Tensor, "prompt position"]) -> xr.Dataset:
    """The measurement's variables of some prompts."""
    stream = residual_gradients(model, replay, tokens)
    wide = torch.promote_types(model.dtype, torch.float32)
    residuals, gradients = (torch.stack(r)[:, :, :-1].to(wide) for r in (stream.residuals, stream.gradients))
    updates = residuals.diff(dim=0)
    by_token = {
        "gradient": ("layer", torch.cosine_similarity(updates, -gradients, dim=-1)),
        "final": ("layer", torch.cosine_similarity(updates, residuals[-1], dim=-1)),
        "loss": ("layer_after", torch.stack([next_token_losses(model, r, tokens) for r in stream.residuals])),
    }
    means = {name: (dim, values.mean(-1, dtype=torch.float64)) for name, (dim, values) in by_token.items()}
    return xr.Dataset(
        {name: ((dim, "prompt"), values.cpu().numpy()) for name, (dim, values) in means.items()}
    )


def _prompts_with_gradients(model: Model, prompt_len: int) -> int:
    """Prompts whose recorded activations, 24 d_model a block, and logits take no more than a gibibyte."""
    width = 24 * model.n_layers * model.hf.config.hidden_size + 4 * model.W_U.shape[0]
    return max(1, GRADIENT_BYTES // (prompt_len * width * 4))
