"""From a sweep to per-head tables: what an ablation costs, what repairs it, and how sure that is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from selfrepair.statistics import bootstrap_ratio, bootstrap_weights, clipped_share, select_top

PARTS = ("layernorm", "heads", "mlps")


def with_self_repair(sweep: xr.Dataset) -> xr.Dataset:
    """Adds ``self_repair = logit_change − (ablated_direct_effect − direct_effect)`` and its ``self_repair_layernorm``."""
    repair = sweep.logit_change - (sweep.ablated_direct_effect - sweep.direct_effect)
    layernorm = repair - sweep.self_repair_heads - sweep.self_repair_mlps
    return sweep.assign(self_repair=repair, self_repair_layernorm=layernorm)


def select_each_top(
    direct_effect: Float[np.ndarray, "layer head prompt position"], fraction: float
) -> Bool[np.ndarray, "layer head prompt position"]:
    """:func:`select_top` for every head."""
    return np.stack([[select_top(head, fraction) for head in layer] for layer in direct_effect])


def heads_table(sweep: xr.Dataset, fraction: float = 0.02, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """One row per head: means (logits) over its top ``fraction`` of tokens by direct effect.

    The columns of the authors' published tables, and: ``self_repair`` with its 95 % interval over
    prompts (``_low``, ``_high``), ``share_of_means_*`` (mean of the part over mean direct effect) beside
    the published ``clipped_share_*`` (mean of per-token clipped shares), ``n_tokens``.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    weights = bootstrap_weights(sweep.sizes["prompt"], n_bootstrap, seed)
    rows = []
    for layer in range(sweep.sizes["layer"]):
        whole = with_self_repair(sweep.isel(layer=layer))
        values = {name: whole[name].values.astype(np.float64) for name in _MEANS}
        for head in range(sweep.sizes["head"]):
            here = {name: value[head] for name, value in values.items()}
            chosen = select_top(here["direct_effect"], fraction)
            means = {name: value[chosen].mean() for name, value in here.items()}
            sums = np.where(chosen, here["self_repair"], 0).sum(1)
            low, high = bootstrap_ratio(sums, chosen.sum(1).astype(np.float64), weights)
            rows.append(
                {
                    "model": sweep.attrs["model"],
                    "layer": layer,
                    "head": head,
                    **{name: means[name] for name in ("logit_change", "direct_effect", "ablated_direct_effect")},
                    **{f"self_repair_{part}": means[f"self_repair_{part}"] for part in PARTS},
                    **{
                        f"clipped_share_{part}": clipped_share(here[f"self_repair_{part}"][chosen], here["direct_effect"][chosen]).mean()
                        for part in PARTS
                    },
                    **{f"share_of_means_{part}": means[f"self_repair_{part}"] / means["direct_effect"] for part in PARTS},
                    "self_repair": means["self_repair"],
                    "self_repair_low": float(low),
                    "self_repair_high": float(high),
                    "n_tokens": int(chosen.sum()),
                }
            )
    return pd.DataFrame(rows)


_MEANS = (
    "logit_change",
    "direct_effect",
    "ablated_direct_effect",
    "self_repair_layernorm",
    "self_repair_heads",
    "self_repair_mlps",
    "self_repair",
)


def layer_means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the heads of each model's layers, with ``relative_depth`` = layer / (layers − 1)."""
    means = table.drop(columns="head").groupby(["model", "layer"], sort=False).mean(numeric_only=True).reset_index()
    depth = means.groupby("model")["layer"].transform("max").clip(lower=1)
    return means.assign(relative_depth=means["layer"] / depth)


def strongest_head(table: pd.DataFrame, layer: int) -> tuple[int, int]:
    """``(layer, head)`` with the largest mean direct effect in a layer of one model's heads table; -1 is the last layer."""
    layer = range(table["layer"].max() + 1)[layer]
    here = table[table["layer"] == layer]
    return layer, int(here.loc[here["direct_effect"].idxmax(), "head"])
