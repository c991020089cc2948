"""Means per head with bootstrap samples of them, and what notebook 01 asks of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from selfrepair.analysis.head_table import select_each_top, with_self_repair
from selfrepair.statistics import bootstrap_weights, selected_means


@dataclass(frozen=True)
class HeadMeans:
    """Mean self-repair and direct effect (logits) of every head; last axis: the estimate, then bootstrap samples of it."""

    self_repair: Float[np.ndarray, "layer head sample"]
    direct_effect: Float[np.ndarray, "layer head sample"]

    @classmethod
    def of_sweep(cls, sweep: xr.Dataset, fraction: float, n_bootstrap: int = 1000, seed: int = 0) -> HeadMeans:
        """Over each head's top ``fraction`` of tokens; samples draw whole prompts."""
        sweep = with_self_repair(sweep)
        n_prompts = sweep.sizes["prompt"]
        weights = np.concatenate([np.ones((1, n_prompts)), bootstrap_weights(n_prompts, n_bootstrap, seed)])
        effect, repair = (sweep[name].values.astype(np.float64) for name in ("direct_effect", "self_repair"))
        chosen = select_each_top(effect, fraction)
        return cls(*(selected_means(values, chosen, weights) for values in (repair, effect)))

    @classmethod
    def of_table(cls, table: pd.DataFrame) -> HeadMeans:
        """Of one model's rows of a heads table: the estimate alone."""
        shape = (table["layer"].nunique(), table["head"].nunique(), 1)
        ordered = table.sort_values(["layer", "head"])
        return cls(*(ordered[name].to_numpy().reshape(shape) for name in ("self_repair", "direct_effect")))

    def layers(self, first: float, last: float) -> HeadMeans:
        """The layers from the fraction ``first`` of the depth up to ``last``."""
        n = len(self.self_repair)
        part = slice(round(first * n), round(last * n))
        return HeadMeans(self.self_repair[part], self.direct_effect[part])

    def layer_intervals(self) -> pd.DataFrame:
        """95 % interval of each layer's mean self-repair over its heads: ``layer, low, high``."""
        low, high = np.nanquantile(self.self_repair.mean(1)[:, 1:], [0.025, 0.975], axis=-1)
        return pd.DataFrame({"layer": np.arange(len(low)), "low": low, "high": high})


def head_statistics(heads: HeadMeans) -> dict[str, Float[np.ndarray, " sample"]]:
    """The statistics that the claims of notebook 01 are about; one value per sample."""
    early, late = heads.layers(0, 0.25), heads.layers(0.5, 1)
    mean_early, mean_late = (np.nanmean(part.self_repair, axis=(0, 1)) for part in (early, late))
    return {
        "mean self-repair, later half of layers": mean_late,
        "share of heads with positive self-repair, later half of layers": (late.self_repair > 0).mean((0, 1)),
        "self-repair over direct effect, later half of layers": np.nansum(late.self_repair, (0, 1)) / np.nansum(late.direct_effect, (0, 1)),
        "mean self-repair, first quarter of layers": mean_early,
        "mean self-repair, later half minus first quarter": mean_late - mean_early,
    }
