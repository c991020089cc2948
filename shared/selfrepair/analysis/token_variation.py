"""How self-repair differs from token to token: its spread, its failures, and what it goes with.

The tokens of a head are its top ``fraction`` by direct effect, as everywhere; of these, tokens on which the
head does not help (direct effect ≤ 0) are left out, because there self-repair has no share of a direct
effect and its sign means the opposite. Among the top 2% there are none; with ``fraction = 1`` they are many.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int, Real

from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.estimates import Estimate, draws
from selfrepair.analysis.self_repair import with_self_repair
from selfrepair.analysis.shares import select_each_top
from selfrepair.statistics import later_half, select_top

SAMPLE_BYTES = 1 << 25
#: Where the distribution of self-repair over direct effect is read.
THRESHOLDS = np.linspace(-1, 2, 301)
#: Quantities of :func:`head_noise` that claims are about → the ids of their means over heads.
STATISTICS = {
    "spread": "self-repair-spread",
    "over_corrected": "over-corrected-tokens",
    "made_worse": "made-worse-tokens",
}
#: Their controls: what these would be if a head's repair were its fixed share of the direct effect.
CONTROLS = {f"{quantity}_fixed": f"{statistic}-of-fixed-share" for quantity, statistic in STATISTICS.items()}

#: What readers are shown for the quantities.
LABELS = {
    "spread": "spread",
    "over_corrected": "over-corrected",
    "made_worse": "made worse",
    "spread_fixed": "control: spread",
    "over_corrected_fixed": "control: over-corrected",
    "made_worse_fixed": "control: made worse",
    "within": "standard deviation within prompts",
    "between": "standard deviation between prompts",
    "between_share": "share of the variance between prompts",
    "correlation_direct_effect": "with the direct effect",
    "correlation_probability": "with the clean probability",
    "correlation_position": "with the position",
}


def with_probability(sweep: xr.Dataset, probabilities: xr.Dataset) -> xr.Dataset:
    """Adds ``self_repair`` (logits) and the correct token's clean ``probability``, joined by prompt numbers.

    Raises:
        KeyError: a prompt of the sweep has no probabilities.
    """
    of_prompts = probabilities["probability"].sel(prompt=sweep["prompt"].values)
    return with_self_repair(sweep).assign(probability=(of_prompts.dims, of_prompts.values))


def with_probabilities(
    sweeps: Mapping[str, xr.Dataset], probabilities: Mapping[str, xr.Dataset]
) -> dict[str, xr.Dataset]:
    """:func:`with_probability` of several models, by name."""
    return {model: with_probability(sweep, probabilities[model]) for model, sweep in sweeps.items()}


def strongest_heads(sweep: xr.Dataset, fraction: float, n_layers: int = 4) -> list[tuple[int, int]]:
    """``(layer, head)`` of largest mean direct effect over its top tokens, in each of ``n_layers`` layers.

    The layers are spread evenly over the later half, or are the last ``n_layers`` where that holds fewer.
    """
    effect = sweep["direct_effect"].values.astype(np.float64)
    n = len(effect)
    layers = np.linspace(max(0, min(n // 2, n - n_layers)), n - 1, min(n, n_layers)).round().astype(int)
    chosen = select_each_top(effect[layers], fraction)
    totals = np.where(chosen, effect[layers], 0).sum((2, 3))  # of equally many tokens for every head
    return [(int(layer), int(head)) for layer, head in zip(layers, totals.argmax(1), strict=True)]


def selected_tokens(sweep: xr.Dataset, fraction: float, layer: int, head: int) -> pd.DataFrame:
    """One row per token of a head (see above): its place, effects in logits, ``probability``.

    ``share`` is self-repair over direct effect, ``removed`` direct effect minus ablated direct effect.
    ``sweep`` is as :func:`with_probability` gives it.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    effect = sweep["direct_effect"].values[layer, head].astype(np.float64)
    prompt, position = np.nonzero(select_top(effect, fraction) & (effect > 0))
    names = ("direct_effect", "ablated_direct_effect", "logit_change", "self_repair")
    table = pd.DataFrame({"layer": layer, "head": head, "prompt": prompt, "position": position})
    for name in names:
        table[name] = sweep[name].values[layer, head, prompt, position].astype(np.float64)
    table["share"] = table["self_repair"] / table["direct_effect"]
    table["removed"] = table["direct_effect"] - table["ablated_direct_effect"]
    table["probability"] = sweep["probability"].values[prompt, position].astype(np.float64)
    return table


def tokens_of_heads(sweep: xr.Dataset, fraction: float, heads: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """:func:`selected_tokens` of several heads, one under the other."""
    tables = [selected_tokens(sweep, fraction, layer, head) for layer, head in heads]
    return pd.concat(tables, ignore_index=True)


def all_tokens(
    sweep: xr.Dataset, heads: Sequence[tuple[int, int]]
) -> dict[str, dict[str, Float[np.ndarray, " token"]]]:
    """Effects (logits) on every token, whatever the sign of its direct effect, by head: ``L3H1``."""
    names = ("direct_effect", "logit_change", "self_repair")
    return {
        f"L{layer}H{head}": {
            name: sweep[name].values[layer, head].ravel().astype(np.float64) for name in names
        }
        for layer, head in heads
    }


@dataclass(frozen=True)
class TokenNoise:
    """:func:`head_noise` of every head of the later half of a model's layers.

    ``quantities[name]`` is ``[layer, head]``, in the order of ``layers``.
    ``share_at_most`` is the part of a head's tokens with self-repair over direct effect up to each of
    :data:`THRESHOLDS`.
    """

    model: str
    layers: range
    quantities: dict[str, Estimate]
    share_at_most: Float[np.ndarray, "layer head threshold"]

    @classmethod
    def of_sweep(
        cls, sweep: xr.Dataset, fraction: float, n_bootstrap: int = 1000, seed: int = 0
    ) -> TokenNoise:
        """``sweep`` is as :func:`with_probability` gives it; samples draw whole prompts."""
        n_layers, n_heads = sweep.sizes["layer"], sweep.sizes["head"]
        weights = draws(sweep.sizes["prompt"], n_bootstrap, seed)
        layers = range(later_half(n_layers), n_layers)
        found: list[dict[str, Estimate]] = []
        below: list[Float[np.ndarray, " threshold"]] = []
        for layer, head in itertools.product(layers, range(n_heads)):
            tokens = selected_tokens(sweep, fraction, layer, head)
            found.append(head_noise(tokens, weights))
            below.append(_share_at_most(tokens))
        shape = (len(layers), n_heads, -1)
        drawn = {name: np.stack([head[name].drawn for head in found]).reshape(shape) for name in found[0]}
        quantities = {name: Estimate(values) for name, values in drawn.items()}
        return cls(sweep.attrs["model"], layers, quantities, np.stack(below).reshape(shape))

    def over_heads(self) -> dict[str, Estimate]:
        """Mean of each quantity over heads; heads for which it is undefined are left out of it."""
        return {name: found.nanmean((0, 1)) for name, found in self.quantities.items()}

    def table(self) -> pd.DataFrame:
        """``model, quantity, estimate, low, high``: means over heads, 95% intervals over prompts."""
        means = self.over_heads().items()
        tables = [mean.table({}, model=self.model, quantity=quantity) for quantity, mean in means]
        return pd.concat(tables, ignore_index=True)

    def statistics(self) -> Statistics:
        """What the claims of notebook 02 are about, by id, and their controls."""
        means = self.over_heads()
        return {statistic: means[quantity] for quantity, statistic in (STATISTICS | CONTROLS).items()}


def noise_of_models(sweeps: Mapping[str, xr.Dataset], fraction: float) -> dict[str, TokenNoise]:
    """:meth:`TokenNoise.of_sweep` of several models, by name."""
    return {model: TokenNoise.of_sweep(sweep, fraction) for model, sweep in sweeps.items()}


def noise_table(models: Mapping[str, TokenNoise]) -> pd.DataFrame:
    """The rows of :meth:`TokenNoise.table` of every model."""
    return pd.concat([noise.table() for noise in models.values()], ignore_index=True)


def with_intervals(table: pd.DataFrame, quantities: Sequence[str]) -> pd.DataFrame:
    """Text like ``+0.14 [+0.11, +0.16]``: a row for each model, a column for each of these quantities."""
    form = "{0.estimate:+.2f} [{0.low:+.2f}, {0.high:+.2f}]".format
    rows = {model: of_model.set_index("quantity") for model, of_model in table.groupby("model", sort=False)}
    return pd.DataFrame(
        {
            name: [form(of_model.loc[name]).replace("-", "−") for of_model in rows.values()]
            for name in quantities
        },
        index=pd.Index(rows, name="model"),
    )


def _share_at_most(tokens: pd.DataFrame) -> Float[np.ndarray, " threshold"]:
    return np.searchsorted(np.sort(tokens["share"]), THRESHOLDS, "right") / max(1, len(tokens))


def head_noise(tokens: pd.DataFrame, weights: Float[np.ndarray, "draw prompt"]) -> dict[str, Estimate]:
    """What one head's tokens say of the noise of its self-repair; NaN where undefined.

    ``share``: mean self-repair over mean direct effect. ``spread``, ``within``, ``between``: standard
    deviations of self-repair over all tokens, within and between prompts, each over the mean direct
    effect (a negative estimate of a variance counts as 0); ``between_share``: part of the variance that
    lies between prompts (negative where its estimate is). ``over_corrected``, ``made_worse``: shares of
    tokens with self-repair above the direct effect, below 0. ``*_fixed``: what spread and these shares would
    be if self-repair were ``share`` times the direct effect on every token. ``correlation_*``: Spearman's, of
    self-repair with ``direct_effect``, ``probability``, ``position``.
    """
    n_parts = -(-8 * len(weights) * len(tokens) // SAMPLE_BYTES)
    parts = [_noise(tokens, part) for part in np.array_split(weights, max(1, n_parts))]
    return {name: Estimate(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def _noise(
    tokens: pd.DataFrame, weights: Float[np.ndarray, "draw prompt"]
) -> dict[str, Float[np.ndarray, " draw"]]:
    prompt, effect, repair = (tokens[name].to_numpy() for name in ("prompt", "direct_effect", "self_repair"))
    times = weights[:, prompt]
    mean_effect = _mean(effect, times)
    share = _mean(repair, times) / mean_effect
    spread, spread_of_effect = (_deviation(values, times) / mean_effect for values in (repair, effect))
    components = variance_components(repair, prompt, weights)
    ranks = weighted_ranks(repair, times)
    return {
        "share": share,
        "spread": spread,
        "over_corrected": _mean((repair > effect).astype(np.float64), times),
        "made_worse": _mean((repair < 0).astype(np.float64), times),
        "spread_fixed": np.abs(share) * spread_of_effect,
        "over_corrected_fixed": _where_defined(share > 1, share),
        "made_worse_fixed": _where_defined(share < 0, share),
        "within": np.sqrt(components.within) / mean_effect,
        "between": np.sqrt(components.between.clip(min=0)) / mean_effect,
        "between_share": components.between / (components.between + components.within),
        **{
            f"correlation_{name}": weighted_correlation(
                ranks, weighted_ranks(tokens[name].to_numpy(), times), times
            )
            for name in ("direct_effect", "probability", "position")
        },
    }


def _mean(
    values: Float[np.ndarray, " token"], times: Float[np.ndarray, "draw token"]
) -> Float[np.ndarray, " draw"]:
    total = times.sum(1)
    return times @ values / np.where(total, total, np.nan)


def _deviation(
    values: Float[np.ndarray, " token"], times: Float[np.ndarray, "draw token"]
) -> Float[np.ndarray, " draw"]:
    """Standard deviation over tokens."""
    centred = values - values.mean() if values.size else values
    return np.sqrt((_mean(centred**2, times) - _mean(centred, times) ** 2).clip(min=0))


def _where_defined(
    holds: Bool[np.ndarray, " draw"], share: Float[np.ndarray, " draw"]
) -> Float[np.ndarray, " draw"]:
    """1 where it holds, else 0: all direct effects of a head's tokens are positive. NaN without a share."""
    return np.where(np.isnan(share), np.nan, holds)


class VarianceComponents(NamedTuple):
    """Variances of self-repair, for each draw of prompts."""

    between: Float[np.ndarray, " draw"]
    within: Float[np.ndarray, " draw"]


def variance_components(
    values: Float[np.ndarray, " token"],
    prompt: Int[np.ndarray, " token"],
    weights: Float[np.ndarray, "draw prompt"],
) -> VarianceComponents:
    """Variance between and within prompts: one-way random-effects analysis of variance, unequal prompts.

    ``within`` is the mean square within prompts, ``between = (mean square between − within) / n0`` with
    ``n0 = (N − Σ n² / N) / (k − 1)`` for ``N`` tokens in ``k`` prompts of ``n``: unbiased, so possibly
    negative. A prompt drawn twice counts as two. NaN for one prompt only, or no prompt with two tokens.
    """
    n_prompts = weights.shape[1]
    size = np.bincount(prompt, minlength=n_prompts).astype(np.float64)
    values = values - values.mean() if values.size else values
    mean = np.bincount(prompt, values, n_prompts) / np.maximum(size, 1)
    inner = np.bincount(prompt, (values - mean[prompt]) ** 2, n_prompts)
    k, n, squares = (weights @ x for x in (size > 0, size, size**2))
    defined = (k > 1) & (n > k)
    k, n = np.where(defined, k, np.nan), np.where(defined, n, np.nan)
    outer = weights @ (size * mean**2) - (weights @ (size * mean)) ** 2 / n
    within = weights @ inner / (n - k)
    between = (outer / (k - 1) - within) * (k - 1) / (n - squares / n)
    return VarianceComponents(between, within)


def weighted_ranks(
    values: Real[np.ndarray, " token"], times: Float[np.ndarray, "draw token"]
) -> Float[np.ndarray, "draw token"]:
    """Rank of each value, value ``i`` coming ``times[:, i]`` times; equal values share their mean rank."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    copies = np.add.reduceat(times[:, order], starts, axis=1) if group.size else times
    return (copies.cumsum(1) - (copies - 1) / 2)[:, group]


def weighted_correlation(
    x: Float[np.ndarray, "draw token"],
    y: Float[np.ndarray, "draw token"],
    times: Float[np.ndarray, "draw token"],
) -> Float[np.ndarray, " draw"]:
    """Pearson's correlation in each draw, where pair ``i`` comes ``times[:, i]`` times.

    NaN where one of the two is constant.
    """
    total = times.sum(1, keepdims=True)
    total = np.where(total, total, np.nan)
    x, y = (a - (times * a).sum(1, keepdims=True) / total for a in (x, y))
    covariance, *variances = (np.einsum("dt,dt,dt->d", times, a, b) for a, b in ((x, y), (x, x), (y, y)))
    scale = np.sqrt(variances[0] * variances[1])
    return np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0)
