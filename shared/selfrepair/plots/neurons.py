"""Figures of notebook 04: how much single neurons repair, how few carry it, and whether they are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from selfrepair.analysis.neuron_repair import BREAKING, HALF, REPAIRING, NeuronTotals, gaussian_half
from selfrepair.analysis.neurons import ModelNeurons
from selfrepair.analysis.rules import load_claims
from selfrepair.plots.style import looks

#: Red below 0 (erasing), blue above, as tokens in context have them.
COLOURS = plt.get_cmap("coolwarm_r")
#: Markers of the kinds of tokens in :func:`overlaps`.
MARKERS = ("o", "s", "^")


def single_neurons(models: Sequence[ModelNeurons]) -> Figure:
    """Share of tokens on which the last MLP's Nth most repairing neuron alone repairs so much.

    Columns: models; rows: the chosen head, all heads of its layer. Bands: 95% intervals. Dashed: the Nth
    most breaking neuron breaks so much (R&N §4, the authors' ``top_neuron_explains_instances``).
    """
    figure, axes = plt.subplots(
        2, len(models), figsize=(3.4 * len(models) + 0.4, 5.8), squeeze=False, sharex=True, sharey=True
    )
    for column, model in zip(axes.T, models, strict=True):
        for axis, (scope, repair) in zip(column, model.scopes().items(), strict=True):
            shares = repair.repaired_alone(model.draws())
            broken = repair.repaired_alone(model.draws()[:1], BREAKING).value
            nth = np.arange(1, shares.shape[1] + 1)
            low, high = shares.interval()
            for i, threshold in enumerate(repair.thresholds):
                axis.fill_between(nth, low[i], high[i], color=f"C{i}", alpha=0.2, lw=0)
                axis.plot(nth, shares.value[i], color=f"C{i}", lw=1.4, label=f"≥ {100 * threshold:g}%")
                axis.plot(nth, broken[i], color=f"C{i}", lw=1, ls="--")
            axis.set_title(
                f"{model.model}, {scope}\nMLP {repair.mlp}, n = {len(repair.prompt)} tokens", fontsize=9
            )
        column[-1].set_xlabel("Nth most repairing neuron")
    for axis in axes[:, 0]:
        axis.set(ylabel="share of tokens", ylim=(-0.03, 1.03), xlim=(0, len(nth) + 1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles += [Line2D([], [], color="0.3", lw=1, ls="--")]
    figure.legend(
        handles,
        [*labels, "Nth most breaking"],
        loc="outside lower center",
        ncol=6,
        frameon=False,
        title="repairs alone, of the head's direct effect",
        fontsize=9,
    )
    return figure


def cumulative_change(models: Sequence[ModelNeurons]) -> Figure:
    """Cumulative share of the absolute change over the last MLP's neurons, repairing and breaking apart.

    Columns: models. Colour: mean clean direct effect of neurons at that rank; below 0 they erase (R&N §4,
    the authors' ``average_cumulative_self_repair``).
    """
    figure, axes = plt.subplots(
        2, len(models), figsize=(3.4 * len(models) + 1.2, 5.8), squeeze=False, sharex=True, sharey=True
    )
    panels = [
        (axis, f"{model.model}, {scope}\nMLP {model.later_mlps[-1]}, n = {totals.n_moved} tokens", totals)
        for column, model in zip(axes.T, models, strict=True)
        for axis, (scope, totals) in zip(column, model.total_scopes().items(), strict=True)
    ]
    curves = [_curves(totals) for *_, totals in panels]
    furthest = max(np.abs(curve.clean).max() for sides in curves for curve in sides)
    norm = SymLogNorm(furthest / 30, vmin=-furthest, vmax=furthest)
    for (axis, title, _), sides in zip(panels, curves, strict=True):
        for curve, marker in zip(sides, "^v", strict=True):
            axis.plot(curve.rank, curve.share, color="0.6", lw=0.8, zorder=1)
            look: dict[str, Any] = {
                "cmap": COLOURS,
                "norm": norm,
                "marker": marker,
                "edgecolors": "0.35",
                "linewidths": 0.5,
            }
            axis.scatter(curve.rank, curve.share, c=curve.clean, s=34, zorder=2, **look)
        axis.set(xscale="log", ylim=(0, None))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(title, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("neurons, largest change first")
    for axis in axes[:, 0]:
        axis.set_ylabel("cumulative share of\nthe absolute change")
    ends = [end * furthest * 10**-power for end in (-1, 1) for power in (0, 0.5, 1)]
    bar = figure.colorbar(
        plt.cm.ScalarMappable(norm, COLOURS), ax=axes, aspect=40, ticks=[0, *ends], format="{x:.2g}"
    )
    bar.ax.minorticks_off()
    bar.set_label("mean clean direct effect (logits); below 0: erasure")
    marks = [
        Line2D([], [], marker=m, color="0.6", mfc="0.9", mec="0.35", label=label)
        for m, label in (("^", "repairing neurons"), ("v", "breaking neurons"))
    ]
    figure.legend(handles=marks, loc="outside lower center", ncol=2, frameon=False, fontsize=9)
    return figure


class _Curve(NamedTuple):
    """Means over tokens at some ranks: cumulative share of the absolute change, and clean direct effect."""

    rank: Int[np.ndarray, " point"]
    share: Float[np.ndarray, " point"]
    clean: Float[np.ndarray, " point"]


def _curves(totals: NeuronTotals) -> list[_Curve]:
    """Of repairing, then of breaking neurons, at ranks evenly spread on a logarithmic axis."""
    curves = []
    for side, sign in ((REPAIRING, 1), (BREAKING, -1)):
        tokens = totals.tokens_by_rank[side]
        rank = np.unique(np.geomspace(1, max(1, (tokens > 0).sum()), 20).round().astype(int))
        at = rank - 1
        clean = sign * totals.clean_by_rank[side][at] / tokens[at]
        curves.append(_Curve(rank, totals.share_by_rank[side][at] / totals.n_moved, clean))
    return curves


def neurons_for_half(models: Sequence[ModelNeurons]) -> Figure:
    """Share of the last MLP's neurons that carry half of its positive change: over tokens, a line a model.

    Dashed: of its negative change. Vertical: the claim's limit, and what Gaussian changes would need.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.9 + 0.2 * len(models)), sharex=True, sharey=True)
    (limit,) = [claim.at_most for claim in load_claims() if claim.statistic == HALF]
    look = looks(model.model for model in models)
    gaussian = []
    for model in models:
        label = []
        for axis, (scope, repair) in zip(axes, model.scopes().items(), strict=True):
            share, mirror = repair.share_for_half(REPAIRING), repair.share_for_half(BREAKING)
            line = axis.ecdf(100 * share, color=look[model.model][0], lw=1.4)
            axis.ecdf(100 * mirror, color=look[model.model][0], lw=0.9, ls="--")
            label.append(f"{scope} ({len(share)} tokens)")
        line.set_label(f"{model.model}: {'; '.join(label)}")
        gaussian.append(gaussian_half(repair.d_mlp))
    for axis, title in zip(axes, ("chosen head", "all heads of its layer"), strict=True):
        axis.axvline(100 * limit, color="0.3", lw=0.9, ls=":", label="the claim's limit")
        axis.axvline(100 * np.mean(gaussian), color="0.3", lw=1.2, ls="-.", label="Gaussian changes")
        axis.set(
            title=title,
            xlabel="neurons that carry half of the\npositive change (% of the last MLP)",
            xscale="log",
        )
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.xaxis.set_minor_formatter("{x:g}")
    axes[0].set_ylabel("cumulative share of tokens")
    handles, labels = axes[1].get_legend_handles_labels()
    handles += [Line2D([], [], color="0.3", lw=0.9, ls="--")]
    labels += ["dashed: of the negative change (tokens without any change are left out)"]
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8, ncol=1)
    return figure


def overlaps(table: pd.DataFrame) -> Figure:
    """Jaccard overlap of repairing neurons between tokens of different prompts; open: of the strongest ones.

    ``table`` has the rows of :meth:`ModelNeurons.overlaps`, of one model or more.
    """
    groups = list(table.groupby(["model", "MLP"], sort=False))
    figure, axis = plt.subplots(figsize=(6.6, 0.5 * len(groups) + 2.1))
    labels = (
        "two tokens of the chosen head",
        "two tokens of any one head of its layer",
        "tokens of two heads of its layer",
    )
    for y, (_, rows) in enumerate(groups):
        for i, (row, label) in enumerate(zip(rows.to_dict("records"), labels, strict=True)):
            height = y + 0.2 * (i - 1)
            for kind, face in (("overlap", f"C{i}"), ("strongest", "white")):
                ends = [row[f"{kind} low"], row[f"{kind} high"]]
                axis.plot(ends, [height, height], color=f"C{i}", lw=1.4, zorder=1)
                look: dict[str, Any] = {
                    "color": f"C{i}",
                    "mfc": face,
                    "marker": MARKERS[i],
                    "ms": 5,
                    "ls": "",
                }
                shown = label if y == 0 and kind == "overlap" else None
                axis.plot(row[kind], height, label=shown, **look)
        of_chance = "chance: random sets" if y == 0 else None
        axis.plot(2 * [rows["chance"].iloc[0]], [y - 0.35, y + 0.35], color="0.3", lw=1.4, label=of_chance)
    axis.set_yticks(range(len(groups)), [f"{model}, MLP {mlp}" for (model, mlp), _ in groups])
    axis.set_xlim(0, None)
    axis.invert_yaxis()
    axis.set_xlabel(
        "Jaccard overlap of the 20 neurons of two tokens\nfrom different prompts (95% interval over prompts)"
    )
    handles, texts = axis.get_legend_handles_labels()
    handles += [Line2D([], [], color="0.3", mfc=face, marker="o", ls="") for face in ("0.3", "white")]
    texts += ["filled: the most repairing", "open: largest clean direct effect"]
    figure.legend(handles, texts, frameon=False, fontsize=8, ncol=2, loc="outside lower center")
    return figure
