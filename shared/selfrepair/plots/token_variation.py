"""Figures of notebook 02: self-repair of single tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair.analysis.rules import load_claims
from selfrepair.analysis.token_variation import STATISTICS, THRESHOLDS, TokenNoise
from selfrepair.plots.panels import legend_below
from selfrepair.plots.style import looks


def all_tokens(heads: Mapping[str, Mapping[str, Float[np.ndarray, " token"]]], title: str) -> Figure:
    """Direct effect against logit change, and against self-repair, on every token: a column per head.

    Both axes of all panels have one scale (logits), as in the authors' figure of single tokens; there they
    reach from −4 to 4. ``heads`` holds ``direct_effect``, ``logit_change``, ``self_repair`` by name.
    """
    figure, axes = plt.subplots(2, len(heads), figsize=(2.7 * len(heads) + 0.8, 6.2), squeeze=False)
    figure.suptitle(title, fontsize=10)
    everything = np.abs(np.concatenate([values for head in heads.values() for values in head.values()]))
    end = float(np.quantile(everything, 0.999))
    for column, (name, head) in zip(axes.T, heads.items(), strict=True):
        column[0].plot([-end, end], [end, -end], color="0.3", lw=1, ls="--", label="no repair: $y = -x$")
        column[1].plot([-end, end], [-end, end], color="C1", lw=1, ls=":", label="all restored: $y = x$")
        for axis, quantity in zip(column, ("logit_change", "self_repair"), strict=True):
            x, y = head["direct_effect"], head[quantity]
            place = (-end, end, -end, end)
            cells = axis.hexbin(x, y, gridsize=55, bins="log", mincnt=1, cmap="crest", extent=place, lw=0)
            axis.axhline(0, color="0.3", lw=0.8)
            axis.axvline(0, color="0.3", lw=0.8)
            axis.set(xlim=(-end, end), ylim=(-end, end), aspect="equal")
            outside = int(((np.abs(x) > end) | (np.abs(y) > end)).sum())
            axis.set_title(f"{name}, {outside} tokens outside", fontsize=9)
        column[1].set_xlabel("direct effect (logits)")
    axes[0, 0].set_ylabel("logit change (logits)")
    axes[1, 0].set_ylabel("self-repair (logits)")
    figure.colorbar(cells, ax=axes, label="tokens in a cell", shrink=0.6)
    legend_below(figure, axes[:, 0], columns=2)
    return figure


def effect_against_change_per_token(tokens: pd.DataFrame, title: str) -> Figure:
    """Removed direct effect against logit change (logits) of each token, one panel per head.

    On the dashed line nothing is repaired, below it tokens are made worse. The colour is what became of a
    token. Panels have axes of their own, as heads of different layers differ much, and the title says so.
    """
    heads = list(tokens.groupby(["layer", "head"], sort=True))
    columns = min(2, len(heads))
    rows = -(-len(heads) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.3 * columns, 3.3 * rows + 0.7), squeeze=False)
    figure.suptitle(f"{title}\naxes differ from panel to panel", fontsize=10)
    for axis in axes.flat[len(heads) :]:
        axis.remove()
    for axis, ((layer, head), here) in zip(axes.flat, heads, strict=False):
        x, y = here["removed"], here["logit_change"]
        left, right = min(-0.02 * x.max(), x.min()), x.max()
        axis.plot([left, right], [-left, -right], color="0.3", lw=1, ls="--", label="no repair: $y = -x$")
        axis.axhline(0, color="0.3", lw=0.8)
        low, high = min(y.quantile(0.005), -right), max(y.quantile(0.995), 0.2 * right)
        across, up = 0.04 * (right - left), 0.04 * (high - low)
        axis.set(xlim=(left - across, right + across), ylim=(low - up, high + up))
        inside = y.between(*axis.get_ylim())
        for outcome in _outcomes(here):
            look = {"s": 13, "c": outcome.colour, "marker": outcome.marker, "alpha": 0.7, "lw": 0}
            look["clip_on"] = False
            chosen = outcome.chosen & inside
            axis.scatter(x[chosen], y[chosen], label=outcome.label, **look)
        beyond = "" if inside.all() else f", {(~inside).sum()} of them outside"
        axis.set_title(f"L{layer}H{head}: {len(here)} tokens{beyond}", fontsize=10)
        axis.set_xlabel(r"direct effect removed, $\mathrm{DE} - \mathrm{DE}_\mathrm{ablated}$ (logits)")
        axis.set_ylabel("logit change (logits)")
    legend_below(figure, axes.flat[: len(heads)], columns=2)
    return figure


class _Outcome(NamedTuple):
    label: str
    chosen: pd.Series
    colour: str
    marker: str


def _outcomes(tokens: pd.DataFrame) -> list[_Outcome]:
    """Which tokens had which outcome."""
    share = tokens["share"]
    return [
        _Outcome("over-corrected: self-repair above the direct effect", share > 1, "C2", "^"),
        _Outcome("partly repaired", (share >= 0) & (share <= 1), "C0", "o"),
        _Outcome("made worse: self-repair below 0", share < 0, "C3", "v"),
    ]


def share_distributions(
    noise: dict[str, TokenNoise], heads: dict[str, dict[str, Float[np.ndarray, " head"]]], title: str
) -> Figure:
    """Cumulative distributions of self-repair over direct effect: of tokens (mean over heads), of head means.

    ``heads`` holds for each source ("measured", "published") the head means of its models.
    """
    figure, axes = plt.subplots(1, 1 + len(heads), figsize=(3.3 * (1 + len(heads)), 4), sharey=True)
    figure.suptitle(title, fontsize=10)
    look = looks([*noise, *(model for source in heads.values() for model in source)])
    for model, found in noise.items():
        colour, marker = look[model]
        shares = found.share_at_most.mean((0, 1))
        axes[0].plot(THRESHOLDS, shares, color=colour, marker=marker, markevery=0.2, ms=4, label=model)
    axes[0].set(title="single tokens, measured", xlabel="self-repair / direct effect")
    axes[0].set_ylabel("cumulative share")
    for axis, (source, models) in zip(axes[1:], heads.items(), strict=True):
        for model, values in models.items():
            colour, marker = look[model]
            axis.ecdf(values, color=colour, marker=marker, markevery=0.2, ms=4, label=model)
        axis.set(title=f"means of heads, {source}", xlabel="mean self-repair / mean direct effect")
    for axis in axes:
        axis.axvspan(-1, 0, color="C3", alpha=0.1, lw=0)
        axis.axvspan(1, 2, color="C2", alpha=0.15, lw=0)
        axis.set(xlim=(-1, 2), ylim=(0, 1))
        axis.text(-0.95, 0.97, "made worse", fontsize=8, va="top")
        axis.text(1.95, 0.03, "over-corrected", fontsize=8, ha="right")
    legend_below(figure, axes, columns=4)
    return figure


def by_prompt(tokens: pd.DataFrame, title: str) -> Figure:
    """Self-repair (logits) of one head's tokens, prompt by prompt in the order of their means (marked)."""
    means = tokens.groupby("prompt")["self_repair"].mean().sort_values(kind="stable")
    rank = pd.Series(np.arange(1, len(means) + 1), index=means.index)
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    figure.suptitle(title, fontsize=10)
    axis.scatter(tokens["prompt"].map(rank), tokens["self_repair"], s=8, color="0.6", lw=0, label="token")
    axis.plot(rank, means, "_", ms=7, mew=1.8, color="C0", label="mean of a prompt")
    axis.axhline(tokens["self_repair"].mean(), color="C1", lw=1, ls="--", label="mean of all tokens")
    axis.axhline(0, color="0.3", lw=0.8, zorder=0)
    axis.set_xlabel("prompts that hold such tokens, in the order of their means")
    axis.set_ylabel("self-repair (logits)")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def spread(noise: dict[str, TokenNoise], title: str) -> Figure:
    """Spread, over-corrected and made worse per model, with the least that the claims need.

    The upright ticks are the controls: what a fixed share of the direct effect would give.
    """
    labels = {
        "spread": "spread of self-repair\nover mean direct effect",
        "over_corrected": "share of tokens over-corrected\n(self-repair > direct effect)",
        "made_worse": "share of tokens made worse\n(self-repair < 0)",
    }
    figure = _intervals(noise, labels, title)
    needed = {claim.statistic: claim.at_least for claim in load_claims()}
    for axis, quantity in zip(figure.axes, labels, strict=True):
        least = "dashed: the least that the claim needs"
        axis.axvline(needed[STATISTICS[quantity]], color="0.3", lw=1, ls="--", label=least)
        for y, found in enumerate(noise.values()):
            fixed = found.over_heads()[f"{quantity}_fixed"]
            label = None if y else "control: repair a fixed share of each head's direct effect"
            axis.plot(fixed.interval(), [y - 0.2, y - 0.2], color="0", lw=1.4)
            axis.plot(fixed.value, y - 0.2, "|", color="0", ms=8, mew=1.6, label=label)
    legend_below(figure, figure.axes[0], columns=2)
    return figure


def within_and_between(noise: dict[str, TokenNoise], title: str) -> Figure:
    """Components of the variance per model: standard deviations on one scale, share between prompts."""
    labels = {
        "within": "within prompts: standard\ndeviation over mean direct effect",
        "between": "between prompts: standard\ndeviation over mean direct effect",
        "between_share": "share of the variance\nthat lies between prompts",
    }
    figure = _intervals(noise, labels, title)
    _one_scale(figure.axes[:2])
    return figure


def correlations(noise: dict[str, TokenNoise], title: str) -> Figure:
    """Spearman's correlations of self-repair per model, on one scale."""
    labels = {
        "correlation_direct_effect": "rank correlation with\nthe direct effect",
        "correlation_probability": "rank correlation with\nthe correct token's clean probability",
        "correlation_position": "rank correlation with\nthe position in the prompt",
    }
    figure = _intervals(noise, labels, title)
    _one_scale(figure.axes)
    return figure


def _intervals(noise: dict[str, TokenNoise], labels: dict[str, str], title: str) -> Figure:
    """Means over heads with intervals, a panel per quantity, a row per model; small points: single heads."""
    models = list(noise)
    size = (3.3 * len(labels), 1.8 + 0.42 * len(models))
    figure, axes = plt.subplots(1, len(labels), figsize=size, sharey=True)
    figure.suptitle(title, fontsize=10)
    look = looks(models)
    for axis, (quantity, label) in zip(axes, labels.items(), strict=True):
        heads = {model: found.quantities[quantity].value.ravel() for model, found in noise.items()}
        for y, (model, found) in enumerate(noise.items()):
            colour, marker = look[model]
            heights = np.full(heads[model].shape, y + 0.24)
            axis.scatter(heads[model], heights, s=9, color=colour, alpha=0.35, lw=0)
            mean = found.over_heads()[quantity]
            axis.plot(mean.interval(), [y, y], color=colour, lw=2)
            axis.plot([mean.value], [y], marker, color=colour, ms=5)
        _limits(axis, np.concatenate(list(heads.values())))
        axis.set(xlabel=label, yticks=range(len(models)), yticklabels=models, ylim=(len(models) - 0.4, -0.6))
    return figure


def _limits(axis: Axes, heads: Float[np.ndarray, " head"]) -> None:
    """Zero in view, and at most the outermost heads (one in fifty at either end) out of it."""
    heads = heads[np.isfinite(heads)]
    low, high = np.quantile(heads, [0.02, 0.98]) if heads.size else (0, 1)
    margin = max(0.15 * (max(high, 0) - min(low, 0)), 1e-3)
    ends = np.array([min(low, 0) - margin, max(high, 0) + margin])
    for i, outwards in enumerate((-1, 1)):
        if (np.abs(heads - ends[i]) < 0.2 * margin).any():  # else its point would be cut in half
            ends[i] += 0.4 * outwards * margin
    axis.set_xlim(*ends)
    axis.axvline(0, color="0.3", lw=0.8, zorder=0)


def _one_scale(axes: Sequence[Axes]) -> None:
    lows, highs = zip(*(axis.get_xlim() for axis in axes), strict=True)
    for axis in axes:
        axis.set_xlim(min(lows), max(highs))
