"""Figures of notebook 06: what layers do for the most likely token, and what changes when one is ablated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.layer_means import PARTS
from selfrepair.analysis.layers import CONDITIONS, LayerRun
from selfrepair.plots.panels import legend_below, say
from selfrepair.plots.style import looks

UNEMBEDDING, ABLATION = "unembedding-based", "ablation-based"
#: Line, and how markers are filled, on facts and on prose.
CONDITION_LOOKS = dict(zip(CONDITIONS, (("-", "full"), ("--", "none")), strict=True))


def effects_by_layer(runs: Sequence[LayerRun]) -> Figure:
    """Unembedding- and ablation-based effect (logits) by layer, on facts and on prose: a column per model,
    attention above MLPs (McGrath Figs. 2a and 2b, which show single prompts too)."""
    models = _models(runs)
    size = (2.2 * len(models) + 1.2, 4.9)
    figure, axes = plt.subplots(2, len(models), figsize=size, squeeze=False, sharex="col", sharey="row")
    for column, model in zip(axes.T, models, strict=True):
        for axis, part in zip(column, PARTS, strict=True):
            axis.axhline(0, color="0.6", lw=0.7, zorder=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            for run in (run for run in runs if run.name == model):
                line, fill = CONDITION_LOOKS[run.condition]
                chosen = np.arange(PARTS.index(part), 2 * run.means.n_layers, 2)
                for quantity, name, colour, marker in (
                    (run.means.effect, UNEMBEDDING, "C0", "o"),
                    (run.means.total_effect, ABLATION, "C1", "s"),
                ):
                    look: dict[str, Any] = {"color": colour, "marker": marker, "ls": line, "fillstyle": fill}
                    with_interval(
                        axis, chosen // 2, quantity[chosen], label=f"{name}, {run.condition}", **look
                    )
        column[0].set_title(model, fontsize=9)
        column[1].set_xlabel("layer")
    for axis, part in zip(axes[:, 0], PARTS, strict=True):
        axis.set_ylabel(f"{part}: effect (logits)")
    say_prompts(figure, runs)
    legend_below(figure, axes[0, 0], columns=4)
    return figure


def ablation_against_unembedding(runs: Sequence[LayerRun]) -> Figure:
    """Ablation- against unembedding-based effect of attention layers, a point for each prompt and layer,
    means in order of the layers, ``y = x`` dashed (McGrath Fig. 2c, which has MLPs too). Axes end at the
    first and 99th percentile."""
    figure, axes = condition_grid(runs, 2.1, 2.2)
    n_layers = max(run.means.n_layers for run in runs)
    colours = ListedColormap(plt.get_cmap("viridis")(np.linspace(0, 0.92, n_layers)))
    for axis, run in panels(axes, runs):
        attention = np.arange(0, 2 * run.means.n_layers, 2)
        x, y = (
            run.effects[name].transpose(..., "prompt").values[attention]
            for name in ("effect", "total_effect")
        )
        means = [quantity.value[attention] for quantity in (run.means.effect, run.means.total_effect)]
        low, high = np.quantile(np.stack([x, y]), [0.01, 0.99])
        reach = np.array([min(low, *np.ravel(means)), max(high, *np.ravel(means))])
        reach += np.array([-0.08, 0.08]) * max(np.ptp(reach), 1e-3)
        for layer in range(len(attention)):
            axis.scatter(x[layer], y[layer], s=3, color=colours(layer), alpha=0.25, linewidths=0, zorder=1)
        axis.plot(*means, color="0.35", lw=0.8, zorder=3)
        for layer, here in enumerate(zip(*means, strict=True)):
            axis.plot(*here, "o", color=colours(layer), mec="0.15", mew=0.6, ms=5.5, zorder=4)
        axis.plot(reach, reach, color="0.3", ls="--", lw=0.9, zorder=2)
        axis.axhline(0, color="0.7", lw=0.7, zorder=0)
        axis.axvline(0, color="0.7", lw=0.7, zorder=0)
        axis.set(xlim=reach, ylim=reach)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        below = run.means.unembedding_larger.value[attention].mean()
        axis.set_title(f"{title(run)}\nbelow the line: {100 * below:.0f}%", fontsize=8.5)
    label_grid(axes, f"{UNEMBEDDING} (logits)", f"{ABLATION} (logits)")
    scale = ScalarMappable(BoundaryNorm(np.arange(-0.5, n_layers), colours.N), colours)
    ticks = np.arange(0, n_layers, max(1, n_layers // 12))
    bar = figure.colorbar(scale, ax=axes, label="attention layer", ticks=ticks, shrink=0.7, pad=0.01)
    bar.ax.minorticks_off()
    say(
        figure,
        "small points: a prompt and an attention layer; circles: a layer's means, joined in order of the "
        "layers; dashed: both alike",
    )
    return figure


def unembedding_larger(runs: Sequence[LayerRun]) -> Figure:
    """By layer, the share of prompts whose unembedding-based effect is above the ablation-based one, and R²
    of the two, negative where they run against each other; all models (McGrath Fig. 2d)."""
    figure, axes = part_grid(runs, ("share of prompts with\nunembedding > ablation", "R², signed"))
    for column, part, chosen in part_columns(axes, runs):
        for i, (run, (colour, marker)) in enumerate(with_looks(chosen)):
            components = np.arange(PARTS.index(part), 2 * run.means.n_layers, 2)
            x = relative_depth(run, components) + 0.012 * (i - (len(chosen) - 1) / 2)
            look: dict[str, Any] = {"color": colour, "marker": marker, "label": run.name}
            with_interval(column[0], x, run.means.unembedding_larger[components], **look)
            with_interval(column[1], x, run.means.agreement.r_squared[components], **look)
        column[0].axhline(0.5, color="0.5", ls=":", lw=1, zorder=0, label="half of the prompts")
        column[0].set_ylim(-0.03, 1.03)
        column[1].axhline(0, color="0.6", lw=0.7, zorder=0)
    lowest = min(axis.get_ylim()[0] for axis in axes[1])
    for axis in axes[1]:
        axis.set_ylim(lowest, 1.03)
    say_prompts(figure, runs)
    legend_below(figure, axes[0, 0], columns=6)
    return figure


def downstream_change(runs: Sequence[LayerRun]) -> Figure:
    """Mean change of every component's effect (logits) when each attention layer is ablated: a column per
    model, facts above prose (what McGrath Fig. 3 shows of single layers and prompts, as a matrix)."""
    changes = {id(run): np.where(run.means.downstream, run.means.change.value, np.nan)[::2] for run in runs}
    every_change = np.concatenate([change.ravel() for change in changes.values()])
    every_change = np.abs(every_change[~np.isnan(every_change)])
    limit = float(np.quantile(every_change, 0.95)) if every_change.any() else 1.0
    figure, axes = condition_grid(runs, 2.5, 2.0)
    image: Any = None
    for axis, run in panels(axes, runs):
        axis.set_facecolor("0.9")
        look: dict[str, Any] = {
            "cmap": "RdBu",
            "vmin": -limit,
            "vmax": limit,
            "aspect": "auto",
            "interpolation": "nearest",
        }
        image = axis.imshow(changes[id(run)], **look)
        n = run.means.n_layers
        every = max(1, n // 12)
        for layer in range(0, n, every):
            own = round(run.means.direct_effect.value[2 * layer], 1) + 0.0
            axis.annotate(f"{own:.1f}", (2 * layer, layer), ha="center", va="center", fontsize=6, color="0.2")
        axis.set_yticks(range(0, n, every))
        names = [f"{'AM'[i % 2]}{i // 2}" for i in range(0, 2 * n, every)]
        axis.set_xticks(range(0, 2 * n, every), names, rotation=90, fontsize=7)
        axis.set_title(title(run), fontsize=8.5)
    label_grid(axes, "downstream: attention (A), MLP (M)", "ablated attention layer")
    figure.colorbar(image, ax=axes, label="change of effect (logits)", extend="both", shrink=0.7)
    return figure


def late_mlps(runs: Sequence[LayerRun]) -> Figure:
    """Mean unembedding-based effect (logits) of MLPs by layer: raw, centred (of the output less its mean over
    donors), and raw with the attention layer ablated that has the largest direct effect below the late MLPs
    (the last third, shaded): a column per model, facts above prose (McGrath Fig. 2a has the raw ones)."""
    figure, axes = condition_grid(runs, 2.1, 2.1)
    for axis, run in panels(axes, runs):
        means, ablated = run.means, run.strongest_below_late_mlps()
        mlps = np.arange(1, 2 * means.n_layers, 2)
        axis.axvspan(means.late_mlps()[0] // 2 - 0.4, means.n_layers - 0.6, color="0.93", zorder=0, lw=0)
        axis.axhline(0, color="0.6", lw=0.7, zorder=0)
        with_interval(axis, mlps // 2, means.effect[mlps], color="C0", marker="o", label="raw")
        with_interval(
            axis, mlps // 2 + 0.1, means.direct_effect[mlps], color="C2", marker="^", label="centred"
        )
        if ablated is not None:
            above = mlps[means.downstream[ablated, mlps]]
            changed = means.effect[above] + means.change[ablated][above]
            look: dict[str, Any] = {"color": "C1", "marker": "s", "label": "raw, attention ablated"}
            with_interval(axis, above // 2 - 0.1, changed, **look)
        named = "" if ablated is None else f"\nablated: attention {ablated // 2}"
        axis.set_title(f"{title(run)}{named}", fontsize=8.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_grid(axes, "layer of the MLP", "unembedding-based\neffect (logits)")
    say(figure, "bars: 95% intervals over prompts; shaded: late MLPs, the last third")
    legend_below(figure, axes[0, 0], columns=3)
    return figure


def title(run: LayerRun) -> str:
    return f"{run.name}\n{run.condition}, {run.means.n_prompts} prompts"


def say_prompts(figure: Figure, runs: Sequence[LayerRun]) -> None:
    """How many prompts there are of each condition, and what bars are, above panels that do not say it."""
    said = []
    for condition in dict.fromkeys(run.condition for run in runs):
        numbers = sorted({run.means.n_prompts for run in runs if run.condition == condition})
        said.append(f"{condition}: {' to '.join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))} prompts")
    say(figure, f"{', '.join(said)}; bars: 95% intervals over prompts")


def _models(runs: Sequence[LayerRun]) -> list[str]:
    return list(dict.fromkeys(run.name for run in runs))


def condition_grid(runs: Sequence[LayerRun], width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A column per model, a row per condition; panels without a run stay empty."""
    columns, rows = len(_models(runs)), len({run.condition for run in runs})
    size = (width * columns + 0.9, height * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    return figure, axes


def panels(axes: np.ndarray, runs: Sequence[LayerRun]) -> Iterator[tuple[Axes, LayerRun]]:
    """The panels of :func:`condition_grid` with their runs."""
    models, conditions = _models(runs), list(dict.fromkeys(run.condition for run in runs))
    for row, condition in zip(axes, conditions, strict=True):
        for axis, model in zip(row, models, strict=True):
            found = [run for run in runs if (run.condition, run.name) == (condition, model)]
            if found:
                yield axis, found[0]
            else:
                axis.set_axis_off()


def label_grid(axes: np.ndarray, x: str, y: str) -> None:
    for axis in axes[-1]:
        axis.set_xlabel(x, fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel(y, fontsize=9)


def part_grid(runs: Sequence[LayerRun], rows: Sequence[str]) -> tuple[Figure, np.ndarray]:
    """A column for each part on each condition, a row for each quantity, all models in each panel."""
    columns = len(PARTS) * len({run.condition for run in runs})
    size = (2.5 * columns + 0.6, 2.3 * len(rows) + 0.7)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(name, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("relative depth", fontsize=9)
    return figure, axes


def part_columns(
    axes: np.ndarray, runs: Sequence[LayerRun]
) -> Iterator[tuple[np.ndarray, str, list[LayerRun]]]:
    """The columns of :func:`part_grid` with their part and runs; titles are given."""
    conditions = list(dict.fromkeys(run.condition for run in runs))
    columns = [(part, condition) for part in PARTS for condition in conditions]
    for column, (part, condition) in zip(axes.T, columns, strict=True):
        column[0].set_title(f"{part}, {condition}", fontsize=9.5)
        yield column, part, [run for run in runs if run.condition == condition]


def with_looks(runs: Sequence[LayerRun]) -> list[tuple[LayerRun, tuple[str, str]]]:
    """Runs of different models with their colours and markers."""
    return list(zip(runs, looks(run.name for run in runs).values(), strict=True))


def relative_depth(run: LayerRun, components: np.ndarray) -> np.ndarray:
    """From 0 for the first layer to 1 for the last."""
    return components // 2 / max(1, run.means.n_layers - 1)


def with_interval(
    axis: Axes,
    x: np.ndarray,
    estimate: Estimate,
    color: str,
    marker: str,
    label: str,
    ls: str = "-",
    fillstyle: str = "full",
) -> None:
    """A line through estimates, with bars to the ends of their 95% intervals."""
    bars = np.abs(np.stack(estimate.interval()) - estimate.value)
    look: dict[str, Any] = {
        "color": color,
        "marker": marker,
        "ls": ls,
        "fillstyle": fillstyle,
        "label": label,
    }
    axis.errorbar(np.asarray(x), estimate.value, bars, ms=4, lw=1.1, elinewidth=1, **look)
