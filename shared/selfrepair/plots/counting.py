"""Figures of notebook 07: every way of counting, both ends of a head's tokens, slopes beside ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair.analysis.breakdown import SUMS, WAYS
from selfrepair.analysis.mirror import BOTTOM, TOP
from selfrepair.plots.layernorm import SUM_LABELS, SUM_LOOKS
from selfrepair.plots.panels import legend_below
from selfrepair.plots.style import looks

#: Colour and marker of each kind of ablation; of others, as they come.
KIND_LOOKS = {
    "resample": ("#0173b2", "o"),
    "mean": ("#c2700a", "s"),
    "zero": ("#029e73", "^"),
    "optimal": ("#b0569f", "D"),
}
#: Ends of the axes: what lies beyond is marked at the edge.
CLIPPED_LIMITS, LIMITS = (0.0, 0.6), (-0.4, 0.6)
ROW_LABELS = SUM_LABELS | {
    "norm frozen": "heads and MLPs\n(norm frozen)",
    "self-repair": "self-repair\n(all parts)",
}


def multiverse_figure(table: pd.DataFrame, draws: pd.DataFrame | None) -> Figure:
    """One model's answers: parts below each other, ways side by side, against the fraction of tokens.

    ``table`` is as :func:`~selfrepair.analysis.counting.multiverse` gives it; a line for each kind of
    ablation, with 95% intervals and its floor (dotted). ``draws`` are other donors (thin, without intervals),
    as of :func:`~selfrepair.analysis.counting.multiverse_of_draws`.
    """
    figure, axes = _panels(WAYS)
    kinds = list(dict.fromkeys(table["kind"]))
    for row, part in zip(axes, SUMS, strict=True):
        for axis, way in zip(row, WAYS, strict=True):
            here = table[(table["part"] == part) & (table["way"] == way)]
            limits = CLIPPED_LIMITS if way == "clipped" else LIMITS
            if draws is not None:
                _thin(axis, draws[(draws["part"] == part) & (draws["way"] == way)], limits)
            for i, kind in enumerate(kinds):
                _line(
                    axis, here[here["kind"] == kind], kind, *KIND_LOOKS.get(kind, (f"C{i}", "v")), limits, i
                )
    legend_below(figure, axes.flat, columns=6)
    return figure


def released_figure(table: pd.DataFrame) -> Figure:
    """The same of the released tables, a line for each model: clipped shares, and ratios of means.

    ``table`` is as :func:`~selfrepair.analysis.counting.released_points` gives it.
    """
    ways = list(dict.fromkeys(table["way"]))
    figure, axes = _panels(ways)
    models = list(dict.fromkeys(table["model"]))
    look = looks(models)
    for row, part in zip(axes, SUMS, strict=True):
        for axis, way in zip(row, ways, strict=True):
            here = table[(table["part"] == part) & (table["way"] == way)]
            if here.empty:
                place = {"transform": axis.transAxes, "ha": "center", "va": "center"}
                axis.text(0.5, 0.5, "not released", fontsize=8, color="0.4", **place)
            limits = CLIPPED_LIMITS if way == "clipped" else LIMITS
            for i, model in enumerate(models):
                _line(axis, here[here["model"] == model], model, *look[model], limits, i)
    legend_below(figure, axes.flat, columns=4)
    return figure


def _panels(ways: Sequence[str]) -> tuple[Figure, np.ndarray]:
    size = (2.6 * len(ways) + 1, 1.55 * len(SUMS) + 1)
    figure, axes = plt.subplots(len(SUMS), len(ways), figsize=size, squeeze=False, sharex=True, sharey="col")
    for axis, way in zip(axes[0], ways, strict=True):
        axis.set_title(way, fontsize=9)
    for axis, part in zip(axes[:, 0], SUMS, strict=True):
        axis.set_ylabel(ROW_LABELS[part], fontsize=8.5)
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.axhline(0, color="0.6", lw=0.7, zorder=0)
    for column, way in enumerate(ways):
        axes[0, column].set_ylim(CLIPPED_LIMITS if way == "clipped" else LIMITS)
        axes[-1, column].set_xlim(0.0007, 1.6)
        axes[-1, column].set_xticks([0.001, 0.01, 0.1, 1], ["0.1%", "1%", "10%", "100%"])
        axes[-1, column].set_xlabel("fraction of tokens", fontsize=9)
    return figure, axes


def _line(
    axis: Axes,
    rows: pd.DataFrame,
    label: str,
    colour: str,
    marker: str,
    limits: tuple[float, float],
    number: int,
) -> None:
    """Points with their intervals, beside those of other lines; a dotted line for the floor."""
    rows = rows.sort_values("fraction")
    if rows.empty:
        return
    at = rows["fraction"].to_numpy() * 1.07 ** (number - 1.5)
    estimate = rows["estimate"].to_numpy()
    bars = np.nan_to_num(np.abs(rows[["low", "high"]].to_numpy().T - estimate))
    look: dict[str, Any] = {"color": colour, "marker": marker, "ms": 2.8, "lw": 1.0, "elinewidth": 1.6}
    axis.errorbar(at, estimate, bars, label=label, **look)
    if "floor" in rows and (rows["floor"] > 0).any():
        (floor,) = axis.plot(at, rows["floor"], color=colour, lw=0.9, ls=":")
        if number == 0:
            floor.set_label("floor: signs at random (0 where not clipped)")
    for edge, beyond, triangle in (
        (limits[0], estimate < limits[0], "v"),
        (limits[1], estimate > limits[1], "^"),
    ):
        (mark,) = axis.plot(at[beyond], np.full(beyond.sum(), edge), triangle, color=colour, mfc="none", ms=5)
        mark.set(clip_on=False, in_layout=False)


def _thin(axis: Axes, rows: pd.DataFrame, limits: tuple[float, float]) -> None:
    says = f"resample, {rows['draw'].nunique()} choices of donors, {rows['n_prompts'].max()} of the prompts"
    for number, (_, of_draw) in enumerate(rows.groupby("draw")):
        of_draw = of_draw.sort_values("fraction")
        label = None if number else says
        shown = of_draw["estimate"].clip(*limits)
        axis.plot(of_draw["fraction"], shown, color="0.45", lw=0.8, zorder=1, label=label)


def both_ends_figure(table: pd.DataFrame, slopes: pd.DataFrame) -> Figure:
    """Top against bottom tokens, a row for each model: what each part is of the direct effect there.

    Right: slopes of repair on lost direct effect over all tokens. Tables as
    :func:`~selfrepair.analysis.mirror.both_ends` and :func:`~selfrepair.analysis.mirror.slopes_table`.
    """
    models = list(dict.fromkeys(table["model"]))
    size = (10.5, 0.62 * len(models) + 1.9)
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True)
    panels = [table[table["end"] == TOP], table[table["end"] == BOTTOM], slopes]
    for axis, rows in zip(axes, panels, strict=True):
        for y, model in enumerate(models):
            axis.axhline(y, color="0.93", lw=0.8, zorder=0)
            for i, part in enumerate(SUMS):
                of_part = rows[(rows["model"] == model) & (rows["part"] == part)].iloc[0]
                height, (colour, marker) = y + 0.15 * (i - 2), SUM_LOOKS[part]
                axis.plot([of_part["low"], of_part["high"]], [height, height], color=colour, lw=1.4)
                axis.plot(of_part["estimate"], height, marker, color=colour, ms=4.5, label=SUM_LABELS[part])
        axis.axvline(0, color="0.5", lw=0.8)
    axes[0].set_yticks(range(len(models)), models)
    axes[0].set_ylim(len(models) - 0.45, -0.55)
    axes[0].set(title="tokens where the head helps most", xlabel="share of the direct effect")
    axes[1].set(title="tokens where the head hurts most", xlabel="share of the direct effect")
    axes[2].set(title="all tokens", xlabel="slope on the lost direct effect")
    legend_below(figure, axes, columns=5)
    return figure
