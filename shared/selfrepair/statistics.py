"""Selecting tokens, shares of a direct effect, and intervals by bootstrap over prompts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from selfrepair.errors import UserError


def select_top(direct_effect: Float[np.ndarray, "prompt position"], fraction: float) -> Bool[np.ndarray, "prompt position"]:
    """The ``fraction`` of token positions with the largest signed direct effect, rounded up; ties by order.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction must lie in (0, 1], not {fraction}")
    flat = direct_effect.ravel()
    count = max(1, int(np.ceil(fraction * flat.size - 1e-9)))
    chosen = np.argsort(-flat, kind="stable")[:count]
    selected = np.zeros(flat.size, dtype=bool)
    selected[chosen] = True
    return selected.reshape(direct_effect.shape)


def clipped_share(part: Float[np.ndarray, "*token"], direct_effect: Float[np.ndarray, "*token"]) -> Float[np.ndarray, "*token"]:
    """``clip(part / direct_effect, 0, 1)`` per token; 0 where the direct effect is 0 (Rushing & Nanda 2024, §5)."""
    ratio = np.divide(part, direct_effect, out=np.zeros_like(part), where=direct_effect != 0)
    return np.clip(ratio, 0, 1)


def selected_means(
    values: Float[np.ndarray, "layer head prompt position"],
    chosen: Bool[np.ndarray, "layer head prompt position"],
    weights: Float[np.ndarray, "sample prompt"],
) -> Float[np.ndarray, "layer head sample"]:
    """Mean of each head's chosen tokens for each sample of prompts; NaN where a sample has none of them."""
    totals = np.where(chosen, values, 0).sum(-1) @ weights.T
    counts = chosen.sum(-1) @ weights.T
    return totals / np.where(counts, counts, np.nan)


def bootstrap_weights(n_prompts: int, n_samples: int = 1000, seed: int = 0) -> Float[np.ndarray, "sample prompt"]:
    """How often each prompt is drawn in each bootstrap sample of ``n_prompts`` prompts."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=n_samples).astype(np.float64)


def bootstrap_ratio(
    numerator: Float[np.ndarray, "*head prompt"],
    denominator: Float[np.ndarray, "*head prompt"],
    weights: Float[np.ndarray, "sample prompt"],
    level: float = 0.95,
) -> tuple[Float[np.ndarray, "*head"] | float, Float[np.ndarray, "*head"] | float]:
    """Percentile interval of ``Σ numerator / Σ denominator`` when whole prompts are drawn with replacement.

    With token sums as numerator and token counts as denominator this is the interval of a mean over
    tokens that respects that tokens of one prompt are not independent. Samples in which the
    denominator is 0 are left out.
    """
    top, bottom = numerator @ weights.T, denominator @ weights.T
    ratios = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return low, high
