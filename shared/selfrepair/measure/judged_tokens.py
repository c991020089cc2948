"""The tokens on which heads are judged: where a head matters most, and where it hardly matters."""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Bool, Int

from selfrepair.statistics import CONTROL, TOP, select_top

SELECTED = (TOP, CONTROL)
#: Of all tokens, those with the smallest absolute direct effect of a head: its control tokens.
SMALL = 0.5


def judged_tokens(
    swept: xr.Dataset, fraction: float, prompts: Int[np.ndarray, " some_prompt"]
) -> Bool[np.ndarray, "selection layer head some_prompt position"]:
    """Each head's tokens of some prompts, selected among those of all prompts of the measurement ``heads``.

    In the order of ``SELECTED``. A head's control tokens are only those of prompts that hold a top token of
    it: no other prompt need run without the head.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    n_layers, n_heads, _, n_positions = swept["direct_effect"].shape
    judged = np.zeros((len(SELECTED), n_layers, n_heads, len(prompts), n_positions), dtype=bool)
    for layer in range(n_layers):
        for head, direct_effect in enumerate(swept["direct_effect"][layer].values):
            top = select_top(direct_effect, fraction)
            small = select_top(-np.abs(direct_effect), SMALL)
            judged[:, layer, head] = np.stack([top, small & ~top & top.any(-1, keepdims=True)])[:, prompts]
    return judged
