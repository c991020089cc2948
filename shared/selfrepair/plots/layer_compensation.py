"""Figures of notebook 06: what is given back when a layer is ablated, by whom, and when that is learnt."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.layer_means import COUPLED, PARTS
from selfrepair.analysis.layers import PUBLISHED, LayerRun
from selfrepair.analysis.words import or_dash
from selfrepair.plots.layers import (
    condition_grid,
    label_grid,
    panels,
    part_columns,
    part_grid,
    relative_depth,
    say_prompts,
    title,
    with_interval,
    with_looks,
)
from selfrepair.plots.panels import legend_below, say
from selfrepair.plots.style import looks

#: What McGrath et al. print of the layer that fits best, and of how much middle layers give back.
PUBLISHED_R2 = PUBLISHED["chinchilla-7b"]["best-layer-r2-facts"].value
PUBLISHED_SHARE = PUBLISHED["chinchilla-7b"]["downstream-compensation-facts"].value


def compensation_scatter(runs: Sequence[LayerRun]) -> Figure:
    """Compensation against direct effect (logits) over prompts, for the attention layer that fits best, with
    the regression line and ``y = x`` dashed: a column per model, facts above prose (McGrath Fig. 7b). The
    layer is chosen on the prompts in grey; line, slope and R² are of those in blue."""
    figure, axes = condition_grid(runs, 2.1, 2.1)
    for axis, run in panels(axes, runs):
        if (best := run.best("attention")) is None:
            axis.set_axis_off()
            continue
        x, y = (
            run.effects[name].transpose("ablated", "prompt").values[best]
            for name in ("direct_effect", "compensation")
        )
        is_read = np.arange(len(x)) % 2 == 1
        fit = run.reading.compensation_fit
        axis.scatter(
            x[~is_read],
            y[~is_read],
            s=6,
            color="0.6",
            alpha=0.6,
            linewidths=0,
            label="prompts that the layer is chosen on",
        )
        axis.scatter(
            x[is_read],
            y[is_read],
            s=8,
            color="C0",
            alpha=0.7,
            linewidths=0,
            label="prompts of line, slope and R²",
        )
        ends = np.array([x.min(), x.max()])
        line = y[is_read].mean() + fit.slope[best].value * (ends - x[is_read].mean())
        axis.plot(ends, line, color="C1", lw=1.4, zorder=3, label="regression")
        axis.plot(ends, ends, color="0.3", ls="--", lw=0.9, label="all given back")
        axis.axhline(0, color="0.7", lw=0.7, zorder=0)
        axis.axvline(0, color="0.7", lw=0.7, zorder=0)
        slope, r_squared = (round(each[best].value, 2) + 0.0 for each in (fit.slope, fit.r_squared))
        numbers = f"slope {or_dash(slope)}, signed R² {or_dash(r_squared)}"
        axis.set_title(f"{title(run)}\nattention {best // 2}\n{numbers}", fontsize=8)
    label_grid(axes, "direct effect (logits)", "compensation (logits)")
    legend_below(figure, axes[0, 0], columns=4)
    return figure


def compensation_by_layer(runs: Sequence[LayerRun]) -> Figure:
    """Mean compensation against mean direct effect (logits), a point for each ablated layer, and R² of the
    two over prompts by layer, negative where the slope is (McGrath Fig. 7d); all models, attention (Fig. 7a)
    and MLPs (Fig. 7c) ablated. Published values dashed."""
    figure, axes = part_grid(runs, ("compensation (logits)", "R², signed"))
    for axis in axes[0]:
        axis.set_xlabel("direct effect (logits)", fontsize=9)
    for column, part, chosen in part_columns(axes, runs):
        for i, (run, (colour, marker)) in enumerate(with_looks(chosen)):
            components = run.means.with_downstream(part)
            if not len(components):
                continue
            x, y = run.means.direct_effect[components], run.means.compensation[components]
            bars = [np.abs(np.stack(each.interval()) - each.value) for each in (y, x)]
            look = {"color": colour, "ms": 4.5, "lw": 0.9}
            column[0].errorbar(x.value, y.value, *bars, fmt=marker, label=run.name, **look)
            depth = relative_depth(run, components) + 0.012 * (i - (len(chosen) - 1) / 2)
            r_squared = run.means.compensation_fit.r_squared[components]
            with_interval(column[1], depth, r_squared, color=colour, marker=marker, label=run.name)
        ends = np.array([0, column[0].get_xlim()[1]])
        published = f"published: {PUBLISHED_SHARE:.0%} given back (above), R² {PUBLISHED_R2} (below)"
        column[0].plot(ends, PUBLISHED_SHARE * ends, color="0.3", ls="--", lw=0.9, zorder=0, label=published)
        column[1].axhline(PUBLISHED_R2, color="0.3", ls="--", lw=0.9, zorder=0)
        column[1].set_ylim(-1.03, 1.03)
        for axis in column:
            axis.axhline(0, color="0.6", lw=0.7, zorder=0)
    say_prompts(figure, runs)
    legend_below(figure, axes[0, 0], columns=3)
    return figure


def compensation_split(runs: Sequence[LayerRun]) -> Figure:
    """What is given back (logits) after each attention layer is ablated: by attention, by MLPs and by the
    final norm, stacked, beside its direct effect; a column per model, facts above prose (McGrath Fig. 8,
    which splits compensation alone)."""
    figure, axes = condition_grid(runs, 2.1, 2.0)
    for axis, run in panels(axes, runs):
        means = run.means
        attention = np.arange(0, 2 * means.n_layers, 2)
        given = {
            "by attention": means.compensation_by("attention").value[attention],
            "by MLPs": means.compensation_by("MLP").value[attention],
            "by the final norm": means.norm_term.value[attention],
        }
        bottom = {1: np.zeros(len(attention)), -1: np.zeros(len(attention))}
        for (name, values), colour in zip(given.items(), ("C0", "C1", "C2"), strict=True):
            for sign, so_far in bottom.items():
                bar = np.where(np.sign(values) == sign, values, 0)
                label = name if sign > 0 else None
                axis.bar(attention // 2, bar, bottom=so_far, width=0.7, color=colour, label=label)
                so_far += bar
        axis.plot(attention // 2, means.direct_effect.value[attention], "kD", ms=4, label="direct effect")
        together = sum(given.values())
        axis.plot(attention // 2, together, "_", color="k", ms=11, mew=1.8, label="given back in all")
        axis.axhline(0, color="0.4", lw=0.7)
        axis.use_sticky_edges = False  # room below the longest bar
        axis.margins(y=0.06)
        axis.set_title(title(run), fontsize=8.5)
        axis.set_xticks(attention[:: max(1, means.n_layers // 12)] // 2)
    label_grid(axes, "ablated attention layer", "given back (logits)")
    legend_below(figure, axes[0, 0], columns=5)
    return figure


def coupling(runs: Sequence[LayerRun], n_thresholds: int = 41) -> Figure:
    """Share of the layers downstream of an attention layer that change by more than a share of its direct
    effect, against that share, mean over ablated layers with its 95% interval: a column per model, facts
    above prose (McGrath say that few do, and draw no such figure). Grey: if each changed as much as when it
    is itself ablated."""
    thresholds = np.geomspace(0.01, 10, n_thresholds)
    figure, axes = condition_grid(runs, 2.1, 2.0)
    for axis, run in panels(axes, runs):
        for part, colour, line in zip(PARTS, ("C0", "C1"), ("-", "--"), strict=True):
            if not run.means.downstream[::2, PARTS.index(part) :: 2].any():
                continue
            touched = [run.means.coupling(part, share).nanmean() for share in thresholds]
            mean = Estimate.stack(touched)
            axis.fill_between(thresholds, *mean.interval(), color=colour, alpha=0.25, lw=0)
            axis.plot(thresholds, mean.value, color=colour, ls=line, lw=1.5, label=part)
            replaced = [run.means.coupling_if_replaced(part, share).nanmean().value for share in thresholds]
            axis.plot(thresholds, replaced, color="0.55", ls=line, lw=1.1, label=f"{part}, if itself ablated")
        axis.axvline(COUPLED, color="0.4", ls=":", lw=0.9)
        axis.axhline(0.5, color="0.4", ls=":", lw=0.9)
        axis.set_xscale("log")
        axis.set(ylim=(-0.03, 1.05))
        axis.set_title(title(run), fontsize=8.5)
    label_grid(axes, "threshold\n(share of direct effect)", "layers that\nchange by more")
    say(figure, "shaded: 95% intervals over prompts; dotted: the claim, half of the layers and a tenth")
    legend_below(figure, axes[0, 0], columns=4)
    return figure


def over_training(table: pd.DataFrame) -> Figure:
    """Facts answered, attention's effects and late MLPs at each checkpoint (rows of
    :func:`selfrepair.analysis.layers.over_training`; not in the paper)."""
    figures = {
        "facts answered": ("answered",),
        "attention, later half": ("direct effect", "total effect", "compensation"),
        "late MLPs, mean effect": ("late MLPs",),
    }
    steps = list(dict.fromkeys(table["step"]))
    figure, axes = plt.subplots(1, len(figures), figsize=(10.2, 3.3))
    for axis, (name, quantities) in zip(axes, figures.items(), strict=True):
        axis.axhline(0, color="0.6", lw=0.7, zorder=0)
        for quantity, (colour, marker) in looks(quantities).items():
            rows = table[table["quantity"] == quantity]
            bars = np.abs(rows[["low", "high"]].to_numpy().T - rows["estimate"].to_numpy())
            look = {"color": colour, "marker": marker, "ms": 4, "lw": 1.1, "label": quantity}
            axis.errorbar(np.arange(len(steps)), rows["estimate"], bars, **look)
        axis.set_xticks(range(len(steps)), [f"{step:,}" for step in steps], rotation=45, fontsize=8)
        unit = "share of prompts" if name == "facts answered" else "logits"
        axis.set(title=name, xlabel="training step", ylabel=unit)
        if len(quantities) > 1:
            axis.legend(frameon=False, fontsize=8, loc="best")
    axes[0].set_ylim(-0.03, 1.03)
    of = f"{table['model'].iloc[0]}, {table['prompts'].iloc[0]} prompts; bars: 95% intervals over prompts"
    figure.suptitle(of, fontsize=10)
    return figure
