"""Figures of notebook 04: how much single neurons repair, how few carry it, and which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.neuron_repair import ERASING, SUPPORTING, THRESHOLDS, NeuronRepair
from selfrepair.analysis.neurons import ModelNeurons
from selfrepair.plots.style import MARKERS, looks

COLOURS = plt.get_cmap("coolwarm")


def single_neurons(models: Sequence[ModelNeurons]) -> Figure:
    """Share of tokens on which the last MLP's Nth most repairing neuron alone repairs so much.

    Columns: models; rows: the chosen head, all heads of its layer. Bands: 95 % intervals (R&N §5).
    """
    figure, axes = plt.subplots(
        2, len(models), figsize=(3.4 * len(models) + 0.4, 5.8), squeeze=False, sharex=True, sharey=True
    )
    for column, model in zip(axes.T, models, strict=True):
        for axis, (scope, repair) in zip(column, model.scopes().items(), strict=True):
            shares = repair.repaired_alone(model.draws())
            nth = np.arange(1, shares.shape[1] + 1)
            low, high = shares.interval()
            for i, threshold in enumerate(THRESHOLDS):
                axis.fill_between(nth, low[i], high[i], color=f"C{i}", alpha=0.2, lw=0)
                look = {"color": f"C{i}", "marker": MARKERS[i], "label": f"≥ {100 * threshold:g} %"}
                axis.plot(nth, shares.value[i], ms=4, lw=1.2, **look)
            _title(axis, model, scope, repair)
        column[-1].set_xlabel("Nth most repairing neuron")
        column[-1].set_xticks(nth[1::2])
    for axis in axes[:, 0]:
        axis.set(ylabel="share of tokens", ylim=(-0.03, 1.03))
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncol=5,
        frameon=False,
        title="repairs alone, of the head's direct effect",
        fontsize=9,
    )
    return figure


def cumulative_change(models: Sequence[ModelNeurons]) -> Figure:
    """Cumulative share of the absolute change over the last MLP's neurons, repairing and harming apart.

    Columns: models. Colour: mean clean direct effect of neurons at that rank; below 0 they erase (R&N §5).
    """
    figure, axes = plt.subplots(
        2, len(models), figsize=(3.4 * len(models) + 1.2, 5.8), squeeze=False, sharex=True, sharey=True
    )
    panels = [
        (axis, model, scope, repair)
        for column, model in zip(axes.T, models, strict=True)
        for axis, (scope, repair) in zip(column, model.scopes().items(), strict=True)
    ]
    curves = [_curves(repair) for *_, repair in panels]
    furthest = max(np.abs(curve.clean).max() for sides in curves for curve in sides)
    norm = SymLogNorm(furthest / 30, vmin=-furthest, vmax=furthest)
    for (axis, model, scope, repair), sides in zip(panels, curves, strict=True):
        for curve, marker in zip(sides, "^v", strict=True):
            axis.plot(curve.rank, curve.share, color="0.6", lw=0.8, zorder=1)
            look = {"cmap": COLOURS, "norm": norm, "marker": marker, "edgecolors": "0.35", "linewidths": 0.5}
            axis.scatter(curve.rank, curve.share, c=curve.clean, s=34, zorder=2, **look)
        axis.set(xscale="log", ylim=(0, None))
        axis.xaxis.set_major_formatter("{x:g}")
        _title(axis, model, scope, repair)
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
        for m, label in (("^", "repairing neurons"), ("v", "harming neurons"))
    ]
    figure.legend(handles=marks, loc="outside lower center", ncol=2, frameon=False, fontsize=9)
    return figure


class _Curve(NamedTuple):
    """Means over tokens at some ranks: cumulative share of the absolute change, and clean direct effect."""

    rank: Int[np.ndarray, " point"]
    share: Float[np.ndarray, " point"]
    clean: Float[np.ndarray, " point"]


def _curves(repair: NeuronRepair) -> list[_Curve]:
    """Of repairing, then of harming neurons, at ranks evenly spread on a logarithmic axis."""
    curves = []
    for share, clean, tokens in zip(
        repair.share_by_rank, repair.clean_by_rank, repair.tokens_by_rank, strict=True
    ):
        rank = np.unique(np.geomspace(1, max(1, (tokens > 0).sum()), 20).round().astype(int))
        at = rank - 1
        curves.append(_Curve(rank, share[at] / repair.moved.sum(), clean[at] / tokens[at]))
    return curves


def neurons_for_half(models: Sequence[ModelNeurons]) -> Figure:
    """Share of the last MLP's neurons that carry half of its positive change: over tokens, a line a model."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2 + 0.2 * len(models)), sharex=True, sharey=True)
    look = looks(model.model for model in models)
    for model in models:
        label = []
        for axis, (scope, repair) in zip(axes, model.scopes().items(), strict=True):
            share = repair.n_for_half[np.isfinite(repair.n_for_half)] / repair.d_mlp
            line = axis.ecdf(100 * share, color=look[model.model][0], lw=1.4)
            label.append(f"{scope} ({len(share)} tokens)")
        line.set_label(f"{model.model}: {'; '.join(label)}")
    for axis, title in zip(axes, ("chosen head", "all heads of its layer"), strict=True):
        axis.axvline(5, color="0.3", lw=0.9, ls="--", label="the claim's limit" if axis is axes[1] else None)
        axis.set(
            title=title,
            xlabel="neurons that carry half of the\npositive change (% of the last MLP)",
            xlim=(0, None),
        )
    axes[0].set_ylabel("cumulative share of tokens")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    return figure


def overlaps(table: pd.DataFrame) -> Figure:
    """Jaccard overlap of repairing neurons between tokens of different prompts.

    ``table`` has the rows of :meth:`ModelNeurons.overlaps`, of one model or more.
    """
    groups = list(table.groupby(["model", "MLP"], sort=False))
    figure, axis = plt.subplots(figsize=(6.6, 0.5 * len(groups) + 1.7))
    labels = (
        "two tokens of the chosen head",
        "two tokens of any one head of its layer",
        "tokens of two heads of its layer",
    )
    for y, (_, rows) in enumerate(groups):
        for i, (row, label) in enumerate(zip(rows.itertuples(), labels, strict=True)):
            height = y + 0.2 * (i - 1)
            look = {"color": f"C{i}", "marker": MARKERS[i], "label": label if y == 0 else None}
            axis.plot([row.low, row.high], [height, height], color=f"C{i}", lw=1.4)
            axis.plot(row.overlap, height, ms=5, ls="", **look)
        label = "chance: random sets" if y == 0 else None
        axis.plot(2 * [row.chance], [y - 0.35, y + 0.35], color="0.3", lw=1.4, label=label)
    axis.set_yticks(range(len(groups)), [f"{model}, MLP {mlp}" for (model, mlp), _ in groups])
    axis.set_xlim(0, None)
    axis.invert_yaxis()
    axis.set_xlabel(
        "Jaccard overlap of the 20 most repairing neurons\n"
        "of two tokens from different prompts\n(95 % interval over prompts)"
    )
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncol=2, loc="outside upper center")
    return figure


def erasure_shares(statistics: Mapping[str, Statistics]) -> Figure:
    """Share of the positive change by neurons that erase, and its mirror image; with 95 % intervals."""
    statistics = {model: of for model, of in statistics.items() if of}  # too few layers for a later head
    figure, axis = plt.subplots(figsize=(6.6, 0.5 * len(statistics) + 1.6))
    names = {
        ERASING: "of the positive change: by neurons that erase (clean direct effect < 0)",
        SUPPORTING: "of the negative change: by neurons that support (clean direct effect > 0)",
    }
    for y, found in enumerate(statistics.values()):
        for i, (name, label) in enumerate(names.items()):
            look = {"color": f"C{i}", "marker": MARKERS[i], "label": label if y == 0 else None}
            height = y + 0.2 * i - 0.1
            axis.plot(found[name].interval(), [height, height], color=f"C{i}", lw=1.4)
            axis.plot(found[name].value, height, ms=5, ls="", **look)
    axis.axvline(0.5, color="0.3", lw=0.9, ls="--")
    axis.set_yticks(range(len(statistics)), statistics)
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    axis.set_xlabel("share of the last MLP's positive or negative change\n(95 % interval over prompts)")
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper center")
    return figure


def _title(axis: Axes, model: ModelNeurons, scope: str, repair: NeuronRepair) -> None:
    axis.set_title(f"{model.model}, {scope}\nMLP {repair.mlp}, n = {len(repair.prompt)} tokens", fontsize=9)
