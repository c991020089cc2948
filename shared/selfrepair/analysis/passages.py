"""Stretches of text with a number for each token, which notebooks show in colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

#: Tokens that are shown before a token and after it.
BEFORE, AFTER = 40, 12


@dataclass(frozen=True)
class Passage:
    """Tokens as text, each with a value (logits; NaN where it has none); ``marked`` is the index of one."""

    heading: str
    tokens: Sequence[str]
    values: Float[np.ndarray, " token"]
    marked: int | None = None


def of_next_tokens(values: Float[np.ndarray, " position"]) -> Float[np.ndarray, " token_position"]:
    """Values of positions as those of the tokens that are predicted there; the first token has none (NaN)."""
    return np.concatenate([[np.nan], np.asarray(values, dtype=np.float64)])


def around(
    heading: str, tokens: Sequence[str], values: Float[np.ndarray, " position"], position: int
) -> Passage:
    """What stands around the token of a prompt that is predicted at ``position``, which is marked."""
    first = max(0, position + 1 - BEFORE)
    here = slice(first, position + 2 + AFTER)
    return Passage(heading, tokens[here], of_next_tokens(values)[here], position + 1 - first)


def colour_limit(passages: Sequence[Passage]) -> float:
    """Where colours may be at their strongest: 95% of the values lie within; 1 if there are none but 0."""
    values = np.abs(np.concatenate([passage.values for passage in passages] or [np.zeros(1)]))
    return float(np.nanquantile(values, 0.95)) or float(np.nanmax(values)) or 1.0
