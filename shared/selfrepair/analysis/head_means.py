"""Means per head with their uncertainty, and what notebook 01 asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.estimates import Estimate, draws
from selfrepair.analysis.head_table import LayerTokens
from selfrepair.analysis.layer_orders import end_of_orders, layer_orders
from selfrepair.analysis.published import comparable, published_by_model
from selfrepair.statistics import later_half


@dataclass(frozen=True)
class HeadMeans:
    """Mean self-repair and direct effect (logits) of every head over its tokens, ``[layer, head]``."""

    self_repair: Estimate
    direct_effect: Estimate

    @classmethod
    def of_sweep(
        cls, sweep: xr.Dataset, fraction: float, n_bootstrap: int = 1000, seed: int = 0
    ) -> HeadMeans:
        """Over each head's top ``fraction`` of tokens; samples draw whole prompts.

        Raises:
            UserError: ``fraction`` is not in (0, 1].
        """
        weights = draws(sweep.sizes["prompt"], n_bootstrap, seed)
        repair, effect = [], []
        for layer in range(sweep.sizes["layer"]):
            tokens = LayerTokens.of_sweep(sweep, layer, fraction)
            repair.append(tokens.means("self_repair", weights))
            effect.append(tokens.means("direct_effect", weights))
        return cls(Estimate.stack(repair), Estimate.stack(effect))

    @classmethod
    def of_table(cls, table: pd.DataFrame) -> HeadMeans:
        """Of one model's rows of a heads table: without samples."""
        shape = (table["layer"].nunique(), table["head"].nunique())
        ordered = table.sort_values(["layer", "head"])
        repair, effect = (
            ordered[name].to_numpy().reshape(shape) for name in ("self_repair", "direct_effect")
        )
        return cls(Estimate.bare(repair), Estimate.bare(effect))

    @property
    def later(self) -> slice:
        """The later half of the layers."""
        return slice(later_half(len(self.self_repair)), None)

    @property
    def early(self) -> slice:
        """The first quarter of the layers, rounded, but one at least."""
        return slice(max(1, round(0.25 * len(self.self_repair))))

    def restored_share(self) -> Estimate:
        """Self-repair over direct effect, sums over the heads of the later half of the layers.

        NaN where the direct effects do not sum to more than 0, as they may over all tokens.
        """
        repair, effect = (
            one[self.later].map(_sum_over_heads) for one in (self.self_repair, self.direct_effect)
        )
        return repair / effect.map(lambda drawn: np.where(drawn > 0, drawn, np.nan))

    def layer_intervals(self) -> pd.DataFrame:
        """95% interval of each layer's mean self-repair over its heads: ``layer, low, high``."""
        by_layer = self.self_repair.mean(1)
        return by_layer.table({"layer": range(len(by_layer))})[["layer", "low", "high"]]


def means_of_models(sweeps: Mapping[str, xr.Dataset], fraction: float) -> dict[str, HeadMeans]:
    """:meth:`HeadMeans.of_sweep` of several models, by name.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    return {model: HeadMeans.of_sweep(sweep, fraction) for model, sweep in sweeps.items()}


def released_means(tokens: str = "top2pct") -> dict[str, HeadMeans]:
    """Of the models that the authors released, over ``top2pct`` or ``all_tokens``; without samples."""
    return {model: HeadMeans.of_table(rows) for model, rows in published_by_model(tokens).items()}


def statistics_of_models(models: Mapping[str, HeadMeans]) -> dict[str, Statistics]:
    """:func:`head_statistics` of each."""
    return {model: head_statistics(heads) for model, heads in models.items()}


def released_statistics(fraction: float) -> dict[str, Statistics]:
    """The same of the released models, where the top ``fraction`` of tokens is that of their means."""
    return {model: head_statistics(HeadMeans.of_table(rows)) for model, rows in comparable(fraction).items()}


def head_statistics(heads: HeadMeans) -> Statistics:
    """What the claims of notebook 01 are about; heads without tokens in a draw are left out of it."""
    repair = heads.self_repair[heads.later]
    mean_later, mean_early = (part.nanmean((0, 1)) for part in (repair, heads.self_repair[heads.early]))
    return {
        "self-repair-later-half": mean_later,
        "repaired-heads-later-half": repair.map(lambda drawn: (drawn > 0).mean((0, 1))),
        "restored-share-later-half": heads.restored_share(),
        "self-repair-first-quarter": mean_early,
        "self-repair-later-minus-early": mean_later - mean_early,
        "self-repair-later-minus-early-of-orders": later_in_random_order(heads),
    }


def later_in_random_order(heads: HeadMeans) -> Estimate:
    """What later half minus first quarter does not exceed in 95% of all orders of the layers.

    Of the means of layers, each of which counts the same. NaN with up to four layers, as
    :func:`end_of_orders` says.
    """
    n_layers = len(heads.self_repair)
    at_depth = np.zeros(n_layers)
    for layers, sign in ((heads.later, 1), (heads.early, -1)):
        at_depth[layers] += sign / len(at_depth[layers])
    depth = np.argsort(layer_orders(n_layers), axis=1)
    return end_of_orders(at_depth[depth], heads.self_repair.nanmean(1))


def restored_table(models: Mapping[str, HeadMeans]) -> pd.DataFrame:
    """Later half of the layers: ``model, direct effect, self-repair`` (logits, means over heads), ``share``.

    ``share`` is :meth:`HeadMeans.restored_share`, with the ends ``low, high`` of its 95% interval.
    """
    rows = []
    for model, heads in models.items():
        effect, repair = (
            float(one[heads.later].nanmean((0, 1)).value) for one in (heads.direct_effect, heads.self_repair)
        )
        share = heads.restored_share().table({}, model=model).rename(columns={"estimate": "share"})
        rows.append(share.assign(**{"direct effect": effect, "self-repair": repair}))
    columns = ["model", "direct effect", "self-repair", "share", "low", "high"]
    return pd.concat(rows, ignore_index=True)[columns]


def _sum_over_heads(drawn: np.ndarray) -> np.ndarray:
    return np.nansum(drawn, axis=(0, 1))
