"""Figures of notebook 01: self-repair of every head of every model."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair.analysis.head_table import layer_means
from selfrepair.plots.style import looks


def self_repair_by_depth(panels: dict[str, pd.DataFrame], intervals: dict[str, pd.DataFrame]) -> Figure:
    """Self-repair (logits) of every head against relative depth, with layer means (R&N Fig. 1), by panel.

    ``intervals`` of layer means (``layer, low, high``) are drawn for the models that they are given for.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.8), squeeze=False)
    look = looks(model for table in panels.values() for model in table["model"])
    for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
        means = layer_means(table)
        for i, (model, rows) in enumerate(table.groupby("model", sort=False)):
            colour, marker = look[model]
            depth = rows["layer"] / max(1, rows["layer"].max())
            axis.scatter(
                depth + 0.008 * (i - 2), rows["self_repair"], s=9, color=colour, alpha=0.35, linewidths=0
            )
            here = means[means["model"] == model]
            axis.plot(
                here["relative_depth"], here["self_repair"], color=colour, marker=marker, ms=5, label=model
            )
            if model in intervals:
                ends = intervals[model]
                place = ends["layer"] / max(1, ends["layer"].max())
                axis.vlines(place, ends["low"], ends["high"], color=colour, lw=2, alpha=0.7)
        axis.axhline(0, color="0.4", lw=0.8, ls="--", zorder=0)
        axis.set(title=title, xlabel="relative depth of the ablated head's layer")
        _symmetric_log(axis, table["self_repair"])
        bars = ", bars: 95 % intervals" if set(table["model"]) & set(intervals) else ""
        axis.legend(
            frameon=False,
            fontsize=8,
            ncol=3,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            title=f"points: heads; lines: layer means{bars}",
        )
        axis.get_legend().get_title().set_fontsize(8)
    axes[0, 0].set_ylabel("self-repair (logits)")
    return figure


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
        low = min(1.15 * table["logit_change"].quantile(0.02), -right)
        left = min(0, 1.1 * table["direct_effect"].min())
        axis.set(title=title, xlabel="direct effect (logits)", ylabel="logit change (logits)")
        axis.set(xlim=(left, right), ylim=(low, 0.35 * right))
        below = int((table["logit_change"] < low).sum())
        if below:
            said = f"not shown: {below} below"
            axis.annotate(said, (0.03, 0.03), xycoords="axes fraction", fontsize=8, color="0.3")
    entries = {
        label: handle
        for axis in axes.flat[: len(panels)]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncol=4, frameon=False, fontsize=8
    )
    return figure


def _symmetric_log(axis: Axes, values: pd.Series) -> None:
    """A symmetric-log y axis, linear below the typical size, where some heads' values dwarf the others."""
    typical = float(values.abs().median())
    if values.abs().max() > 12 * typical > 0:
        threshold = 10.0 ** np.round(np.log10(2 * typical))
        axis.set_yscale("symlog", linthresh=threshold)
        said = f"linear within ±{threshold:g}, logarithmic beyond"
        axis.annotate(said, (0.02, 0.02), xycoords="axes fraction", fontsize=7, color="0.4")
