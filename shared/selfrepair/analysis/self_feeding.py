"""Self-feeding: slopes of a head's direct effect after it was fed on that before, measured and released."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from selfrepair.analysis.estimates import Estimate, draws
from selfrepair.analysis.published import published_self_feeding

#: What is fed: names in the released table and in what is measured.
OWN_OUTPUT, RANDOM_DIRECTION = "own_output", "random_direction"
#: How a vector is added and the effect read: as defined here, as released, and in a changed context.
ONE_POSITION, RELEASED, EVERYWHERE = (
    "one position",
    "one position, fed run's final norm",
    "every position at once",
)


def slopes(fed: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """``[fed, vector, scale]``: least squares with intercept over all tokens; samples draw whole prompts.

    ``fed`` is what :class:`selfrepair.measure.self_feeding.SelfFeeding` measured of a model.
    """
    return _least_squares(fed, fed["after"], n_bootstrap, seed)


def slopes_rescaled(fed: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """``[fed, vector]`` at the largest scale, read with the fed run's final norm, as by the released code."""
    return _least_squares(fed, fed["after"].isel(scale=-1) * fed["sigma_ratio"], n_bootstrap, seed)


def slopes_everywhere(fed: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """``[fed]`` at the largest scale, own output, added at every position at once."""
    return _least_squares(fed, fed["after_everywhere"], n_bootstrap, seed)


def _least_squares(fed: xr.Dataset, after: xr.DataArray, n_bootstrap: int, seed: int) -> Estimate:
    """Slopes of ``after [fed, *what, prompt, position]`` on what was before."""
    weights = draws(fed.sizes["prompt"], n_bootstrap, seed)
    y = after.values.astype(np.float64)
    x = fed["before"].values.astype(np.float64)
    x = x.reshape(len(x), *(1,) * (y.ndim - x.ndim), *x.shape[1:])
    n = x.shape[-1] * weights.sum(1)
    sum_x, sum_y, sum_xx, sum_xy = (sums.sum(-1) @ weights.T for sums in (x, y, x * x, x * y))
    return Estimate((n * sum_xy - sum_x * sum_y) / (n * sum_xx - sum_x**2))


def self_feeding_table(model_name: str, fed: xr.Dataset) -> pd.DataFrame:
    """One row per head, vector and scale: the published table's columns, the slope's interval, comparisons.

    ``slope_rescaled`` and ``slope_everywhere`` are NaN where they were not measured.
    """
    found = slopes(fed)
    low, high = found.interval()
    rescaled, everywhere = slopes_rescaled(fed, 0).value, slopes_everywhere(fed, 0).value
    before, after = fed["before"].values, fed["after"].values
    largest = after.shape[2] - 1
    rows = []
    for i, v, s in np.ndindex(*after.shape[:3]):
        vector = fed.attrs["vectors"][v]
        rows.append(
            {
                "model": model_name,
                "layer": int(fed["layer"][i]),
                "head": int(fed["head"][i]),
                "rank_by_mean_direct_effect": int(fed["rank"][i]),
                "added_vector": vector,
                "scale": int(fed["scale"][s]),
                "n_tokens": after[i, v, s].size,
                "mean_direct_effect_before": before[i].mean(dtype=np.float64),
                "mean_direct_effect_after": after[i, v, s].mean(dtype=np.float64),
                "slope_after_on_before": found.value[i, v, s],
                "median_before": np.median(before[i]),
                "median_after": np.median(after[i, v, s]),
                "slope_low": low[i, v, s],
                "slope_high": high[i, v, s],
                "slope_rescaled": rescaled[i, v] if s == largest else np.nan,
                "slope_everywhere": everywhere[i] if s == largest and vector == OWN_OUTPUT else np.nan,
            }
        )
    return pd.DataFrame(rows)


def slopes_by_way(model_name: str, fed: xr.Dataset) -> pd.DataFrame:
    """Mean slopes over the heads fed, at the largest scale, a row for each ``vector`` and ``way``."""
    defined, released = slopes(fed)[:, :, -1].mean(), slopes_rescaled(fed).mean()
    found = {}
    for v, vector in enumerate(fed.attrs["vectors"]):
        found[vector, ONE_POSITION], found[vector, RELEASED] = defined[v], released[v]
    found[OWN_OUTPUT, EVERYWHERE] = slopes_everywhere(fed).mean()
    rows = [
        estimate.table({}, model=model_name, vector=vector, way=way)
        for (vector, way), estimate in found.items()
    ]
    return pd.concat(rows, ignore_index=True)


def slope_statistics(fed: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Slopes at the largest scale over the heads fed, by ids of ``statistics.yaml``.

    The head with the largest or the smallest slope is chosen on the prompts of even number, and its slope
    comes from those of odd number: the largest of many noisy slopes, taken where it was sought, is too large.
    """
    even, odd = (fed.isel(prompt=slice(first, None, 2)) for first in (0, 1))
    chosen_by = slopes(even, 0).value[..., -1]
    of_chosen, of_all = (slopes(part, n_bootstrap, seed)[:, :, -1] for part in (odd, fed))
    own, direction = (fed.attrs["vectors"].index(vector) for vector in (OWN_OUTPUT, RANDOM_DIRECTION))
    return _statistics(
        Slopes(chosen_by[:, own], of_chosen[:, own], of_all[:, own]),
        Slopes(chosen_by[:, direction], of_chosen[:, direction], of_all[:, direction]),
    )


def published_statistics() -> dict[str, dict[str, Estimate]]:
    """The same by model, over the four released heads of each; without samples, and without another half."""
    table = published_self_feeding()
    largest = table[table["scale"] == table["scale"].max()]
    found = {}
    for model_name, rows in largest.groupby("model", sort=False):
        own, direction = (
            Estimate.bare(rows.loc[rows["added_vector"] == vector, "slope_after_on_before"].to_numpy())
            for vector in (OWN_OUTPUT, RANDOM_DIRECTION)
        )
        found[str(model_name)] = _statistics(
            Slopes(own.value, own, own), Slopes(direction.value, direction, direction)
        )
    return found


@dataclass(frozen=True)
class Slopes:
    """Of all heads fed one kind of vector: what heads are chosen by, what is told of these, and of all."""

    chosen_by: Float[np.ndarray, " fed"]
    of_chosen: Estimate
    of_all: Estimate

    @property
    def largest(self) -> Estimate:
        return self.of_chosen[int(np.argmax(self.chosen_by))]

    @property
    def smallest(self) -> Estimate:
        return self.of_chosen[int(np.argmin(self.chosen_by))]

    @property
    def distance(self) -> Estimate:
        """Mean over heads of ``|slope − 1|``; a head's side of 1 is the estimate's, in every sample."""
        return ((self.of_all - 1) * np.sign(self.of_all.value - 1)).mean()


def _statistics(own: Slopes, direction: Slopes) -> dict[str, Estimate]:
    return {
        "largest-own-slope": own.largest,
        "largest-random-slope": direction.largest,
        "smallest-own-slope": own.smallest,
        "smallest-random-slope": direction.smallest,
        "random-direction-distance": direction.distance,
        "own-output-distance": own.distance,
    }
