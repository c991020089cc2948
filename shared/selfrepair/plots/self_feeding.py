"""Figures of notebook 05 about self-feeding: slopes by scale, by head and by way, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from selfrepair.analysis.self_feeding import (
    EVERYWHERE,
    ONE_POSITION,
    OWN_OUTPUT,
    RELEASED,
    slopes,
)
from selfrepair.analysis.words import or_dash
from selfrepair.plots.panels import grid, label_left, legend_below, say
from selfrepair.plots.style import MARKERS

NAMES = {
    "own_output": "own output",
    "random_head_output": "a random head's output",
    "random_direction": "a random direction",
}
COLOURS = {vector: f"C{i}" for i, vector in enumerate(NAMES)}
#: Heads of these ranks by mean direct effect have lines of their own.
STRONGEST = 5

#: Colour, marker and whether that is filled, of every way to add a vector and read the direct effect.
WAYS = {
    ONE_POSITION: ("C0", "o", True),
    RELEASED: ("0.2", "s", False),
    EVERYWHERE: ("C0", "D", False),
}


def slope_by_scale(measured: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Slope against scale for the strongest heads; one panel per model, published ones last."""
    panels = [("measured", model, rows) for model, rows in measured.groupby("model", sort=False)]
    panels += [("published", model, rows) for model, rows in published.groupby("model", sort=False)]
    columns = max(map(len, (set(measured["model"]), set(published["model"]))))  # ours above, theirs below
    figure, axes = grid(len(panels), columns, 2.2, 2.6, same_y=True)
    for axis, (source, model, rows) in zip(axes, panels, strict=True):
        axis.axhline(1, color="0.4", lw=0.8, ls="--", zorder=0)
        strongest = rows[rows["rank_by_mean_direct_effect"] <= STRONGEST]
        for vector, of_vector in strongest.groupby("added_vector"):
            if vector == OWN_OUTPUT:
                _draw_heads(axis, of_vector)
            else:
                _draw_range(axis, of_vector, COLOURS[str(vector)])
        axis.set_title(f"{source}\n{model}", fontsize=9)
        axis.set(xticks=sorted(rows["scale"].unique()), xlabel="scale")
    label_left(axes, columns, "slope of direct effect\nafter on before")
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[OWN_OUTPUT],
            marker=MARKERS[i],
            ms=4,
            label=f"own output, head of rank {i + 1}",
        )
        for i in range(STRONGEST)
    ]
    handles += [
        Line2D([], [], color=COLOURS[vector], lw=2, label=f"{NAMES[vector]}: mean, range of these heads")
        for vector in NAMES
        if vector != OWN_OUTPUT
    ]
    handles.append(Line2D([], [], color="0.4", lw=0.8, ls="--", label="unchanged"))
    figure.legend(handles=handles, loc="outside lower center", ncol=4, frameon=False, fontsize=8)
    say(
        figure,
        f"measured: {_tokens(measured)} tokens, bars: 95% intervals over prompts; published (R&N §5.3): "
        f"{_tokens(published)} tokens, read with the fed run's final norm; rank by mean direct effect",
    )
    return figure


def _draw_heads(axis: Axes, rows: pd.DataFrame) -> None:
    """A line for each head, with intervals where there are any."""
    for rank, line in rows.groupby("rank_by_mean_direct_effect"):
        look: dict[str, Any] = {
            "color": COLOURS[OWN_OUTPUT],
            "marker": MARKERS[int(rank) - 1],
            "ms": 4,
            "lw": 1,
        }
        axis.plot(line["scale"], line["slope_after_on_before"], **look, zorder=4)
        if "slope_low" in line:
            axis.vlines(
                line["scale"], line["slope_low"], line["slope_high"], color=COLOURS[OWN_OUTPUT], lw=0.8
            )


def _draw_range(axis: Axes, rows: pd.DataFrame, colour: str) -> None:
    """Mean over heads, and from the smallest to the largest of them."""
    slope = rows.groupby("scale")["slope_after_on_before"].agg(["mean", "min", "max"])
    axis.plot(slope.index, slope["mean"], color=colour, lw=2, zorder=3)
    axis.fill_between(slope.index, slope["min"], slope["max"], color=colour, alpha=0.15, lw=0)


def slope_by_head(measured: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Slopes at the largest scale of all heads fed, in order of the own output's; published ones last."""
    panels = [(f"measured\n{model}", rows) for model, rows in measured.groupby("model", sort=False)]
    panels.append((f"published\n{published['model'].nunique()} models", published))
    figure, axes = grid(len(panels), 3, 3.4, 2.8, same_y=True)
    for axis, (title, rows) in zip(axes, panels, strict=True):
        rows = rows[rows["scale"] == rows["scale"].max()].set_index(["model", "layer", "head"])
        own = rows[rows["added_vector"] == OWN_OUTPUT].sort_values("slope_after_on_before")
        x = np.arange(len(own))
        axis.axhline(1, color="0.4", lw=0.8, ls="--", zorder=0)
        if "slope_everywhere" in own:
            look: dict[str, Any] = {"mfc": "none", "mec": COLOURS[OWN_OUTPUT], "ms": 4, "mew": 0.8}
            axis.plot(x, own["slope_everywhere"], "D", **look, label="own output at every position at once")
            axis.vlines(x, own["slope_low"], own["slope_high"], color=COLOURS[OWN_OUTPUT], lw=1, alpha=0.6)
        for vector, name in NAMES.items():
            slope = rows[rows["added_vector"] == vector].loc[own.index, "slope_after_on_before"]
            axis.plot(
                x, slope, "o", color=COLOURS[vector], ms=3.5, label=name, zorder=3 + (vector == OWN_OUTPUT)
            )
        axis.set_title(title, fontsize=9)
        axis.set(xlabel=f"{len(own)} heads, by slope with own output", xticks=[])
    label_left(axes, 3, f"slope of direct effect\nafter on before, scale {measured['scale'].max()}")
    legend_below(figure, axes[0], 4)
    say(
        figure,
        f"filled: added at one position per run; measured: {_tokens(measured)} tokens, bars: 95% intervals "
        f"over prompts; published (R&N §5.3): {_tokens(published)} tokens, read with the fed run's final "
        "norm",
    )
    return figure


def slope_by_way(ways: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Mean slope over the heads fed, at the largest scale, by how vectors are added and effects read: a panel
    for each kind of vector, on one axis."""
    models = list(ways["model"].unique())
    rows = [*models, *(f"{model} (published)" for model in published["model"].unique())]
    figure, axes = grid(len(NAMES), len(NAMES), 3.6, 0.55 + 0.3 * len(rows))
    for axis, vector in zip(axes, NAMES, strict=True):
        axis.axvline(1, color="0.4", lw=0.8, ls="--", zorder=0)
        for found in ways[ways["vector"] == vector].itertuples():
            place = models.index(found.model)
            axis.hlines(place, found.low, found.high, color=WAYS[found.way][0], lw=1.2)
            _draw_way(axis, found.way, place, found.estimate)
        of_vector = published[
            (published["scale"] == published["scale"].max()) & (published["added_vector"] == vector)
        ]
        means = of_vector.groupby("model", sort=False)["slope_after_on_before"].mean()
        for place, mean in enumerate(means, start=len(models)):
            _draw_way(axis, RELEASED, place, mean)
        axis.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=rows)
        axis.set_title(f"fed {NAMES[vector]}", fontsize=9)
    axes[1].set(xlabel="mean slope of direct effect after on before")
    ends = [end for axis in axes for end in axis.get_xlim()]
    for axis in axes:
        axis.set_xlim(min(ends), max(ends))
    for axis in axes[1:]:
        axis.set_yticklabels([])
    handles = [
        Line2D([], [], color=colour, marker=marker, ls="", mfc=colour if filled else "none", label=way)
        for way, (colour, marker, filled) in WAYS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncol=3, frameon=False, fontsize=8)
    say(
        figure,
        f"scale {published['scale'].max()}; measured: all heads fed, bars: 95% intervals over prompts; "
        "published (R&N §5.3): four heads of each model",
    )
    return figure


def _draw_way(axis: Axes, way: str, place: int, slope: float) -> None:
    colour, marker, filled = WAYS[way]
    axis.plot(slope, place, marker, color=colour, mfc=colour if filled else "white", ms=5, zorder=3)


def effect_after_against_before(fed: Mapping[str, xr.Dataset]) -> Figure:
    """Tokens and lines of the heads with the largest and the smallest slope, own output, largest scale."""
    panels = []
    for which, choose in (("largest", np.argmax), ("smallest", np.argmin)):
        for model_name, feeding in fed.items():
            own = slopes(feeding, 0).value[:, feeding.attrs["vectors"].index(OWN_OUTPUT), -1]
            panels.append((model_name, int(choose(own)), which))
    columns = len(fed)  # the largest above, the smallest below
    figure, axes = grid(len(panels), columns, 2.2, 2.6)
    for axis, (model_name, i, which) in zip(axes, panels, strict=True):
        feeding = fed[model_name]
        slope = _draw_tokens(axis, feeding, i)
        layer, head = int(feeding["layer"][i]), int(feeding["head"][i])
        axis.set_title(f"{model_name}\nL{layer}H{head}, {which}: {or_dash(slope)}", fontsize=9)
        axis.locator_params(axis="x", nbins=3)
    label_left(axes, columns, "direct effect after (logits)")
    legend_below(figure, axes[0], 4)
    n_tokens, scale = feeding["before"][0].size, int(feeding["scale"][-1])
    say(
        figure,
        f"heads of the largest and smallest slope at scale {scale}, one position per run; points: {n_tokens} "
        "tokens, fed the head's own output, at most 2 in 1000 outside; lines: least squares "
        "(axes as in the released code of R&N §5.3)",
    )
    return figure


def _draw_tokens(axis: Axes, feeding: xr.Dataset, fed: int) -> float:
    """A head's tokens when fed its own output at the largest scale, all lines; returns its own slope."""
    vectors = feeding.attrs["vectors"]
    slope = dict(zip(vectors, slopes(feeding, 0).value[fed, :, -1], strict=True))
    before = feeding["before"].values[fed].ravel()
    after = dict(zip(vectors, feeding["after"].values[fed, :, -1].reshape(len(vectors), -1), strict=True))
    ends = np.array([before.min(), before.max()])
    own = after[OWN_OUTPUT]
    axis.scatter(before, own, s=5, color=COLOURS[OWN_OUTPUT], alpha=0.35, linewidths=0, rasterized=True)
    for vector, name in NAMES.items():
        line = after[vector].mean() + slope[vector] * (ends - before.mean())
        axis.plot(ends, line, color=COLOURS[vector], lw=1.6, label=f"fed {name}")
    axis.plot(ends, ends, color="0.4", lw=0.8, ls="--", label="unchanged")
    low, high = np.quantile(own, [0.001, 0.999])
    axis.set(ylim=(min(low, ends[0]), max(high, ends[1])), xlabel="before (logits)")
    return float(slope[OWN_OUTPUT])


def _tokens(table: pd.DataFrame) -> str:
    return " or ".join(str(n) for n in sorted(table["n_tokens"].unique()))
