"""Figures of notebook 01: self-repair of every head of every model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair.analysis.head_means import HeadMeans
from selfrepair.analysis.head_table import layer_means
from selfrepair.plots.panels import legend_below
from selfrepair.plots.style import looks


def self_repair_by_depth(panels: Mapping[str, pd.DataFrame], measured: Mapping[str, HeadMeans]) -> Figure:
    """Self-repair (logits) of every head against relative depth, with layer means (R&N Fig. 1), by panel.

    All panels have one linear scale, which holds all layer means; heads beyond it are triangles at its edge.
    Intervals of the layer means are drawn for the models that were ``measured``.
    """
    size = (5.2 * len(panels), 4.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    look = looks(model for table in panels.values() for model in table["model"])
    limits = _common_scale(panels.values())
    for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
        means = layer_means(table)
        axis.set_ylim(*limits)
        for i, (model, rows) in enumerate(table.groupby("model", sort=False)):
            colour, marker = look[model]
            depth = rows["layer"] / max(1, rows["layer"].max()) + 0.008 * (i - 2)
            _heads(axis, depth, rows["self_repair"], colour)
            here = means[means["model"] == model]
            axis.plot(
                here["relative_depth"], here["self_repair"], color=colour, marker=marker, ms=5, label=model
            )
            if model in measured:
                ends = measured[model].layer_intervals()
                place = ends["layer"] / max(1, ends["layer"].max())
                axis.vlines(place, ends["low"], ends["high"], color=colour, lw=2, alpha=0.7)
        axis.axhline(0, color="0.4", lw=0.8, ls="--", zorder=0)
        axis.set(title=title, xlabel="relative depth of the ablated head's layer")
        bars = ", bars: 95% intervals" if set(table["model"]) & set(measured) else ""
        axis.legend(
            frameon=False,
            fontsize=8,
            ncol=3,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            title=f"points: heads (triangles: beyond the axis); lines: layer means{bars}",
        )
        axis.get_legend().get_title().set_fontsize(8)
    axes[0, 0].set_ylabel("self-repair (logits)")
    return figure


def _common_scale(tables: Iterable[pd.DataFrame]) -> tuple[float, float]:
    """Ends of an axis with all layer means and all but the outermost heads (2% at either end of a table)."""
    values = [
        np.r_[layer_means(table)["self_repair"], table["self_repair"].quantile([0.02, 0.98])]
        for table in tables
    ]
    low, high = np.min(np.concatenate(values)), np.max(np.concatenate(values))
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _heads(axis: Axes, depth: pd.Series, repair: pd.Series, colour: str) -> None:
    """A point per head; a triangle at the edge of the axis for one that lies beyond it."""
    low, high = axis.get_ylim()
    look: dict[str, Any] = {"color": colour, "alpha": 0.35, "linewidths": 0, "clip_on": False}
    inside = repair.between(low, high)
    axis.scatter(depth[inside], repair[inside], s=9, **look)
    for edge, beyond, marker in ((low, repair < low, "v"), (high, repair > high, "^")):
        axis.scatter(depth[beyond], np.full(beyond.sum(), edge), s=16, marker=marker, **look)


def effect_against_change(panels: dict[str, pd.DataFrame]) -> Figure:
    """Direct effect against logit change per head, the no-repair line ``y = −x`` and the self-repair zone."""
    columns = min(2, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    size = (4.6 * columns, 3.6 * rows_of_panels + 0.7)
    figure, axes = plt.subplots(rows_of_panels, columns, figsize=size, squeeze=False)
    look = looks(model for table in panels.values() for model in table["model"])
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, table) in zip(axes.flat, panels.items(), strict=False):
        right = 1.08 * table["direct_effect"].max()
        line = np.array([0, right])
        axis.fill_between(line, -line, 0, color="0.92", zorder=0, label="self-repair zone")
        axis.plot(line, -line, color="0.3", lw=1, ls="--", label="no repair: $y = -x$")
        axis.axhline(0, color="0.3", lw=0.8)
        for model, rows in table.groupby("model", sort=False):
            colour, marker = look[model]
            axis.scatter(
                rows["direct_effect"],
                rows["logit_change"],
                s=13,
                color=colour,
                marker=marker,
                alpha=0.6,
                linewidths=0,
                label=model,
            )
        low = min(1.15 * table["logit_change"].quantile(0.005), -right)
        left = min(-0.02 * right, 1.1 * table["direct_effect"].min())
        high = max(1.15 * table["logit_change"].max(), -0.05 * low)
        axis.set(title=title, xlabel="direct effect (logits)", ylabel="logit change (logits)")
        axis.set(xlim=(left, right), ylim=(low, high))
        below = int((table["logit_change"] < low).sum())
        if below:
            said = f"not shown: {below} below"
            axis.annotate(said, (0.03, 0.03), xycoords="axes fraction", fontsize=8, color="0.3")
    legend_below(figure, axes.flat[: len(panels)], columns=4)
    return figure
