"""Running parts of a model: one clean pass, any blocks again with changed inputs, the unembedding.

Blocks run with the arguments that the model itself gives them, so that nothing here knows an architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from selfrepair.engine.batches import rows_that_fit
from selfrepair.engine.hooks import (
    Arguments,
    before,
    hidden_states,
    input_of,
    standing_in,
    watching,
    widened_norms,
)
from selfrepair.errors import UserError
from selfrepair.models.loading import Model

#: What token ids can be.
TOKEN_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class CleanRun:
    """What one clean pass leaves for the ablations; lists are by layer.

    ``attention_outputs`` are the output projections' (bias included), ``z`` their inputs; ``mlp_outputs``,
    biases included too, are kept if asked for.
    """

    residuals: list[Float[Tensor, "prompt position d_model"]]
    z: list[Float[Tensor, "prompt position head d_head"]]
    attention_outputs: list[Float[Tensor, "prompt position d_model"]]
    mlp_outputs: list[Float[Tensor, "prompt position d_model"]]
    final_residual: Float[Tensor, "prompt position d_model"]

    @property
    def outputs(self) -> list[Float[Tensor, "prompt position d_model"]]:
        """By component, in order of depth: the attention's and the MLP's of every layer."""
        return [
            output for pair in zip(self.attention_outputs, self.mlp_outputs, strict=True) for output in pair
        ]


@contextmanager
def float32_residual(model: Model, within: nn.Module | None = None) -> Iterator[None]:
    """Inside, a model with 16-bit weights multiplies in these, but its residual stream and norms are float32.

    What an ablation changes is a small part of the residual stream: in 16 bits its rounding would drown it.
    ``within`` is the part of the model that runs inside, if not all of it.
    """
    if model.dtype not in (torch.bfloat16, torch.float16):
        yield
        return

    def widen(_: int, positional: tuple, named: dict) -> tuple[tuple, dict]:
        if positional:
            return (positional[0].float(), *positional[1:]), named
        return (), {**named, "hidden_states": named["hidden_states"].float()}

    norms = widened_norms(model.hf if within is None else within)
    with norms, before(model.blocks[:1], widen), torch.autocast(model.device.type, dtype=model.dtype):
        yield


def unembed(model: Model, final: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocabulary"]:
    """Logits (not centred, in float32 or better) of final residual streams, final norm included."""
    with float32_residual(model):
        logits = model.hf.get_output_embeddings()(model.final_norm(final))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_token_losses(
    model: Model,
    final: Float[Tensor, "*variant prompt position d_model"],
    tokens: Int[Tensor, "prompt position"],
) -> Float[Tensor, "*variant prompt position-1"]:
    """Negative log-probability (nats) of each next token where ``final`` is the final residual stream."""
    logits = unembed(model, final[..., :-1, :])
    correct = tokens[:, 1:].expand(logits.shape[:-1])
    losses = nn.functional.cross_entropy(logits.flatten(0, -2), correct.flatten(), reduction="none")
    return losses.view(correct.shape)


def block_arguments(
    model: Model, tokens: Int[Tensor, "prompt position"], **settings: object
) -> list[Arguments]:
    """What the model gives each block in a pass over ``tokens``, beside the residual stream."""
    found: list[Arguments] = []

    def record(_: int, positional: tuple, named: dict) -> None:
        named = {name: value for name, value in named.items() if name != "hidden_states"}
        found.append((positional[1:], named))

    with float32_residual(model), before(model.blocks, record):
        model.hf.base_model(input_ids=tokens, **settings)
    return found


class Blocks(ABC):
    """Runs blocks with the arguments that the model itself gives them."""

    def __init__(self, model: Model):
        self.model = model

    @abstractmethod
    def arguments(self, layer: int) -> Arguments:
        """What block ``layer`` is given beside the residual stream: positional and named."""

    def block(
        self, layer: int, residual: Float[Tensor, "batch position d_model"]
    ) -> Float[Tensor, "batch position d_model"]:
        """Output of block ``layer`` for the residual stream before it."""
        positional, named = self.arguments(layer)
        block = self.model.blocks[layer]
        with float32_residual(self.model, block):
            output = block(residual, *positional, **named)
        return output[0] if isinstance(output, tuple) else output

    def block_given_attention(
        self,
        layer: int,
        residual: Float[Tensor, "batch position d_model"],
        attention_output: Float[Tensor, "batch position d_model"],
    ) -> Float[Tensor, "batch position d_model"]:
        """The same with the attention's output given instead of computed."""
        block, attention = self.model.blocks[layer], self.model.attentions[layer]
        (path,) = (path for path, part in block.named_modules() if part is attention)
        holder, _, name = path.rpartition(".")
        with standing_in(block.get_submodule(holder), name, _Given(attention_output)):
            return self.block(layer, residual)

    def from_block(
        self, first: int, residual: Float[Tensor, "batch position d_model"]
    ) -> Float[Tensor, "batch position d_model"]:
        """The final residual stream where ``residual`` is the one before block ``first``."""
        for layer in range(first, self.model.n_layers):
            residual = self.block(layer, residual)
        return residual


class Replay(Blocks):
    """Blocks for any batch of unpadded prompts of one length.

    Their arguments (masks, rotary tables, position ids) are recorded on a pass over one prompt: the batch
    dimension is 1 and broadcasts.
    """

    def __init__(self, model: Model, prompt_len: int):
        super().__init__(model)
        tokens = torch.zeros(1, prompt_len, dtype=torch.long, device=model.device)
        self._arguments = block_arguments(model, tokens, use_cache=False)

    def arguments(self, layer: int) -> Arguments:
        return self._arguments[layer]


class _Given(nn.Module):
    """In an attention's place: has its output already."""

    def __init__(self, output: Float[Tensor, "batch position d_model"]):
        super().__init__()
        self.output = output

    def forward(self, *_: object, **__: object) -> tuple[Float[Tensor, "batch position d_model"], None]:
        return self.output, None


@torch.no_grad()
def run_clean(
    model: Model,
    tokens: Int[Tensor, "prompt position"],
    mlps: bool = False,
    last_only: bool = False,
    cache: DynamicCache | None = None,
) -> CleanRun:
    """The clean pass over ``tokens``, without the unembedding.

    ``mlps``: keep what MLPs write, too. ``last_only``: of everything, keep the last position alone.
    ``cache`` is given the keys and values of all positions.

    Raises:
        UserError: ``tokens`` are no token ids.
    """
    if tokens.dtype not in TOKEN_DTYPES:
        raise UserError(f"token ids must be whole numbers (torch.int64 or int32), not {tokens.dtype}")
    residuals: list[Tensor] = []
    z: list[Tensor] = []
    attention_outputs: list[Tensor] = []
    mlp_outputs: list[Tensor] = []

    def kept(values: Tensor) -> Tensor:
        by_position = values.view(len(tokens), -1, values.shape[-1])  # some architectures flatten the batch
        return by_position[:, -1:].clone() if last_only else by_position

    def before_part(_: int, positional: tuple, named: dict) -> None:
        residuals.append(kept(hidden_states(positional, named)))

    def after_attention(_: int, given: Tensor, output: Tensor) -> None:
        z.append(kept(given).unflatten(-1, (model.n_heads, -1)))
        attention_outputs.append(kept(output))

    with (
        float32_residual(model),
        before([*model.blocks, model.final_norm], before_part),
        watching(model.output_projections, after_attention),
        watching(
            model.mlp_output_projections if mlps else [],
            lambda _, __, output: mlp_outputs.append(kept(output)),
        ),
    ):
        model.hf.base_model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
    *residuals, final = residuals
    return CleanRun(residuals, z, attention_outputs, mlp_outputs, final)


def carry(
    model: Model,
    replay: Blocks,
    clean: CleanRun,
    layer: int,
    delta: Float[Tensor, "variant prompt position d_model"],
    prompts: Int[Tensor, " prompt"] | None = None,
) -> Float[Tensor, "variant prompt position d_model"]:
    """Final residuals after adding each ``delta`` to the attention output of ``layer``; the rest above runs.

    All variants run in one batch, variants outermost; what modules see on the way can be had by
    ``watching`` them (:mod:`selfrepair.engine.hooks`). ``prompts`` are those of the clean run that ``delta``
    is of, if not all in order. Gradients are recorded where ``delta`` wants them.
    """
    n = delta.shape[0]
    chosen = slice(None) if prompts is None else prompts
    if model.parallel:
        after = clean.residuals[layer + 1] if layer + 1 < model.n_layers else clean.final_residual
        residual = (after[chosen] + delta).flatten(0, 1)
    else:
        below = clean.residuals[layer][chosen].expand(n, -1, -1, -1).flatten(0, 1)
        given = (clean.attention_outputs[layer][chosen] + delta).flatten(0, 1)
        residual = replay.block_given_attention(layer, below, given)
    return replay.from_block(layer + 1, residual).unflatten(0, (n, -1))


@torch.no_grad()
def z_reached(
    model: Model, layer: int, run: Callable[[], object]
) -> Float[Tensor, "row position head d_head"]:
    """``z`` of ``layer`` in ``run()``, which is broken off there."""
    return input_of(model.output_projections[layer], run).unflatten(-1, (model.n_heads, -1))


@torch.no_grad()
def attention_z(
    model: Model, replay: Replay, layer: int, residual: Float[Tensor, "row position d_model"]
) -> Float[Tensor, "row position head d_head"]:
    """``z`` of ``layer`` when ``residual`` is the residual stream before it."""
    parts = residual.split(rows_that_fit(model, residual.shape[1]))
    return torch.cat([z_reached(model, layer, partial(replay.block, layer, part)) for part in parts])
