"""What the claims of iterative inference are about (Rushing & Nanda 2024, §5.3).

If layers refine a common estimate in small steps, heads react to their own output already being there,
neighbouring layers write alike, and every block moves the residual stream down the gradient of the loss.
"""

from __future__ import annotations

import xarray as xr

from selfrepair.analysis.cosines import neighbours_minus_distant
from selfrepair.analysis.estimates import Estimate, mean_over_prompts
from selfrepair.analysis.self_feeding import slope_statistics


def iterative_statistics(
    fed: xr.Dataset, cosines: xr.Dataset, aligned: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """By ids of ``statistics.yaml``, from a model's ``self_feeding``, ``cosines`` and ``alignment``.

    Models with fewer than four layers have no layers three apart, and lack that statistic.
    """
    found = slope_statistics(fed, n_bootstrap, seed)
    found["gradient-alignment"] = mean_over_prompts(aligned["gradient"].values.mean(0), n_bootstrap, seed)
    if cosines.sizes["layer"] >= 4:
        found["neighbour-cosine-gap"] = neighbours_minus_distant(cosines, n_bootstrap, seed)
    return found
