"""Self-repair as a share of the direct effect: of single tokens, and of the means of heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from selfrepair.analysis.token_variation import THRESHOLDS, TokenNoise
from selfrepair.statistics import later_half

#: Quantiles that tables show.
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)


def head_shares(table: pd.DataFrame) -> dict[str, Float[np.ndarray, " head"]]:
    """Mean self-repair over mean direct effect of a heads table's heads, by model.

    Heads of the later half of the layers, with a positive direct effect.
    """
    shares = {}
    for model, rows in table.groupby("model", sort=False):
        later = rows[(rows["layer"] >= later_half(rows["layer"].nunique())) & (rows["direct_effect"] > 0)]
        shares[str(model)] = (later["self_repair"] / later["direct_effect"]).to_numpy()
    return shares


def shares_of_heads(
    measured: Mapping[str, TokenNoise], released: pd.DataFrame
) -> dict[str, dict[str, Float[np.ndarray, " head"]]]:
    """Mean self-repair over mean direct effect of later heads: by source, then by model.

    ``measured`` of ours; ``published`` of a heads table that was released.
    """
    ours = {model: noise.quantities["share"].value.ravel() for model, noise in measured.items()}
    return {"measured": ours, "published": head_shares(released)}


def quantiles_of_heads(shares: Mapping[str, Float[np.ndarray, " head"]]) -> pd.DataFrame:
    """Over heads, a row for each model; heads without a share are left out."""
    return _table({model: pd.Series(values).quantile(list(LEVELS)) for model, values in shares.items()})


def quantiles_of_tokens(measured: Mapping[str, TokenNoise]) -> pd.DataFrame:
    """Over single tokens, each head counted equally, a row for each model.

    To the resolution of :data:`~selfrepair.analysis.token_variation.THRESHOLDS`; NaN beyond them.
    """
    return _table({model: _quantiles(noise.share_at_most.mean((0, 1))) for model, noise in measured.items()})


def clouds_table(
    clouds: Mapping[str, Mapping[str, Float[np.ndarray, " token"]]], idle: float = 0.1
) -> pd.DataFrame:
    """What direct effect and logit change of every token have to do with each other, a row for each head.

    ``clouds`` are as :func:`~selfrepair.analysis.token_variation.all_tokens` gives them. ``idle`` is the
    share of tokens whose direct effect is smaller in size than so many logits, ``idle change`` the standard
    deviation of their logit change; ``correlation`` is Pearson's, over all tokens.
    """
    rows = {}
    for head, of in clouds.items():
        effect, change = of["direct_effect"], of["logit_change"]
        few = np.abs(effect) < idle
        rows[head] = [few.mean(), change[few].std(), np.corrcoef(effect, change)[0, 1]]
    return pd.DataFrame(
        list(rows.values()), pd.Index(rows, name="head"), ["idle", "idle change", "correlation"]
    )


def scatter_table(tokens: pd.DataFrame) -> pd.DataFrame:
    """Of each head among ``tokens`` (:func:`~selfrepair.analysis.token_variation.tokens_of_heads`), by layer.

    ``scatter`` is the standard deviation of self-repair (logits), ``made worse`` the share of tokens on which
    it is below 0.
    """
    rows = {
        f"L{layer}H{head}": [here["self_repair"].to_numpy().std(), (here["self_repair"] < 0).mean()]
        for (layer, head), here in tokens.groupby(["layer", "head"], sort=True)
    }
    return pd.DataFrame(list(rows.values()), pd.Index(rows, name="head"), ["scatter", "made worse"])


def _quantiles(at_most: Float[np.ndarray, " threshold"]) -> list[float]:
    first = np.searchsorted(at_most, LEVELS)
    within = (first > 0) & (first < len(THRESHOLDS))
    return np.where(within, THRESHOLDS[np.minimum(first, len(THRESHOLDS) - 1)], np.nan).tolist()


def _table(rows: Mapping[str, Iterable[float]]) -> pd.DataFrame:
    names = [f"{level:.0%}" for level in LEVELS]
    return pd.DataFrame([list(row) for row in rows.values()], pd.Index(rows, name="model"), names)
