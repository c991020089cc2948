"""Blocks run again at one position of prompts whose other positions stay as the clean run has them.

What changes at one position changes nothing before it, and what it changes later is not asked here. So one
token per row is enough, with the keys and values of the clean run before it: hundreds of rows cost what a few
whole prompts do, and each gives what a pass over the whole changed prompt would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from selfrepair.engine.forward import Blocks, block_arguments
from selfrepair.engine.hooks import Arguments
from selfrepair.models.loading import Model

#: Bytes of keys and values of the rows that run at once.
ROWS_BYTES = 1 << 26


@dataclass(frozen=True)
class CleanKeys:
    """Keys and values of a clean run, by layer."""

    model: Model
    tokens: Int[Tensor, "prompt position"]
    keys: list[Float[Tensor, "prompt key_head position d_key"]]
    values: list[Float[Tensor, "prompt key_head position d_value"]]

    @classmethod
    def of(cls, model: Model, tokens: Int[Tensor, "prompt position"], cache: DynamicCache) -> CleanKeys:
        """Those that a clean pass over ``tokens`` has left in ``cache``."""
        layers: list[Any] = cache.layers
        return cls(model, tokens, [layer.keys for layer in layers], [layer.values for layer in layers])


class OnePosition:
    """Runs rows of residuals at one position; each row belongs to a prompt, whose earlier tokens it sees."""

    @torch.no_grad()
    def __init__(self, clean: CleanKeys, position: int):
        self.clean, self.position, self._cache = clean, position, DynamicCache()
        for layer, (keys, values) in enumerate(zip(clean.keys, clean.values, strict=True)):
            self._cache.update(keys[:1, :, :position], values[:1, :, :position], layer)
        here = clean.tokens[:1, position : position + 1]
        self._arguments = block_arguments(clean.model, here, past_key_values=self._cache, use_cache=True)

    def rows_at_once(self) -> int:
        """How many rows of keys and values take no more than ``ROWS_BYTES``."""
        of_layer = max(
            keys[0, :, 0].numel() * keys.element_size() + values[0, :, 0].numel() * values.element_size()
            for keys, values in zip(self.clean.keys, self.clean.values, strict=True)
        )
        return max(1, ROWS_BYTES // (of_layer * (self.position + 1)))

    def rows_of(self, prompt: Int[Tensor, " row"]) -> Blocks:
        """Blocks for rows of these prompts: what is given and returned is ``[row, 1, d_model]``."""
        return _Rows(self, prompt)


class _Rows(Blocks):
    def __init__(self, at: OnePosition, prompt: Int[Tensor, " row"]):
        super().__init__(at.clean.model)
        self._at, self._prompt = at, prompt

    def arguments(self, layer: int) -> Arguments:
        """Those of the recorded pass, with the rows' own keys and values in the place of its one prompt's."""
        at = self._at
        positional, named = at._arguments[layer]
        cache = _RowsCache(at, layer, self._prompt)

        def own(given: object) -> object:
            return cache if given is at._cache else given

        return tuple(map(own, positional)), {name: own(value) for name, value in named.items()}


class _RowsCache(DynamicCache):
    """Keys and values that rows attend to: the clean run's before the position, and their own there."""

    def __init__(self, at: OnePosition, layer: int, prompt: Int[Tensor, " row"]):
        super().__init__()
        self._at, self._layer, self._prompt = at, layer, prompt

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._at.clean.keys[self._layer], self._at.clean.values[self._layer]
        return self._with_own(keys, key_states), self._with_own(values, value_states)

    def _with_own(
        self,
        clean: Float[Tensor, "prompt key_head position width"],
        own: Float[Tensor, "row key_head 1 width"],
    ) -> Float[Tensor, "row key_head position_before width"]:
        rows = clean[self._prompt, :, : self._at.position + 1]  # gathered once: keys are most of the work
        rows[:, :, -1:] = own
        return rows
