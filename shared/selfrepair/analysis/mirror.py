"""Notebook 07: the tokens on which heads hurt, repair against what was lost, what claims are about."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.breakdown import SUMS, PartMeans, TokensOfHeads, table_of
from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.counting import later_layers
from selfrepair.analysis.estimates import ABOVE, BELOW, OPEN, Estimate, draws, sides_of
from selfrepair.analysis.head_table import EFFECTS
from selfrepair.analysis.self_repair import with_self_repair

#: Both ends of a head's tokens by direct effect.
TOP, BOTTOM = "top", "bottom"


def mirrored(sweep: xr.Dataset) -> xr.Dataset:
    """The sweep with the signs of all effects reversed: its top tokens are the head's most negative ones.

    Ratios of a part to the direct effect stay as they are.
    """
    names = (*EFFECTS, "self_repair_heads", "self_repair_mlps")
    return sweep.assign({name: -sweep[name] for name in names})


def both_ends(sweeps: Mapping[str, xr.Dataset], fraction: float, n_bootstrap: int = 400) -> pd.DataFrame:
    """What each part is of the direct effect, at both ends: ratios of means, later half of the layers.

    ``model, part, end, estimate, low, high``. Positive is repair at either end: it goes against what the
    ablation does to the logit. Signs at random give 0.
    """
    tables = []
    for end in (TOP, BOTTOM):
        found = {
            model: PartMeans.of_sweep(
                sweep if end == TOP else mirrored(sweep), fraction, n_bootstrap
            ).restored_by_part()
            for model, sweep in sweeps.items()
        }
        tables.append(table_of(found, "part").assign(end=end))
    return pd.concat(tables, ignore_index=True)


def logits_at_both_ends(sweeps: Mapping[str, xr.Dataset], fraction: float) -> pd.DataFrame:
    """By ``model`` and ``end``, mean direct effect and parts (logits), positive if the logit rises."""
    rows = []
    for model, sweep in sweeps.items():
        for end, sign in ((TOP, 1), (BOTTOM, -1)):
            means = PartMeans.of_sweep(sweep if end == TOP else mirrored(sweep), fraction, 0).by_part()
            rows.append(
                {"model": model, "end": end} | {name: sign * one.value for name, one in means.items()}
            )
    return pd.DataFrame(rows)


def slopes(sweep: xr.Dataset, n_bootstrap: int = 400, seed: int = 0) -> dict[str, Estimate]:
    """By part, the slope of self-repair on the lost direct effect over *all* tokens.

    Lost is ``direct_effect − ablated_direct_effect`` (logits). Least squares with a constant, head by head,
    then the mean over the heads of the later half of the layers. Samples draw whole prompts. Lost effects of
    other tokens would give 0.
    """
    whole = with_self_repair(later_layers(sweep))
    lost = (whole["direct_effect"] - whole["ablated_direct_effect"]).values.astype(np.float64)
    weights = draws(lost.shape[2], n_bootstrap, seed)
    n_tokens = lost.shape[-1] * weights.sum(1)

    def total(values: np.ndarray) -> Estimate:
        return Estimate(values.sum(-1) @ weights.T)

    def together(values: np.ndarray, other: np.ndarray) -> Estimate:
        """Sum of products less that of the means."""
        products = total(values).map(lambda one, two: one * two / n_tokens, total(other))
        return total(values * other) - products

    found = {}
    for name, parts in SUMS.items():
        of_parts = [whole[f"self_repair_{part}"].values.astype(np.float64) for part in parts]
        repair = np.sum(of_parts, axis=0)
        found[name] = (together(lost, repair) / together(lost, lost)).nanmean((0, 1))
    return found


def slopes_table(sweeps: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """:func:`slopes` of every model: ``model, part, estimate, low, high``."""
    return table_of({model: slopes(sweep) for model, sweep in sweeps.items()}, "part")


def ratio_and_slope(both: pd.DataFrame, of_slopes: pd.DataFrame) -> pd.DataFrame:
    """For the final norm, and for heads and MLPs: shares at both ends, and the slope over all tokens.

    A row for each model and part.
    """
    wide = both.pivot(index=["model", "part"], columns="end", values="estimate")
    wide = wide.assign(slope=of_slopes.set_index(["model", "part"])["estimate"])
    order = [(model, part) for model in dict.fromkeys(both["model"]) for part in ("layernorm", "norm frozen")]
    return wide.loc[order, [TOP, BOTTOM, "slope"]].reset_index()


def sides(shares: pd.DataFrame, part: str) -> dict[str, list[str]]:
    """Models by the side of 0 on which a part's 95% interval lies: ``above``, ``below``, or ``open``.

    ``shares`` are of one end of :func:`both_ends`, or of :func:`slopes_table`.
    """
    of_models = shares[shares["part"] == part].set_index("model")
    side = sides_of(of_models)
    return {name: side.index[side == name].tolist() for name in (ABOVE, BELOW, OPEN)}


def claimed(sweeps: Mapping[str, xr.Dataset], fraction: float) -> dict[str, Statistics]:
    """What the claims of notebook 07 are about, by model: of sweeps under the first kind of ablation."""
    return {model: counting_statistics(sweep, fraction) for model, sweep in sweeps.items()}


def counting_statistics(
    sweep: xr.Dataset, fraction: float, n_bootstrap: int = 400, seed: int = 0
) -> Statistics:
    """The same of one model, by id."""
    tokens = TokensOfHeads.of_sweep(sweep, fraction, n_bootstrap, seed)
    bottom = PartMeans.of_sweep(mirrored(sweep), fraction, n_bootstrap, seed)
    return {
        "layernorm-clipped-above-floor": (tokens.clipped("layernorm") - tokens.floor("layernorm")).mean(
            (0, 1)
        ),
        "layernorm-share-of-bottom": bottom.restored(["layernorm"], bottom.later),
        "slope-without-norm": slopes(sweep, n_bootstrap, seed)["norm frozen"],
    }
