"""Figures of notebook 06: what layers do for the most likely token, and who reacts when one is ablated."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.layer_means import COUPLED, PARTS
from selfrepair.analysis.layers import FactRun
from selfrepair.plots.style import looks

COLUMNS = 3
EFFECT_LOOKS = {"effect": ("C0", "o", "unembedding-based"), "total_effect": ("C1", "s", "ablation-based")}
SLOPE_LIMITS = (-2.0, 2.0)


def effects_by_layer(runs: Sequence[FactRun]) -> Figure:
    """Unembedding- and ablation-based effect (logits) by layer: a column per model, attention above MLPs
    (McGrath Fig. 2)."""
    size = (2.3 * len(runs) + 1.2, 4.8)
    figure, axes = plt.subplots(2, len(runs), figsize=size, squeeze=False, sharex="col", sharey="row")
    for column, run in zip(axes.T, runs, strict=True):
        table = run.means.by_layer()
        for axis, part in zip(column, PARTS, strict=True):
            axis.axhline(0, color="0.6", lw=0.7, zorder=0)
            for i, (quantity, (colour, marker, label)) in enumerate(EFFECT_LOOKS.items()):
                rows = table[(table["part"] == part) & (table["quantity"] == quantity)]
                _with_interval(
                    axis, rows["layer"] + 0.1 * (i - 0.5), rows, color=colour, marker=marker, label=label
                )
            _integers(axis)
        column[0].set_title(_title(run), fontsize=9)
        column[1].set_xlabel("layer")
    for axis, part in zip(axes[:, 0], PARTS, strict=True):
        axis.set_ylabel(f"{part}: effect (logits)")
    _legend(figure, axes[0, 0])
    return figure


def ablation_against_unembedding(runs: Sequence[FactRun]) -> Figure:
    """Unembedding- against ablation-based effect, a point per layer, with ``y = x``: a column per model,
    attention above MLPs."""
    size = (2.3 * len(runs) + 1.6, 4.8)
    figure, axes = plt.subplots(2, len(runs), figsize=size, squeeze=False)
    for column, run in zip(axes.T, runs, strict=True):
        colours = sns.color_palette("viridis", run.means.n_layers)
        for row, axis in enumerate(column):
            x, y = run.means.effect.value[row::2], run.means.total_effect.value[row::2]
            for layer, colour in enumerate(colours):
                prompts = (
                    run.effects[name].transpose(..., "prompt").values[2 * layer + row]
                    for name in ("effect", "total_effect")
                )
                axis.scatter(*prompts, s=3, color=colour, alpha=0.12, linewidths=0, zorder=1)
                here, white = (x[layer], y[layer]), layer < 0.6 * run.means.n_layers
                axis.plot(*here, "o", color=colour, mec="0.15", mew=0.6, ms=9, zorder=3)
                axis.annotate(
                    str(layer),
                    here,
                    ha="center",
                    va="center_baseline",
                    fontsize=6.5,
                    color="w" if white else "k",
                    zorder=4,
                )
            reach = np.array([min(x.min(), y.min(), 0), max(x.max(), y.max())])
            reach += np.array([-0.25, 0.25]) * np.ptp(reach)
            axis.plot(reach, reach, color="0.3", ls="--", lw=0.9, label="$y = x$", zorder=0)
            axis.axhline(0, color="0.7", lw=0.7, zorder=0)
            axis.axvline(0, color="0.7", lw=0.7, zorder=0)
            axis.set(xlim=reach, ylim=reach)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.yaxis.set_major_locator(MaxNLocator(4))
        column[0].set_title(_title(run), fontsize=9)
        column[1].set_xlabel("unembedding-based (logits)", fontsize=9)
    for axis, part in zip(axes[:, 0], PARTS, strict=True):
        axis.set_ylabel(f"{part}: ablation-based (logits)", fontsize=9)
    return figure


def downstream_change(runs: Sequence[FactRun]) -> Figure:
    """Mean change of every component's effect (logits) when each attention layer is ablated: a panel per
    model (McGrath Fig. 5)."""
    changes = [np.where(run.means.downstream, run.means.change.value, np.nan)[::2] for run in runs]
    every_change = np.concatenate([change.ravel() for change in changes])
    every_change = np.abs(every_change[~np.isnan(every_change)])
    limit = float(np.quantile(every_change, 0.97)) if every_change.any() else 1.0
    figure, axes = _panels(len(runs), 4.0, 2.6)
    for axis, run, change in zip(axes.flat, runs, changes, strict=False):
        axis.set_facecolor("0.9")
        image = axis.imshow(
            change, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        n = run.means.n_layers
        every = max(1, n // 12)
        for layer in range(0, n, every):
            own = round(run.means.direct_effect.value[2 * layer], 1) + 0.0
            axis.annotate(f"{own:.1f}", (2 * layer, layer), ha="center", va="center", fontsize=7, color="0.2")
        axis.set_yticks(range(0, n, every))
        axis.set_xticks(
            range(0, 2 * n, every),
            [f"{'AM'[i % 2]}{i // 2}" for i in range(0, 2 * n, every)],
            rotation=90,
            fontsize=7.5,
        )
        axis.set_title(_title(run), fontsize=9)
        axis.set_xlabel("downstream attention (A) or MLP (M)", fontsize=9)
        axis.set_ylabel("ablated attention layer", fontsize=9)
    figure.colorbar(image, ax=axes, label="change of effect (logits)", extend="both", shrink=0.8)
    return figure


def compensation_scatter(runs: Sequence[FactRun]) -> Figure:
    """Compensation against direct effect (logits) over prompts, with the regression line and ``y = x``: a
    column per model, a row per attention layer (up to three of the later half that has attention above;
    McGrath Fig. 6)."""
    chosen = [run.means.later_attention() for run in runs]
    chosen = [
        layers[np.unique(np.linspace(0, len(layers) - 1, 3).round().astype(int))] if len(layers) else layers
        for layers in chosen
    ]
    n_rows = max(1, *map(len, chosen))
    figure, axes = plt.subplots(
        n_rows, len(runs), figsize=(2.4 * len(runs) + 0.8, 2.4 * n_rows + 0.3), squeeze=False
    )
    for column, run, layers in zip(axes.T, runs, chosen, strict=True):
        for axis in column[len(layers) :]:
            axis.set_axis_off()
        for axis, component in zip(column, layers, strict=False):
            x, y = (
                run.effects[name].transpose("ablated", "prompt").values[component]
                for name in ("direct_effect", "compensation")
            )
            slope = run.means.slope[component]
            low, high = slope.interval()
            axis.scatter(x, y, s=7, color="C0", alpha=0.5, linewidths=0)
            ends = np.array([x.min(), x.max()])
            axis.plot(ends, y.mean() + slope.value * (ends - x.mean()), color="C1", lw=1.4, zorder=3)
            axis.plot(ends, ends, color="0.4", ls="--", lw=0.9)
            axis.axhline(0, color="0.7", lw=0.7, zorder=0)
            axis.axvline(0, color="0.7", lw=0.7, zorder=0)
            axis.set_title(
                f"{run.name}, attention {component // 2}\nslope {slope.value:.2f} [{low:.2f}, {high:.2f}]",
                fontsize=8.5,
            )
            axis.set_xlabel("direct effect (logits)", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("compensation (logits)", fontsize=9)
    return figure


def compensation_slopes(runs: Sequence[FactRun]) -> Figure:
    """Slope of compensation on direct effect, and the ratio of their means, by attention layer; all models in
    each panel."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.6), sharey=True)
    for i, (run, (colour, marker)) in enumerate(
        zip(runs, looks(run.name for run in runs).values(), strict=True)
    ):
        attention = run.means.attention_with_downstream()
        ratio = run.means.compensation / run.means.direct_effect
        for axis, quantity in zip(axes, (run.means.slope, ratio), strict=True):
            low, high = (end[attention] for end in quantity.interval())
            x = attention / 2 / max(1, run.means.n_layers - 1) + 0.012 * (i - (len(runs) - 1) / 2)
            estimate = quantity[attention].value
            inside = (estimate >= SLOPE_LIMITS[0]) & (estimate <= SLOPE_LIMITS[1])
            bars = np.abs(np.stack([low, high]) - estimate)[:, inside]
            axis.errorbar(
                x[inside], estimate[inside], bars, fmt=marker, color=colour, ms=4.5, lw=1, label=run.name
            )
            for edge, beyond, triangle in zip(
                SLOPE_LIMITS, (estimate < SLOPE_LIMITS[0], estimate > SLOPE_LIMITS[1]), "v^", strict=True
            ):
                (mark,) = axis.plot(
                    x[beyond],
                    np.full(beyond.sum(), edge),
                    color=colour,
                    marker=triangle,
                    mfc="none",
                    ls="",
                    ms=6,
                )
                mark.set(clip_on=False, in_layout=False)
    for axis, label in zip(axes, ("slope over prompts", "ratio of means"), strict=True):
        axis.axhline(0, color="0.6", lw=0.8, zorder=0)
        axis.set(title=label, xlabel="relative depth of the ablated attention layer", ylim=SLOPE_LIMITS)
    axes[0].set_ylabel("compensation over direct effect")
    _legend(figure, axes[0], columns=3)
    return figure


def coupling(runs: Sequence[FactRun], n_thresholds: int = 41) -> Figure:
    """Share of the components downstream of each attention layer that change by more than a share of its
    direct effect, against that share: a panel per model, a line per ablated layer, their mean with its 95 %
    interval in black."""
    thresholds = np.geomspace(0.01, 10, n_thresholds)
    figure, axes = _panels(len(runs), 3.0, 2.6, sharey=True)
    for axis, run in zip(axes.flat, runs, strict=False):
        touched = Estimate.stack([run.means.coupling(share) for share in thresholds])
        layers = run.means.attention_with_downstream() // 2
        colours = sns.color_palette("viridis", run.means.n_layers)
        for layer in layers:
            label = f"layer {layer}" if layer % max(1, run.means.n_layers // 6) == 0 else None
            axis.plot(
                thresholds,
                touched.value[:, layer],
                color=colours[layer],
                lw=1.1,
                drawstyle="steps-mid",
                label=label,
            )
        if len(layers):
            mean = touched[:, layers].mean(1)
            axis.fill_between(thresholds, *mean.interval(), color="0.2", alpha=0.25, lw=0)
            axis.plot(thresholds, mean.value, color="0.1", lw=1.8, label="mean")
            axis.legend(frameon=False, fontsize=6.5, loc="lower left", handlelength=1.2, labelspacing=0.2)
        axis.axvline(COUPLED, color="0.4", ls="--", lw=0.9)
        axis.axhline(0.5, color="0.4", ls=":", lw=0.9)
        axis.set_xscale("log")
        axis.set(ylim=(-0.03, 1.05))
        axis.set_title(_title(run), fontsize=9)
        axis.set_xlabel("threshold (share of direct effect)", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("downstream components\nthat change by more", fontsize=9)
    return figure


def late_mlps(runs: Sequence[FactRun]) -> Figure:
    """Mean unembedding-based effect (logits) of MLPs by layer, clean and with the attention layer ablated
    that has the largest direct effect below the late MLPs (the last third, shaded): a panel per model."""
    figure, axes = _panels(len(runs), 2.9, 2.6)
    for axis, run in zip(axes.flat, runs, strict=False):
        means = run.means
        component = means.strongest_below_late_mlps()[0] if len(means.attention_below_late_mlps()) else 0
        mlps = np.arange(1, 2 * means.n_layers, 2)
        above = mlps[means.downstream[component, mlps]]
        axis.axvspan(means.late_mlps()[0] // 2 - 0.4, means.n_layers - 0.6, color="0.93", zorder=0, lw=0)
        axis.axhline(0, color="0.6", lw=0.7, zorder=0)
        ablated = means.effect[above] + means.change[component][above]
        lines = (
            (mlps, means.effect[mlps], "C0", "o", "clean"),
            (above, ablated, "C1", "s", f"attention {component // 2} ablated"),
        )
        for i, (components, effect, colour, marker, label) in enumerate(lines[: 2 if len(above) else 1]):
            bars = np.abs(np.stack(effect.interval()) - effect.value)
            axis.errorbar(
                components // 2 + 0.1 * (i - 0.5),
                effect.value,
                bars,
                color=colour,
                marker=marker,
                ms=4,
                lw=1.1,
                label=label,
            )
        axis.set_title(_title(run), fontsize=9)
        axis.set_xlabel("layer of the MLP", fontsize=9)
        axis.legend(frameon=False, fontsize=7.5, loc="best")
        _integers(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel("unembedding-based\neffect (logits)", fontsize=9)
    return figure


def over_training(table: pd.DataFrame) -> Figure:
    """Facts answered, attention's effects and late MLPs at each checkpoint (rows of
    :func:`selfrepair.analysis.layers.over_training`)."""
    panels = {
        "facts answered": {"answered": "answered"},
        "attention, later half": {
            "direct effect": "direct effect",
            "total effect": "total effect",
            "compensation": "compensation",
        },
        "late MLPs, mean effect": {"late MLPs": "clean", "late MLPs, attention ablated": "attention ablated"},
    }
    steps = list(dict.fromkeys(table["step"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(10.2, 3.3))
    for axis, (name, quantities) in zip(axes, panels.items(), strict=True):
        axis.axhline(0, color="0.6", lw=0.7, zorder=0)
        for (quantity, label), (colour, marker) in zip(
            quantities.items(), looks(quantities).values(), strict=True
        ):
            _with_interval(
                axis,
                np.arange(len(steps)),
                table[table["quantity"] == quantity],
                color=colour,
                marker=marker,
                label=label,
            )
        axis.set_xticks(range(len(steps)), [f"{step:,}" for step in steps], rotation=45, fontsize=8)
        axis.set(
            title=name,
            xlabel="training step",
            ylabel="share of prompts" if name == "facts answered" else "logits",
        )
        if len(quantities) > 1:
            axis.legend(frameon=False, fontsize=8, loc="best")
    axes[0].set_ylim(-0.03, 1.03)
    figure.suptitle(f"{table['model'].iloc[0]}, {table['prompts'].iloc[0]} prompts", fontsize=10)
    return figure


def _title(run: FactRun) -> str:
    return f"{run.name}\n{run.means.n_prompts} prompts"


def _panels(n: int, width: float, height: float, sharey: bool = False) -> tuple[Figure, np.ndarray]:
    """``n`` panels, three to a row."""
    columns = min(COLUMNS, n)
    n_rows = -(-n // columns)
    size = (width * columns + 0.6, height * n_rows + 0.3)
    figure, axes = plt.subplots(n_rows, columns, figsize=size, squeeze=False, sharey=sharey)
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    return figure, axes


def _with_interval(
    axis: Axes, x: np.ndarray | pd.Series, rows: pd.DataFrame, color: str, marker: str, label: str
) -> None:
    bars = np.abs(rows[["low", "high"]].to_numpy().T - rows["estimate"].to_numpy())
    axis.errorbar(
        np.asarray(x),
        rows["estimate"],
        bars,
        color=color,
        marker=marker,
        ms=4,
        lw=1.1,
        elinewidth=1,
        label=label,
    )


def _integers(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure: Figure, axis: Axes, columns: int = 2) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=columns, frameon=False, fontsize=8.5)
