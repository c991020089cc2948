"""Figures of notebook 03: the final norm's scale, the breakdown of self-repair, and ways of counting it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfrepair.analysis.breakdown import FLOOR, SUMS, WAYS, Breakdown
from selfrepair.analysis.layernorm import ScaleRatios
from selfrepair.plots.panels import legend_below
from selfrepair.plots.style import looks

PART_LABELS = {"layernorm": "final norm", "heads": "other heads", "mlps": "MLPs"}
PART_LOOKS = {"layernorm": ("C0", "o"), "heads": ("C1", "s"), "mlps": ("C2", "^")}
SUM_LABELS = PART_LABELS | {"norm frozen": "heads and MLPs (norm frozen)", "self-repair": "all: self-repair"}
SUM_LOOKS = PART_LOOKS | {"norm frozen": ("0.55", "D"), "self-repair": ("0", "X")}
QUANTITY_LABELS = {
    "logits": "logits",
    "clipped": "share of DE\nclipped per token",
    "unclipped mean": "share of DE\nunclipped mean",
    "median": "share of DE\nmedian",
    "ratio of means": "share of DE\nratio of means",
}
#: Ends of the axes of shares; those that are not clipped may lie far below 0 and above 1.
SHARE_LIMITS = dict.fromkeys(WAYS, (-0.6, 1.1)) | {"clipped": (0.0, 0.7)}


def scale_ratio_histograms(ratios: Sequence[Sequence[ScaleRatios]]) -> Figure:
    """Histograms of ``σ_clean / σ_ablated`` (R&N §3): a row per head, a column per kind of ablation.

    The axis of a row holds all but one in 500 of all tokens and one in 100 of any panel's top tokens at
    either end. How many it leaves out is said. The triangle is the median of the top tokens.
    """
    n_rows, n_columns = len(ratios), max(map(len, ratios))
    size = (3.2 * n_columns + 0.4, 2.7 * n_rows + 0.5)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, sharex="row")
    for row, of_head in zip(axes, ratios, strict=True):
        together = np.concatenate([one.all_tokens.ravel() for one in of_head])
        ends = [np.quantile(together, [0.002, 0.998])]
        ends += [np.quantile(one.all_tokens[one.top], [0.01, 0.99]) for one in of_head]
        first, last = np.min(ends), np.max(ends)
        bins = np.linspace(first, last, 45)
        for axis, one in zip(row, of_head, strict=True):
            shown = {"all tokens": (one.all_tokens, "0.6"), "top tokens": (one.all_tokens[one.top], "C0")}
            for name, (values, colour) in shown.items():
                outside = int(((values < first) | (values > last)).sum())
                label = f"{name}: {(values > 1).mean():.0%} above 1, {outside} outside"
                look: dict[str, Any] = {"color": colour, "alpha": 0.6, "histtype": "stepfilled"}
                axis.hist(values.ravel(), bins, density=True, label=label, **look)
            axis.axvline(1, ymax=0.7, color="0.2", lw=0.8, ls="--")
            median = float(np.median(one.all_tokens[one.top]))
            at_top = {"transform": axis.get_xaxis_transform(), "color": "C0", "ms": 6, "mec": "0.2", "ls": ""}
            axis.plot(median, 0.7, "v", label=f"median of top tokens: {median:.3f}", **at_top)
            axis.set_title(f"{one.model} L{one.layer}H{one.head}, {one.ablation}", fontsize=9)
            axis.set_xlabel(r"$\sigma_\mathrm{clean}/\sigma_\mathrm{ablated}$")
            axis.legend(frameon=False, fontsize=7.5, loc="upper left", handlelength=1.2)
            axis.set_ylim(0, 1.5 * axis.get_ylim()[1])
        row[0].set_ylabel("density of tokens")
    return figure


def breakdown_by_layer(table: pd.DataFrame) -> Figure:
    """Self-repair by part against layer: a column per model, a row for logits and for each way of counting.

    ``table`` has the rows of :meth:`Breakdown.by_layer`; shares beyond the axis are marked at its edge. The
    clipped shares stand above their floors (dotted).
    """
    models, quantities = list(dict.fromkeys(table["model"])), ["logits", *WAYS]
    size = (2.3 * len(models) + 0.9, 1.75 * len(quantities) + 0.6)
    figure, axes = plt.subplots(
        len(quantities), len(models), figsize=size, squeeze=False, sharex="col", sharey="row"
    )
    for row, quantity in zip(axes, quantities, strict=True):
        for axis, model in zip(row, models, strict=True):
            here = table[(table["model"] == model) & (table["quantity"] == quantity)]
            _parts_by_layer(axis, here, SHARE_LIMITS.get(quantity))
            if quantity == "clipped":
                _floors_by_layer(axis, table[(table["model"] == model) & (table["quantity"] == FLOOR)])
        row[0].set_ylabel(QUANTITY_LABELS[quantity], fontsize=9)
    logits = table.loc[table["quantity"] == "logits", "estimate"]
    largest, typical = float(logits.abs().max()), float(logits.abs().median())
    if largest > 12 * typical > 0:
        axes[0, 0].set_yscale("symlog", linthresh=10.0 ** np.round(np.log10(3 * typical)))
    for axis, model in zip(axes[0], models, strict=True):
        axis.set_title(model, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("layer of the ablated head", fontsize=9)
    legend_below(figure, axes[:2, 0], columns=4)
    return figure


def _floors_by_layer(axis: Axes, rows: pd.DataFrame) -> None:
    for i, (part, (colour, _)) in enumerate(PART_LOOKS.items()):
        here = rows[rows["part"] == part].sort_values("layer")
        layer = here["layer"] + 0.12 * (i - 1)
        (line,) = axis.plot(layer, here["estimate"], color=colour, lw=1, ls=":")
        if not i:
            line.set_label("floor: signs at random")


def _parts_by_layer(axis: Axes, rows: pd.DataFrame, limits: tuple[float, float] | None) -> None:
    axis.axhline(0, color="0.6", lw=0.7, zorder=0)
    for i, (part, (colour, marker)) in enumerate(PART_LOOKS.items()):
        here = rows[rows["part"] == part].sort_values("layer")
        layer, estimate = here["layer"].to_numpy() + 0.12 * (i - 1), here["estimate"].to_numpy()
        bars = np.abs(here[["low", "high"]].to_numpy().T - estimate)
        look: dict[str, Any] = {"color": colour, "marker": marker, "ms": 3.5, "lw": 1, "elinewidth": 0.8}
        axis.errorbar(layer, estimate, bars, label=PART_LABELS[part], **look)
        if limits is not None:
            low, high = limits
            for edge, beyond, triangle in ((low, estimate < low, "v"), (high, estimate > high, "^")):
                place = np.full(beyond.sum(), edge)
                (mark,) = axis.plot(layer[beyond], place, triangle, color=colour, mfc="none", ms=5)
                mark.set(clip_on=False, in_layout=False)
    if limits is not None:
        axis.set_ylim(*limits)
    cast(MaxNLocator, axis.xaxis.get_major_locator()).set_params(integer=True)


def ways_of_counting(measured: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """The final norm's share of the direct effect, each way of counting, per model; with the paper's 30%.

    Tables have ``model, way, estimate`` and ``low, high`` where there are intervals; rows of
    :data:`~selfrepair.analysis.breakdown.FLOOR` are ticks beside the clipped shares.
    """
    rows = [(f"{model}", group) for model, group in measured.groupby("model", sort=False)]
    rows += [(f"{model} (published)", group) for model, group in published.groupby("model", sort=False)]
    figure, axis = plt.subplots(figsize=(7.2, 0.42 * len(rows) + 1.7))
    look = looks(WAYS)
    for y, (_, group) in enumerate(rows):
        axis.axhline(y, color="0.92", lw=0.8, zorder=0)
        for i, way in enumerate(WAYS):
            for row in group[group["way"] == way].itertuples():
                colour, marker = look[way]
                height = y + 0.13 * (i - 1.5)
                if "low" in group and np.isfinite(row.low):
                    axis.plot([row.low, row.high], [height, height], color=colour, lw=1.2)
                label = way if y == 0 else None
                axis.plot(row.estimate, height, marker, color=colour, ms=5, label=label)
        for row in group[group["way"] == FLOOR].itertuples():
            label = "floor of clipped: signs at random" if y == 0 else None
            axis.plot(row.estimate, y - 0.195, "|", color="0", ms=9, mew=1.6, label=label)
    axis.axvline(0.3, color="0.3", lw=0.9, ls="--", label="30%")
    axis.axvline(0, color="0.6", lw=0.7)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("final norm's self-repair as a share of the direct effect")
    axis.legend(frameon=False, fontsize=8, ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def shares_and_floors(measured: dict[str, Breakdown], published: dict[str, Breakdown]) -> Figure:
    """Clipped shares beside their floors; and each head's clipped share against its share of means.

    Left: means over heads, by part and model, 95% intervals. Then the final norm's share of single heads,
    which need not repair on average to have one.
    """
    size = (12, 0.45 * len(measured) + 2.8)
    figure, axes = plt.subplots(1, 3, figsize=size, width_ratios=(1.35, 1, 1))
    _shares_beside_floors(axes[0], measured)
    look = looks([*measured, *published])
    _shares_of_heads(axes[1], measured, look)
    _shares_of_heads(axes[2], published, look)
    axes[1].set(title="final norm, single heads, measured", ylabel="clipped share")
    axes[2].set_title("final norm, single heads, published")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return figure


def _shares_beside_floors(axis: Axes, models: dict[str, Breakdown]) -> None:
    for y, breakdown in enumerate(models.values()):
        for i, (part, (colour, marker)) in enumerate(PART_LOOKS.items()):
            height = y + 0.24 * (i - 1)
            share, floor = (
                found[part].mean((0, 1)) for found in (breakdown.shares["clipped"], breakdown.floors)
            )
            label = None if y else PART_LABELS[part]
            axis.plot(share.interval(), [height, height], color=colour, lw=2)
            axis.plot(share.value, height, marker, color=colour, ms=5, label=label)
            label = None if y or i else "floor: signs at random"
            axis.plot(floor.value, height, "|", color="0", ms=9, mew=1.6, label=label)
    axis.set_yticks(range(len(models)), models)
    axis.set(xlabel="clipped share of the direct effect,\nmean over heads", title="parts, measured")
    axis.set_ylim(len(models) - 0.5, -0.5)
    axis.set_xlim(left=0)


def _shares_of_heads(axis: Axes, models: dict[str, Breakdown], look: dict[str, tuple[str, str]]) -> None:
    for model, breakdown in models.items():
        ratio, clipped = (
            breakdown.shares[way]["layernorm"].value.ravel() for way in ("ratio of means", "clipped")
        )
        colour, marker = look[model]
        place = np.clip(ratio, -1, 1)
        axis.scatter(place, clipped, s=10, color=colour, marker=marker, alpha=0.6, lw=0, label=model)
    axis.plot([-1, 0, 1], [0, 0, 1], color="0.3", lw=1, ls="--", label="if all tokens had this ratio")
    axis.axvline(0, color="0.6", lw=0.7, zorder=0)
    axis.set(xlim=(-1.08, 1.08), ylim=(-0.03, 1.03))
    axis.set_xlabel("mean repair / mean direct effect\n(beyond ±1: drawn at ±1)")


def restored_by_part(shares: pd.DataFrame, logits: pd.DataFrame, title: str) -> Figure:
    """What each part gives back, later half of layers: as a share over top tokens, in logits over all tokens.

    Tables have ``model, part, estimate, low, high``; the models of ``shares`` are the rows. ``logits`` has
    the mean direct effect beside the parts.
    """
    models = list(dict.fromkeys(shares["model"]))
    size = (10.5, 0.55 * len(models) + 1.9)
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True)
    figure.suptitle(title, fontsize=10)
    for axis, table in zip(axes, (shares, logits), strict=True):
        for y, model in enumerate(models):
            axis.axhline(y, color="0.92", lw=0.8, zorder=0)
            here = table[table["model"] == model].set_index("part")
            if here.empty:
                place = {"transform": axis.get_yaxis_transform(), "va": "center"}
                axis.text(0.02, y, "not released", fontsize=8, **place)
            for i, part in enumerate(SUMS):
                if part in here.index:
                    _with_interval(axis, here.loc[part], y + 0.15 * (i - 2), part)
            if "direct effect" in here.index:
                effect = here.loc["direct effect", "estimate"]
                axis.plot([effect, effect], [y - 0.42, y + 0.42], color="0.3", lw=1.6, label="direct effect")
        axis.axvline(0, color="0.6", lw=0.7)
    axes[0].set_yticks(range(len(models)), models)
    axes[0].set_ylim(len(models) - 0.4, -0.6)
    axes[0].set_xlabel("share of the direct effect, top tokens")
    axes[1].set_xlabel("logits, mean over all tokens")
    legend_below(figure, axes, columns=3)
    return figure


def _with_interval(axis: Axes, row: pd.Series, height: float, part: str) -> None:
    colour, marker = SUM_LOOKS[part]
    axis.plot([row["low"], row["high"]], [height, height], color=colour, lw=1.4)
    axis.plot(row["estimate"], height, marker, color=colour, ms=4.5, label=SUM_LABELS[part])
