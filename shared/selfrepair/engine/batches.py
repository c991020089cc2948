"""How many prompts and heads go through a model at once, and batches in which prompts meet their donors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from selfrepair.models.devices import unless_out_of_memory

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

CLEAN_RUN_BYTES = 1 << 30
#: Prompts, times heads ablated, in one forward pass on the CPU: more only spills out of the caches.
CPU_ROWS = 8


def partner_batches(n_prompts: int, pairs_at_once: int) -> Iterator[Int[Tensor, " prompt"]]:
    """Indices of all prompts, in batches of some ``i`` and then, in the same order, ``i + n_prompts/2``."""
    half = n_prompts // 2
    for batch in torch.arange(half).split(pairs_at_once):
        yield torch.cat([batch, batch + half])


def pairs_that_fit(model: Model, prompt_len: int) -> int:
    """Pairs of prompts whose clean runs take no more than a gibibyte."""
    one_prompt = 3 * model.n_layers * prompt_len * model.hf.config.hidden_size * model.dtype.itemsize
    return max(1, CLEAN_RUN_BYTES // (2 * one_prompt))


def pairs_at_once(model: Model, prompt_len: int, clean_runs: int = 1) -> int:
    """Pairs of prompts for a pass in which something is ablated, beside which ``clean_runs`` are held."""
    return max(1, min(rows_that_fit(model, prompt_len) // 2, pairs_that_fit(model, prompt_len) // clean_runs))


def prompts_that_fit(model: Model, prompt_len: int) -> int:
    """An even number of them."""
    return 2 * pairs_that_fit(model, prompt_len)


def rows_that_fit(model: Model, prompt_len: int) -> int:
    """Prompts × heads for one pass: what a CPU's caches, or half of a GPU's free memory, hold."""
    if model.device.type != "cuda":
        return CPU_ROWS
    free, _ = torch.cuda.mem_get_info(model.device)
    width = 32 * model.hf.config.hidden_size  # of all activations alive in a block, generously
    return max(1, free // (2 * prompt_len * width * model.dtype.itemsize))


def in_halves(work: Callable[[int, int], bool], n: int, at_once: int) -> None:
    """``work(first, last)`` on ranges that cover ``n``; one too large for the device's memory in halves.

    Raises:
        torch.OutOfMemoryError: a range of one is too large.
    """
    pending = [(first, min(first + at_once, n)) for first in range(0, n, at_once)]
    while pending:
        first, last = pending.pop(0)
        if unless_out_of_memory(partial(work, first, last)):
            continue
        if last - first == 1:
            raise torch.OutOfMemoryError("what is run at once cannot be divided further")
        middle = (first + last) // 2
        pending[:0] = [(first, middle), (middle, last)]
