"""Figures of notebook 05: self-feeding, one layer earlier, cosines of head outputs, gradient alignment."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from selfrepair.analysis.cosines import cosine_by_distance, head_cosines
from selfrepair.analysis.earlier_input import correlation, mean_changes
from selfrepair.analysis.estimates import Estimate, mean_over_prompts
from selfrepair.analysis.self_feeding import slopes
from selfrepair.plots.style import MARKERS, looks

NAMES = {
    "own_output": "own output",
    "random_head_output": "a random head's output",
    "random_direction": "random direction",
}
COLOURS = {vector: f"C{i}" for i, vector in enumerate(NAMES)}
#: Heads of these ranks by mean direct effect have lines of their own.
STRONGEST = 5


def slope_by_scale(measured: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Slope against scale for the strongest heads; one panel per model, published ones last (R&N §6)."""
    panels = [("measured", model, rows) for model, rows in measured.groupby("model", sort=False)]
    panels += [("published", model, rows) for model, rows in published.groupby("model", sort=False)]
    figure, axes = _grid(len(panels), 4, 2.6, 2.6)
    for axis, (source, model, rows) in zip(axes, panels, strict=True):
        axis.axhline(1, color="0.4", lw=0.8, ls="--", zorder=0)
        for (vector, rank), line in rows.groupby(["added_vector", "rank_by_mean_direct_effect"]):
            if rank > STRONGEST:
                continue
            look = {"color": COLOURS[vector], "marker": MARKERS[rank - 1], "ms": 4, "lw": 1}
            axis.plot(
                line["scale"],
                line["slope_after_on_before"],
                **look,
                alpha=0.9 if vector == "own_output" else 0.6,
            )
            if source == "measured":
                axis.fill_between(
                    line["scale"],
                    line["slope_low"],
                    line["slope_high"],
                    color=look["color"],
                    alpha=0.12,
                    lw=0,
                )
        axis.set_title(f"{source}\n{model}", fontsize=9)
        axis.set(xticks=sorted(rows["scale"].unique()), xlabel="scale")
    _label_left(axes, 4, "slope of direct effect\nafter on before")
    handles = [Line2D([], [], color=COLOURS[vector], label=NAMES[vector]) for vector in NAMES]
    handles.append(Line2D([], [], color="0.4", lw=0.8, ls="--", label="unchanged"))
    handles += [
        Line2D([], [], color="0.3", marker=MARKERS[i], ls="", ms=4, label=f"head of rank {i + 1}")
        for i in range(STRONGEST)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncol=5, frameon=False, fontsize=8)
    _say(
        figure,
        f"measured: {_tokens(measured)} tokens, shaded: 95 % interval over prompts; "
        f"published: {_tokens(published)} tokens; rank by mean direct effect",
    )
    return figure


def slope_by_head(measured: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Slopes at the largest scale of all heads fed, in order of the own output's; published ones last."""
    panels = [(f"measured\n{model}", rows) for model, rows in measured.groupby("model", sort=False)]
    panels.append((f"published\n{published['model'].nunique()} models", published))
    figure, axes = _grid(len(panels), 3, 3.4, 2.8)
    for axis, (title, rows) in zip(axes, panels, strict=True):
        rows = rows[rows["scale"] == rows["scale"].max()].set_index(["model", "layer", "head"])
        order = rows.loc[rows["added_vector"] == "own_output", "slope_after_on_before"].sort_values().index
        axis.axhline(1, color="0.4", lw=0.8, ls="--", zorder=0)
        for vector in NAMES:
            here = rows[rows["added_vector"] == vector].loc[order]
            x, slope = np.arange(len(order)), here["slope_after_on_before"]
            axis.plot(
                x,
                slope,
                "o",
                color=COLOURS[vector],
                ms=3.5,
                label=NAMES[vector],
                zorder=4 if vector == "own_output" else 3,
            )
            if "slope_low" in here:
                axis.vlines(x, here["slope_low"], here["slope_high"], color=COLOURS[vector], lw=1, alpha=0.6)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel=f"{len(order)} heads, by slope with own output", xticks=[])
    _label_left(axes, 3, f"slope of direct effect\nafter on before, scale {measured['scale'].max()}")
    _legend_below(figure, axes[0], 3)
    _say(figure, f"measured: {_tokens(measured)} tokens; bars: 95 % interval over prompts")
    return figure


def effect_after_against_before(fed: dict[str, xr.Dataset]) -> Figure:
    """Tokens and lines of the heads with the largest and the smallest slope, own output, largest scale."""
    panels = []
    for model_name, feeding in fed.items():
        own = _slopes_at_largest_scale(feeding)[:, feeding.attrs["vectors"].index("own_output")]
        panels += [
            (model_name, int(np.argmax(own)), "largest"),
            (model_name, int(np.argmin(own)), "smallest"),
        ]
    figure, axes = _grid(len(panels), 4, 2.6, 2.7)
    for axis, (model_name, i, which) in zip(axes, panels, strict=True):
        feeding = fed[model_name]
        own_slope = _draw_tokens(axis, feeding, i)
        layer, head = int(feeding["layer"][i]), int(feeding["head"][i])
        axis.set_title(f"{model_name} L{layer}H{head}\n{which} slope: {_signed(own_slope)}", fontsize=9)
    _label_left(axes, 4, "direct effect after (logits)")
    _legend_below(figure, axes[0], 4)
    n_tokens, scale = feeding["before"][0].size, int(feeding["scale"][-1])
    _say(
        figure,
        f"of all heads fed, at scale {scale}; points: {n_tokens} tokens, fed the head's own output, "
        "at most 2 in 1000 outside; lines: least squares",
    )
    return figure


def _slopes_at_largest_scale(feeding: xr.Dataset) -> Float[np.ndarray, "fed vector"]:
    return slopes(feeding, n_bootstrap=1).value[:, :, -1]


def _draw_tokens(axis: Axes, feeding: xr.Dataset, fed: int) -> float:
    """A head's tokens when fed its own output at the largest scale, all lines; returns its own slope."""
    slope = dict(zip(feeding.attrs["vectors"], _slopes_at_largest_scale(feeding)[fed], strict=True))
    before = feeding["before"].values[fed].ravel()
    after = dict(
        zip(
            feeding.attrs["vectors"], feeding["after"].values[fed, :, -1].reshape(len(slope), -1), strict=True
        )
    )
    ends = np.array([before.min(), before.max()])
    own = after["own_output"]
    axis.scatter(before, own, s=4, color=COLOURS["own_output"], alpha=0.25, linewidths=0, rasterized=True)
    for vector, name in NAMES.items():
        line = after[vector].mean() + slope[vector] * (ends - before.mean())
        axis.plot(ends, line, color=COLOURS[vector], lw=1.6, label=f"fed {name}")
    axis.plot(ends, ends, color="0.4", lw=0.8, ls="--", label="unchanged")
    low, high = np.quantile(own, [0.001, 0.999])
    axis.set(ylim=(min(low, ends[0]), max(high, ends[1])), xlabel="before (logits)")
    return float(slope["own_output"])


def earlier_against_ablated(found: dict[str, xr.Dataset]) -> Figure:
    """Change of every head's direct effect with its predecessor's input against that under ablation."""
    figure, axes = _grid(len(found), 2, 4.4, 3.9)
    n_later = max(changes.sizes["later_layer"] for changes in found.values())
    colours = plt.get_cmap("viridis", n_later)
    for axis, (model_name, changes) in zip(axes, found.items(), strict=True):
        means = mean_changes(changes)
        for later in range(len(means.earlier)):
            x, y = means.ablated[later], means.earlier[later]
            axis.errorbar(
                x.value, y.value, _errors(y), _errors(x), fmt="o", ms=4, lw=0.5, color=colours(later)
            )
        r = correlation(means)
        value, low, high = (_signed(float(number)) for number in (r.value, *r.interval()))
        axis.set_title(f"{model_name}: r = {value} [{low}, {high}]", fontsize=9)
        axis.axhline(0, color="0.7", lw=0.8, zorder=0)
        axis.axvline(0, color="0.7", lw=0.8, zorder=0)
        _symmetric_log(axis, means.ablated.value, means.earlier.value)
        axis.set_xlabel("change when the layer before is ablated (logits)")
    _label_left(axes, 2, "change when fed one layer earlier (logits)")
    scale = ScalarMappable(BoundaryNorm(np.arange(0.5, n_later + 1), colours.N), colours)
    figure.colorbar(
        scale, ax=list(axes), label="layer of the head", ticks=np.arange(1, n_later + 1), shrink=0.6
    )
    counts = sorted({int(n) for changes in found.values() for n in changes["count"].values.sum(1)})
    tokens = " or ".join(map(str, counts))
    _say(
        figure,
        f"points: heads, mean change of direct effect over {tokens} tokens; "
        "bars and r: 95 % intervals over prompts; axes logarithmic, linear near 0",
    )
    return figure


def _errors(estimate: Estimate) -> Float[np.ndarray, "end x"]:
    """How far the interval's ends are from the estimate."""
    return np.stack([np.abs(end - estimate.value) for end in estimate.interval()])


def cosine_matrices(found: dict[str, xr.Dataset]) -> Figure:
    """Mean cosine between the outputs of every two heads, in order of layer and head."""
    figure, axes = _grid(len(found), 2, 3.9, 3.6)
    matrices = {model_name: head_cosines(cosines) for model_name, cosines in found.items()}
    apart = np.concatenate([m[~np.eye(len(m), dtype=bool)] for m in matrices.values()])
    limit = float(np.quantile(np.abs(apart), 0.99))
    for axis, (model_name, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        n_layers = found[model_name].sizes["layer"]
        width = len(matrix) // n_layers
        for edge in range(1, n_layers):
            axis.axhline(edge * width - 0.5, color="0.5", lw=0.4)
            axis.axvline(edge * width - 0.5, color="0.5", lw=0.4)
        ticks = np.arange(0, n_layers, -(-n_layers // 12))
        places = (ticks + 0.5) * width - 0.5
        axis.set(xticks=places, yticks=places, xticklabels=ticks, yticklabels=ticks)
        axis.tick_params(length=0)
        axis.set_title(model_name, fontsize=9)
        axis.set_xlabel("layer of the head")
        sns.despine(ax=axis, left=True, bottom=True)
    _label_left(axes, 2, "layer of the head")
    figure.colorbar(image, ax=list(axes), label="mean cosine of head outputs", extend="both", shrink=0.6)
    _say(figure, f"all tokens of {_prompts(found)} prompts; heads in order, layer by layer")
    return figure


def cosines_by_distance(found: dict[str, xr.Dataset]) -> Figure:
    """Mean cosine between outputs of heads against how many layers they are apart, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(4.6, 3.4))
    _lines(axis, {model_name: cosine_by_distance(cosines) for model_name, cosines in found.items()})
    axis.axhline(0, color="0.4", lw=0.8, ls="--", zorder=0)
    axis.set(xlabel="layers apart", ylabel="mean cosine of head outputs")
    axis.set_title(f"{_prompts(found)} prompts; shaded: 95 % interval over prompts", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    return figure


def alignment_by_layer(found: dict[str, xr.Dataset]) -> Figure:
    """Cosines of updates with minus the gradient and the final residual, and the logit lens' loss."""
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.5))
    for axis, name in zip(axes, ("gradient", "final", "loss"), strict=True):
        _lines(
            axis,
            {model_name: mean_over_prompts(aligned[name].values) for model_name, aligned in found.items()},
        )
    axes[0].set(ylabel="cosine", xlabel="layer of the block", title="update and minus the loss' gradient")
    axes[1].set(
        ylabel="cosine",
        xlabel="layer of the block",
        title="update and final residual",
        ylim=(min(0, axes[1].get_ylim()[0]), 1),
    )
    axes[2].set(
        ylabel="loss (nats per token)", xlabel="blocks that have run", title="logit lens", yscale="log"
    )
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[2].yaxis.set_minor_formatter("{x:g}")
    axes[0].axhline(0, color="0.4", lw=0.8, ls="--", zorder=0)
    for axis in axes:
        axis.title.set_fontsize(9)
    _legend_below(figure, axes[0], len(found))
    _say(figure, f"means over the tokens of {_prompts(found)} prompts; shaded: 95 % intervals over prompts")
    return figure


def _lines(axis: Axes, estimates: dict[str, Estimate]) -> None:
    """One line per model: estimates with their 95 % intervals."""
    for model_name, (colour, marker) in looks(estimates).items():
        estimate = estimates[model_name]
        axis.plot(estimate.value, color=colour, marker=marker, ms=4, label=model_name)
        axis.fill_between(np.arange(len(estimate)), *estimate.interval(), color=colour, alpha=0.2, lw=0)
    longest = max(map(len, estimates.values()))
    axis.set_xticks(np.arange(0, longest, max(1, longest // 8)))


def _symmetric_log(axis: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Symmetric-log axes, linear where half of the values lie."""
    for set_scale, values in ((axis.set_xscale, x), (axis.set_yscale, y)):
        typical = float(np.median(np.abs(values)))
        set_scale("symlog", linthresh=10.0 ** np.round(np.log10(typical)) if typical > 0 else 1)


def _grid(n_panels: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure with ``n_panels`` axes, row by row."""
    columns = min(columns, n_panels)
    rows = -(-n_panels // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.4), squeeze=False)
    for axis in axes.flat[n_panels:]:
        axis.remove()
    return figure, axes.flat[:n_panels]


def _label_left(axes: np.ndarray, columns: int, label: str) -> None:
    for axis in axes[::columns]:
        axis.set_ylabel(label)


def _legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncol=min(columns, int(figure.get_figwidth() // 2)),
        frameon=False,
        fontsize=8,
    )


def _say(figure: Figure, text: str) -> None:
    figure.suptitle(textwrap.fill(text, int(14 * figure.get_figwidth())), fontsize=9, color="0.3")


def _tokens(table: pd.DataFrame) -> str:
    return " or ".join(str(n) for n in sorted(table["n_tokens"].unique()))


def _prompts(found: dict[str, xr.Dataset]) -> int:
    return next(iter(found.values())).sizes["prompt"]


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
