"""Each head's tokens, and the floor of a clipped share."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from selfrepair.statistics import clipped_share, select_top


def select_each_top(
    direct_effect: Float[np.ndarray, "layer head prompt position"], fraction: float
) -> Bool[np.ndarray, "layer head prompt position"]:
    """:func:`select_top` for every head."""
    return np.stack([[select_top(head, fraction) for head in layer] for layer in direct_effect])


def clipped_floor(
    part: Float[np.ndarray, "*token"], direct_effect: Float[np.ndarray, "*token"]
) -> Float[np.ndarray, "*token"]:
    """``½ min(|part / direct_effect|, 1)`` per token, 0 where there is no direct effect.

    The mean of :func:`clipped_share` over both signs of ``part``: the share that clipping makes of noise.
    """
    return (clipped_share(part, direct_effect) + clipped_share(-part, direct_effect)) / 2
