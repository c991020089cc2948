"""Self-feeding: slopes of a head's direct effect after it was fed on that before, measured and released."""

from __future__ import annotations

from collections.abc import Mapping
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


def reactions(table: pd.DataFrame) -> pd.DataFrame:
    """How heads react at the largest scale, by model: rows of :func:`self_feeding_table`, or released ones.

    ``heads`` fed, how many slopes with the own output are ``above 1`` and ``below both controls``, the
    ``smallest`` and the ``largest`` of them, and the ``mean slope, random direction``, over the same heads.
    """
    slope = table[table["scale"] == table["scale"].max()].pivot(
        index=["model", "layer", "head"], columns="added_vector", values="slope_after_on_before"
    )
    own = slope[OWN_OUTPUT]
    by_head = pd.DataFrame(
        {
            "heads": 1,
            "above 1": own > 1,
            "below both controls": own < slope.drop(columns=OWN_OUTPUT).min(axis=1),
        }
    )
    found = by_head.groupby("model").sum().join(own.groupby("model").agg(smallest="min", largest="max"))
    found["mean slope, random direction"] = slope[RANDOM_DIRECTION].groupby("model").mean()
    return found.loc[table["model"].unique()]


def smallest_slopes(fed: Mapping[str, xr.Dataset], n_tokens: int = 10) -> pd.DataFrame:
    """The head with the smallest slope of each model, fed its own output at the largest scale.

    ``layer``, ``head``, ``slope`` and its interval ``low`` to ``high``.
    ``weight``: the share of the variance of direct effects before that ``n_tokens`` of its tokens have, those
    that are furthest from the mean. ``few tokens``: it is more than half, so that the slope hangs on these.
    """
    rows = []
    for model_name, found in fed.items():
        own = slopes(found)[:, found.attrs["vectors"].index(OWN_OUTPUT), -1]
        head = int(np.argmin(own.value))
        low, high = own[head].interval()
        before = found["before"].values[head].astype(np.float64)
        squares = np.sort(((before - before.mean()) ** 2).ravel())
        weight = squares[-n_tokens:].sum() / squares.sum()
        rows.append(
            {
                "model": model_name,
                "layer": int(found["layer"][head]),
                "head": int(found["head"][head]),
                "slope": float(own[head].value),
                "low": float(low),
                "high": float(high),
                "weight": weight,
                "few tokens": bool(weight > 0.5),
            }
        )
    return pd.DataFrame(rows).set_index("model")


def in_context(fed: xr.Dataset, head: int, prompt: int, n_tokens: int) -> Float[np.ndarray, " token"]:
    """What feeding a head its own output changes (logits, largest scale), at the tokens that are predicted.

    ``head`` counts along ``fed``, ``prompt`` is a number. NaN at the tokens whose position was not fed.
    """
    here = fed.isel(fed=head, scale=-1).sel(prompt=prompt)
    after = here["after"].values[fed.attrs["vectors"].index(OWN_OUTPUT)]
    changes = np.full(n_tokens, np.nan)
    changes[here["position"].values + 1] = after - here["before"].values
    return changes


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
