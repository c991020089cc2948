"""Figures of notebook 03: the final norm's scale, the breakdown of self-repair, and ways of counting it."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair.analysis.layernorm import WAYS, ScaleRatios
from selfrepair.plots.style import looks

PART_LABELS = {"layernorm": "final norm", "heads": "other heads", "mlps": "MLPs"}
PART_LOOKS = {"layernorm": ("C0", "o"), "heads": ("C1", "s"), "mlps": ("C2", "^")}
QUANTITY_LABELS = {
    "logits": "logits",
    "clipped": "share of DE\nclipped per token",
    "unclipped mean": "share of DE\nunclipped mean",
    "median": "share of DE\nmedian",
    "ratio of means": "share of DE\nratio of means",
}
SHARE_LIMITS = (-0.6, 1.1)


def scale_ratio_histograms(ratios: Sequence[Sequence[ScaleRatios]]) -> Figure:
    """Histograms of ``σ_clean / σ_ablated``: a row per head, a column per kind of ablation (R&N §4)."""
    n_rows, n_columns = len(ratios), max(map(len, ratios))
    size = (3.2 * n_columns + 0.4, 2.7 * n_rows + 0.5)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, sharex="row")
    for row, of_head in zip(axes, ratios, strict=True):
        together = np.concatenate([one.all_tokens.ravel() for one in of_head])
        bins = np.linspace(*np.quantile(together, [0.002, 0.998]), 45)
        for axis, one in zip(row, of_head, strict=True):
            shown = {"all tokens": (one.all_tokens, "0.6"), "top tokens": (one.all_tokens[one.top], "C0")}
            for name, (values, colour) in shown.items():
                label = f"{name}: {(values > 1).mean():.0%} above 1"
                look = {"color": colour, "alpha": 0.6, "histtype": "stepfilled"}
                axis.hist(values.ravel(), bins, density=True, label=label, **look)
            axis.axvline(1, ymax=0.75, color="0.2", lw=0.8, ls="--")
            axis.set_title(f"{one.model} L{one.layer}H{one.head}, {one.ablation}", fontsize=9)
            axis.set_xlabel(r"$\sigma_\mathrm{clean}/\sigma_\mathrm{ablated}$")
            axis.legend(frameon=False, fontsize=7.5, loc="upper left", handlelength=1.2)
            axis.set_ylim(0, 1.4 * axis.get_ylim()[1])
        row[0].set_ylabel("density of tokens")
    return figure


def breakdown_by_layer(table: pd.DataFrame) -> Figure:
    """Self-repair by part against layer: a column per model, a row for logits and for each way of counting.

    ``table`` has the rows of :meth:`Breakdown.by_layer`; shares beyond the axis are marked at its edge.
    """
    models, quantities = list(dict.fromkeys(table["model"])), ["logits", *WAYS]
    size = (2.3 * len(models) + 0.9, 1.75 * len(quantities) + 0.6)
    figure, axes = plt.subplots(
        len(quantities), len(models), figsize=size, squeeze=False, sharex="col", sharey="row"
    )
    for row, quantity in zip(axes, quantities, strict=True):
        for axis, model in zip(row, models, strict=True):
            here = table[(table["model"] == model) & (table["quantity"] == quantity)]
            _parts_by_layer(axis, here, quantity != "logits")
        row[0].set_ylabel(QUANTITY_LABELS[quantity], fontsize=9)
    logits = table.loc[table["quantity"] == "logits", "estimate"]
    largest, typical = float(logits.abs().max()), float(logits.abs().median())
    if largest > 12 * typical > 0:
        axes[0, 0].set_yscale("symlog", linthresh=10.0 ** np.round(np.log10(3 * typical)))
    for axis, model in zip(axes[0], models, strict=True):
        axis.set_title(model, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("layer of the ablated head", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncol=3, frameon=False)
    return figure


def _parts_by_layer(axis: Axes, rows: pd.DataFrame, are_shares: bool) -> None:
    axis.axhline(0, color="0.6", lw=0.7, zorder=0)
    for i, (part, (colour, marker)) in enumerate(PART_LOOKS.items()):
        here = rows[rows["part"] == part].sort_values("layer")
        layer, estimate = here["layer"].to_numpy() + 0.12 * (i - 1), here["estimate"].to_numpy()
        bars = np.abs(here[["low", "high"]].to_numpy().T - estimate)
        look = {"color": colour, "marker": marker, "ms": 3.5, "lw": 1, "elinewidth": 0.8}
        axis.errorbar(layer, estimate, bars, label=PART_LABELS[part], **look)
        if are_shares:
            low, high = SHARE_LIMITS
            for edge, beyond, triangle in ((low, estimate < low, "v"), (high, estimate > high, "^")):
                place = np.full(beyond.sum(), edge)
                (mark,) = axis.plot(layer[beyond], place, triangle, color=colour, mfc="none", ms=5)
                mark.set(clip_on=False, in_layout=False)
    if are_shares:
        axis.set_ylim(*SHARE_LIMITS)
    axis.xaxis.get_major_locator().set_params(integer=True)


def ways_of_counting(measured: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """The final norm's share of the direct effect, each way of counting, per model; with the paper's 30 %.

    Tables have ``model, way, estimate`` and ``low, high`` where there are intervals.
    """
    rows = [(f"{model}", group) for model, group in measured.groupby("model", sort=False)]
    rows += [(f"{model} (published)", group) for model, group in published.groupby("model", sort=False)]
    figure, axis = plt.subplots(figsize=(7.2, 0.42 * len(rows) + 1.5))
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
    axis.axvline(0.3, color="0.3", lw=0.9, ls="--", label="30 %")
    axis.axvline(0, color="0.6", lw=0.7)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("final norm's self-repair as a share of the direct effect")
    axis.legend(frameon=False, fontsize=8, ncol=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def frozen_norm(table: pd.DataFrame) -> Figure:
    """Self-repair over direct effect, final norm as it is and frozen.

    ``table`` has the rows of :meth:`Breakdown.with_norm_frozen`.
    """
    models = list(dict.fromkeys(table["model"]))
    figure, axis = plt.subplots(figsize=(6.4, 0.42 * len(models) + 1.4))
    for i, norm in enumerate(dict.fromkeys(table["final norm"])):
        rows = table[table["final norm"] == norm].set_index("model").loc[models]
        heights = np.arange(len(models)) + 0.16 * (2 * i - 1)
        estimate = rows["estimate"].to_numpy()
        bars = np.nan_to_num(np.abs(rows[["low", "high"]].to_numpy().T - estimate))
        look = {"fmt": "os"[i], "color": f"C{i}", "ms": 5, "lw": 1.2}
        axis.errorbar(estimate, heights, xerr=bars, label=f"final norm {norm}", **look)
    axis.axvline(0, color="0.6", lw=0.7)
    axis.set_yticks(range(len(models)), models)
    axis.invert_yaxis()
    axis.set_xlabel("self-repair over direct effect, later half of layers")
    axis.legend(frameon=False, fontsize=8, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
