"""Running parts of a model: one clean pass, then any blocks again with changed inputs.

Blocks run with the arguments that the model itself gives them, so that nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.models.loading import Model


@dataclass(frozen=True)
class CleanRun:
    """What one clean pass leaves for the ablations; lists are by layer.

    ``attention_outputs`` are the output projections' (bias included), ``z`` their inputs; ``mlp_outputs``, biases
    included too, are kept if asked for.
    """

    residuals: list[Float[Tensor, "prompt position d_model"]]
    z: list[Float[Tensor, "prompt position head d_head"]]
    attention_outputs: list[Float[Tensor, "prompt position d_model"]]
    mlp_outputs: list[Float[Tensor, "prompt position d_model"]]
    final_residual: Float[Tensor, "prompt position d_model"]

    @property
    def outputs(self) -> list[Float[Tensor, "prompt position d_model"]]:
        """By component, in order of depth: the attention's and the MLP's of every layer."""
        return [output for pair in zip(self.attention_outputs, self.mlp_outputs, strict=True) for output in pair]


@contextmanager
def float32_residual(model: Model) -> Iterator[None]:
    """Inside, a model with 16-bit weights multiplies in 16 bits, but its residual stream and norms are float32.

    What an ablation changes is a small part of the residual stream: in 16 bits its rounding would drown it.
    """
    if model.dtype not in (torch.bfloat16, torch.float16):
        yield
        return

    def widen(_: nn.Module, positional: tuple, named: dict) -> tuple[tuple, dict]:
        residual = (positional[0] if positional else named["hidden_states"]).float()
        return ((residual, *positional[1:]), named) if positional else ((), {**named, "hidden_states": residual})

    handle = model.blocks[0].register_forward_pre_hook(widen, with_kwargs=True, prepend=True)
    try:
        with torch.autocast(model.device.type, dtype=model.dtype):
            yield
    finally:
        handle.remove()


class Replay:
    """Runs single blocks with the arguments that the model itself gives them.

    The arguments (masks, rotary tables, position ids) are recorded on a pass over one prompt: their
    batch dimension is 1 and broadcasts over any batch of unpadded prompts of the same length.
    """

    def __init__(self, model: Model, prompt_len: int):
        self.model = model
        self._arguments: list[tuple[tuple, dict]] = []

        def record(_: nn.Module, positional: tuple, named: dict) -> None:
            self._arguments.append((positional[1:], {k: v for k, v in named.items() if k != "hidden_states"}))

        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in model.blocks]
        try:
            tokens = torch.zeros(1, prompt_len, dtype=torch.long, device=model.device)
            with float32_residual(model):
                model.hf.base_model(input_ids=tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def block(self, layer: int, residual: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_model"]:
        """Output of block ``layer`` for the residual stream before it."""
        positional, named = self._arguments[layer]
        with float32_residual(self.model):
            output = self.model.blocks[layer](residual, *positional, **named)
        return output[0] if isinstance(output, tuple) else output

    def block_given_attention(
        self, layer: int, residual: Float[Tensor, "batch position d_model"], attention_output: Float[Tensor, "batch position d_model"]
    ) -> Float[Tensor, "batch position d_model"]:
        """The same with the attention's output given instead of computed."""
        attention = self.model.attentions[layer]
        attention.forward = lambda *_, **__: (attention_output, None)
        try:
            return self.block(layer, residual)
        finally:
            del attention.forward


@torch.no_grad()
def run_clean(model: Model, tokens: Int[Tensor, "prompt position"], mlps: bool = False) -> CleanRun:
    """The clean pass over ``tokens``, without the unembedding; ``mlps``: keep what MLPs write, too."""
    residuals: list[Tensor] = []
    z: list[Tensor] = []
    outputs: list[Tensor] = []
    mlp_outputs: list[Tensor] = []
    final: list[Tensor] = []

    def before_block(_: nn.Module, positional: tuple, named: dict) -> None:
        residuals.append(positional[0] if positional else named["hidden_states"])

    def after_projection(_: nn.Module, positional: tuple, output: Tensor) -> None:
        z.append(positional[0].unflatten(-1, (model.n_heads, -1)))
        outputs.append(output)

    handles = [block.register_forward_pre_hook(before_block, with_kwargs=True) for block in model.blocks]
    handles += [projection.register_forward_hook(after_projection) for projection in model.output_projections]
    handles.append(model.final_norm.register_forward_pre_hook(lambda _, positional: final.append(positional[0])))
    if mlps:
        keep = lambda _, positional, output: mlp_outputs.append(output)  # noqa: E731
        handles += [projection.register_forward_hook(keep) for projection in model.mlp_output_projections]
    try:
        with float32_residual(model):
            model.hf.base_model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    mlp_outputs = [output.view_as(final[0]) for output in mlp_outputs]  # some architectures flatten the batch
    return CleanRun(residuals, z, outputs, mlp_outputs, final[0])


@torch.no_grad()
def carry(
    model: Model,
    replay: Replay,
    clean: CleanRun,
    layer: int,
    delta: Float[Tensor, "variant prompt position d_model"],
) -> Float[Tensor, "variant prompt position d_model"]:
    """Final residuals after adding each ``delta`` to the attention output of ``layer``; only what is above it runs.

    All variants run in one batch, variants outermost; what modules see on the way can be had by :func:`watching` them.
    """
    n = delta.shape[0]
    if model.parallel:
        after = clean.residuals[layer + 1] if layer + 1 < model.n_layers else clean.final_residual
        residual = (after + delta).flatten(0, 1)
    else:
        before = clean.residuals[layer].expand(n, -1, -1, -1).flatten(0, 1)
        residual = replay.block_given_attention(layer, before, (clean.attention_outputs[layer] + delta).flatten(0, 1))
    for above in range(layer + 1, model.n_layers):
        residual = replay.block(above, residual)
    return residual.unflatten(0, (n, -1))


@contextmanager
def watching(modules: Sequence[nn.Module], see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls ``see(index, input, output)`` whenever one of ``modules`` runs inside the ``with`` block."""

    def hook(index: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda _, positional, output: see(index, positional[0], output)

    handles = [module.register_forward_hook(hook(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
