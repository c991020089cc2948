"""What the claims of iterative inference are about (Rushing & Nanda 2024, §5.3).

If layers refine a common estimate in small steps, heads react to their own output already being there,
neighbouring layers write alike, and every block moves the residual stream down the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.cosines import DISTANT, neighbours_in_random_order, neighbours_minus_distant
from selfrepair.analysis.estimates import Estimate, mean_over_prompts
from selfrepair.analysis.self_feeding import slope_statistics


def iterative_statistics(
    fed: xr.Dataset, cosines: xr.Dataset, aligned: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """By ids of ``statistics.yaml``, from a model's ``self_feeding``, ``cosines`` and ``alignment``.

    Models with fewer than four layers have no layers three apart, and lack that statistic and its control.
    """
    found = slope_statistics(fed, n_bootstrap, seed)
    found["gradient-alignment"] = mean_over_prompts(aligned["gradient"].values.mean(0), n_bootstrap, seed)
    if cosines.sizes["layer"] > DISTANT:
        found["neighbour-cosine-gap"] = neighbours_minus_distant(cosines, n_bootstrap, seed)
        found["neighbour-cosine-gap-of-orders"] = neighbours_in_random_order(cosines, n_bootstrap, seed)
    return found


def alignment_table(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Of every model's ``alignment``: does it descend, and how good is the guess that is read out on the way?

    ``descent``: mean cosine of updates with minus the gradient, over all blocks, in thousandths, with its
    interval ``low`` to ``high``; ``largest block``: the largest mean of one block. ``loss before`` and ``loss
    after`` all blocks (nats), and in which blocks, counted from 0 as layers are, it ``rises``.
    """
    rows = []
    for model_name, aligned in found.items():
        descent = mean_over_prompts(1000 * aligned["gradient"].values.mean(0))
        low, high = descent.interval()
        loss = aligned["loss"].mean("prompt").values
        rows.append(
            {
                "model": model_name,
                "descent": float(descent.value),
                "low": float(low),
                "high": float(high),
                "largest block": 1000 * float(aligned["gradient"].mean("prompt").max()),
                "loss before": float(loss[0]),
                "loss after": float(loss[-1]),
                "rises": ", ".join(str(block) for block in np.flatnonzero(np.diff(loss) > 0)),
            }
        )
    return pd.DataFrame(rows).set_index("model")
