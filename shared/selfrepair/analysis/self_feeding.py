"""Self-feeding: slopes of a head's direct effect after it was fed on that before, measured and released."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.estimates import Estimate, draws
from selfrepair.analysis.published import published_self_feeding
from selfrepair.statistics import later_half

#: What is fed: names in the released table and in what is measured.
OWN_OUTPUT, RANDOM_DIRECTION = "own_output", "random_direction"


def slopes(fed: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """``[fed, vector, scale]``: least squares with intercept over all tokens; samples draw whole prompts.

    ``fed`` is what :class:`selfrepair.measure.self_feeding.SelfFeeding` measured of a model.
    """
    weights = draws(fed.sizes["prompt"], n_bootstrap, seed)
    x = fed["before"].values.astype(np.float64)[:, None, None]
    y = fed["after"].values.astype(np.float64)
    n = x.shape[-1] * weights.sum(1)
    sum_x, sum_y, sum_xx, sum_xy = (sums.sum(-1) @ weights.T for sums in (x, y, x * x, x * y))
    return Estimate((n * sum_xy - sum_x * sum_y) / (n * sum_xx - sum_x**2))


def self_feeding_table(model_name: str, fed: xr.Dataset) -> pd.DataFrame:
    """One row per head, vector and scale, in the published table's columns, and the slope's interval."""
    found = slopes(fed)
    low, high = found.interval()
    before, after = fed["before"].values, fed["after"].values
    rows = []
    for i, v, s in np.ndindex(*after.shape[:3]):
        rows.append(
            {
                "model": model_name,
                "layer": int(fed["layer"][i]),
                "head": int(fed["head"][i]),
                "rank_by_mean_direct_effect": int(fed["rank"][i]),
                "added_vector": fed.attrs["vectors"][v],
                "scale": int(fed["scale"][s]),
                "n_tokens": after[i, v, s].size,
                "mean_direct_effect_before": before[i].mean(dtype=np.float64),
                "mean_direct_effect_after": after[i, v, s].mean(dtype=np.float64),
                "slope_after_on_before": found.value[i, v, s],
                "median_before": np.median(before[i]),
                "median_after": np.median(after[i, v, s]),
                "slope_low": low[i, v, s],
                "slope_high": high[i, v, s],
            }
        )
    return pd.DataFrame(rows)


def slope_statistics(fed: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Slopes at the largest scale, heads of the later half of the layers, by ids of ``statistics.yaml``.

    The largest and the smallest are sought anew in every sample.
    """
    later = np.flatnonzero(fed["layer"].values >= later_half(fed.attrs["n_layers"]))
    found = slopes(fed, n_bootstrap, seed)[later, :, -1]
    own, direction = (
        found[:, fed.attrs["vectors"].index(vector)] for vector in (OWN_OUTPUT, RANDOM_DIRECTION)
    )
    return {
        "largest-own-slope": own.map(lambda drawn: drawn.max(0)),
        "smallest-own-slope": own.map(lambda drawn: drawn.min(0)),
        "random-direction-slope": direction.mean(),
    }


def published_statistics() -> dict[str, dict[str, Estimate]]:
    """The same by model, without samples, over the four released heads of each."""
    table = published_self_feeding()
    largest = table[table["scale"] == table["scale"].max()]
    found = {}
    for model_name, rows in largest.groupby("model", sort=False):
        slope = rows.groupby("added_vector")["slope_after_on_before"]
        found[str(model_name)] = {
            "largest-own-slope": Estimate.bare(slope.max()[OWN_OUTPUT]),
            "smallest-own-slope": Estimate.bare(slope.min()[OWN_OUTPUT]),
            "random-direction-slope": Estimate.bare(slope.mean()[RANDOM_DIRECTION]),
        }
    return found
