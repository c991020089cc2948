"""One clean pass, and what every head's ablation does to it: the engine's hot path.

A head's ablation is carried through the blocks above it only, for all heads of a layer at once,
stacked along the batch; nothing the size of the vocabulary is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.direct_effect import FinalNorm, token_directions
from selfrepair.models import Model
from selfrepair.replacement import Replacement
from selfrepair.replay import Replay, carry, run_clean, watching

#: Prompts, times heads ablated, in one forward pass on the CPU: more only spills out of the caches.
CPU_ROWS = 8


@dataclass(frozen=True)
class HeadAblations:
    """Effects of ablating each head of the layers swept, in logits; definitions in the design's terms.

    All but ``sigma_clean`` (``[prompt, position]``) are ``[layer, head, prompt, position]``; the last
    position, which has no next token, is dropped.
    """

    direct_effect: Tensor
    ablated_direct_effect: Tensor
    logit_change: Tensor
    self_repair_heads: Tensor
    self_repair_mlps: Tensor
    sigma_ablated: Tensor
    sigma_clean: Tensor


@torch.no_grad()
def ablate_heads(
    model: Model,
    tokens: Int[Tensor, "prompt position"],
    replacement: Replacement,
    layers: range | None = None,
    rows: int | None = None,
) -> HeadAblations:
    """Ablates every head of ``layers`` (all), one at a time, on every prompt at all positions.

    ``rows`` bounds the prompts × heads in one pass, and with it the memory; by default what the caches
    of a CPU or the free memory of a GPU hold. A pass that runs out of memory is done again in halves.
    Rushing & Nanda 2024, §2 and §4.
    """
    clean = run_clean(model, tokens)
    rows = rows_that_fit(model, tokens.shape[1]) if rows is None else rows
    replay = Replay(model, tokens.shape[1])
    norm = FinalNorm.of(model.final_norm)
    direction, _ = token_directions(model, tokens)
    padded = nn.functional.pad(direction, (0, 0, 0, 1))

    def read(residual: Tensor) -> Tensor:
        """``u · r``, not divided by σ; ``[..., prompt, position-1]``."""
        return torch.linalg.vecdot(residual.to(direction.dtype), padded)[..., :-1]

    sigma = norm.sigma(clean.final_residual[:, :-1])
    clean_read = read(clean.final_residual)
    attention_read = [read(output) for output in clean.attention_outputs]
    parts: list[tuple[Tensor, ...]] = []
    for layer in range(model.n_layers) if layers is None else layers:
        z, bias, W_O = clean.z[layer], model.value_biases[layer], model.W_O(layer)
        replaced = replacement(layer, z)
        along = torch.einsum("pkd,hed->pkhe", direction, W_O.to(direction.dtype))  # u W_Oᵀ, per head
        effect, ablated_effect = (
            torch.einsum("pkhe,pkhe->hpk", (x - bias)[:, :-1].to(direction.dtype), along) / sigma for x in (z, replaced)
        )
        change = replaced - z
        logits, sigmas, heads, reads = (torch.empty_like(effect) for _ in range(4))
        for chunk in _chunks(model, tokens.shape[0], rows):
            with chunk as (first, last):
                delta = torch.einsum("pkhe,hed->hpkd", change[:, :, first:last], W_O[first:last])
                downstream = torch.zeros_like(heads[first:last])
                with watching(model.output_projections[layer + 1 :], lambda _, __, output, total=downstream: _add(total, read, output)):
                    final = carry(model, replay, clean, layer, delta)
                heads[first:last] = (downstream - sum(attention_read[layer + 1 :], torch.zeros_like(clean_read))) / sigma
                reads[first:last] = read(final) - clean_read
                sigmas[first:last] = norm.sigma(final[..., :-1, :])
                logits[first:last] = (reads[first:last] + clean_read) / sigmas[first:last] - clean_read / sigma
        unchanged = ~change.flatten(3).ne(0).any(-1).any(0).any(0)
        mlps = reads / sigma - (ablated_effect - effect) - heads
        if model.parallel and layer == model.n_layers - 1:
            mlps.zero_()  # nothing is above; rounding would leave 1e-6
        for tensor in (logits, heads, mlps):
            tensor[unchanged] = 0  # exactly, where rounding of differently stacked passes would leave 1e-7
        sigmas[unchanged] = sigma
        parts.append((effect, ablated_effect, logits, heads, mlps, sigmas))
    return HeadAblations(*map(torch.stack, zip(*parts, strict=True)), sigma)


def rows_that_fit(model: Model, prompt_len: int) -> int:
    """Prompts × heads for one pass: what a CPU's caches, or half of a GPU's free memory, hold."""
    if model.device.type != "cuda":
        return CPU_ROWS
    free, _ = torch.cuda.mem_get_info(model.device)
    width = 32 * model.hf.config.hidden_size  # of all activations alive in a block, generously
    return max(1, free // (2 * prompt_len * width * model.dtype.itemsize))


def _add(total: Float[Tensor, "variant prompt read_position"], read: Callable[[Tensor], Tensor], output: Tensor) -> None:
    total += read(output.unflatten(0, total.shape[:2]))


def _chunks(model: Model, n_prompts: int, rows: int) -> Iterator[_Chunk]:
    """Ranges of heads that together cover the layer; a range that ran out of memory is given again in halves."""
    pending = [(h, min(h + max(1, rows // n_prompts), model.n_heads)) for h in range(0, model.n_heads, max(1, rows // n_prompts))]
    while pending:
        chunk = _Chunk(*pending.pop(0))
        yield chunk
        if chunk.out_of_memory is not None:
            if chunk.last - chunk.first == 1:
                raise chunk.out_of_memory
            middle = (chunk.first + chunk.last) // 2
            pending[:0] = [(chunk.first, middle), (middle, chunk.last)]


class _Chunk:
    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self.out_of_memory: BaseException | None = None

    def __enter__(self) -> tuple[int, int]:
        return self.first, self.last

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, torch.OutOfMemoryError):
            self.out_of_memory = error
            torch.cuda.empty_cache()
            return True
        return False
