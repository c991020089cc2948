"""Selecting tokens and layers, shares of a direct effect, and how often a bootstrap draws each prompt."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from selfrepair.errors import UserError

#: A head: its layer, and its number in the layer.
Head = tuple[int, int]
#: What repairs, as columns of tables call it.
PARTS = ("layernorm", "heads", "mlps")
#: Tokens on which the direct effect is largest, and those, none of the first, on which it is small.
TOP, CONTROL = "top", "control"


def select_top(
    direct_effect: Float[np.ndarray, "prompt position"], fraction: float
) -> Bool[np.ndarray, "prompt position"]:
    """The ``fraction`` of token positions with the largest signed direct effect, rounded up; ties by order.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction must lie in (0, 1], not {fraction}")
    flat = direct_effect.ravel()
    count = max(1, int(np.ceil(fraction * flat.size - 1e-9)))
    smallest = np.partition(flat, flat.size - count)[flat.size - count]  # of those selected
    selected = flat > smallest
    ties = np.flatnonzero(flat == smallest)
    selected[ties[: count - selected.sum()]] = True
    return selected.reshape(direct_effect.shape)


def check_fraction(fraction: float, n_tokens: int) -> None:
    """Refuses a share of so few tokens that none is left.

    Raises:
        UserError: ``fraction`` of ``n_tokens`` is less than one token.
    """
    if fraction > 0 and 1 / fraction > n_tokens:
        raise UserError(
            f"fraction {fraction!r} of {n_tokens} tokens is less than one token: raise it or n_prompts"
        )


def clipped_share(
    part: Float[np.ndarray, "*token"], direct_effect: Float[np.ndarray, "*token"]
) -> Float[np.ndarray, "*token"]:
    """``clip(part / direct_effect, 0, 1)`` per token, 0 where there is none (Rushing & Nanda 2024, §4)."""
    ratio = np.divide(part, direct_effect, out=np.zeros_like(part), where=direct_effect != 0)
    return np.clip(ratio, 0, 1)


def bootstrap_weights(
    n_prompts: int, n_samples: int = 1000, seed: int = 0
) -> Float[np.ndarray, "sample prompt"]:
    """How often each prompt is drawn in each bootstrap sample of ``n_prompts`` prompts."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=n_samples).astype(np.float64)


def later_half(n_layers: int) -> int:
    """First layer of the later half."""
    return round(0.5 * n_layers)
