"""Figures of notebook 05: one layer earlier, cosines of head outputs, gradient alignment."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from selfrepair.analysis.cosines import cosine_by_distance, head_cosines
from selfrepair.analysis.earlier_input import correlation, mean_changes
from selfrepair.analysis.estimates import Estimate, mean_over_prompts
from selfrepair.analysis.words import or_dash
from selfrepair.plots.panels import grid, label_left, legend_below, say
from selfrepair.plots.style import looks


def earlier_against_ablated(found: dict[str, xr.Dataset]) -> Figure:
    """Change of every head's direct effect under ablation against that with its predecessor's input."""
    figure, axes = grid(len(found), 3, 3.3, 3.0)
    n_later = max(changes.sizes["later_layer"] for changes in found.values())
    colours = ListedColormap(plt.get_cmap("viridis")(np.linspace(0, 0.85, n_later)))
    for axis, (model_name, changes) in zip(axes, found.items(), strict=True):
        means = mean_changes(changes)
        axis.axhline(0, color="0.7", lw=0.8, zorder=0)
        axis.axvline(0, color="0.7", lw=0.8, zorder=0)
        for later in range(len(means.earlier)):
            x, y = means.earlier[later], means.ablated[later]
            bars = {"fmt": "none", "ecolor": "0.75", "elinewidth": 0.6, "zorder": 1}
            axis.errorbar(x.value, y.value, _errors(y), _errors(x), **bars)
            axis.plot(x.value, y.value, "o", ms=5, mec="white", mew=0.4, color=colours(later))
        r = correlation(means)
        value, low, high = (or_dash(float(number)) for number in (r.value, *r.interval()))
        axis.set_title(f"{model_name}\nr = {value} [{low}, {high}]", fontsize=9)
        axis.set_xlabel("change, one layer earlier (logits)")
        axis.locator_params(axis="x", nbins=4)
    label_left(axes, 3, "change, layer before without\nits strongest head (logits)")
    scale = ScalarMappable(BoundaryNorm(np.arange(0.5, n_later + 1), colours.N), colours)
    figure.colorbar(
        scale, ax=list(axes), label="layer of the head", ticks=np.arange(1, n_later + 1), shrink=0.6
    )
    counts = sorted({int(n) for changes in found.values() for n in changes["count"].values.sum(1)})
    tokens = " or ".join(map(str, counts))
    say(
        figure,
        f"points: heads of every layer but the first, mean change of direct effect over {tokens} tokens; "
        "bars and r: 95% intervals over prompts (axes as in the released code of R&N §5.3, which takes one "
        "layer of each model)",
    )
    return figure


def _errors(estimate: Estimate) -> Float[np.ndarray, "end x"]:
    """How far the interval's ends are from the estimate."""
    return np.stack([np.abs(end - estimate.value) for end in estimate.interval()])


def cosine_matrices(found: dict[str, xr.Dataset]) -> Figure:
    """Mean cosine between the outputs of every two heads, in order of layer and head."""
    figure, axes = grid(len(found), 3, 3.1, 3.0)
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
    label_left(axes, 3, "layer of the head")
    figure.colorbar(image, ax=list(axes), label="mean cosine of head outputs", extend="both", shrink=0.6)
    say(
        figure,
        f"all tokens of {_prompts(found)} prompts; heads in order, layer by layer (among the released "
        "numbers of R&N there are none)",
    )
    return figure


def cosines_by_distance(found: dict[str, xr.Dataset]) -> Figure:
    """Mean cosine between outputs of heads against how many layers they are apart, with 95% intervals."""
    figure, axis = plt.subplots(figsize=(4.6, 3.4))
    _lines(axis, {model_name: cosine_by_distance(cosines) for model_name, cosines in found.items()})
    axis.axhline(0, color="0.4", lw=0.8, ls="--", zorder=0)
    axis.set(xlabel="layers apart", ylabel="mean cosine of head outputs")
    axis.set_title(f"{_prompts(found)} prompts; shaded: 95% interval over prompts", fontsize=9)
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
    axes[2].yaxis.set_minor_locator(LogLocator(subs=(2, 4, 6)))
    axes[2].yaxis.set_minor_formatter("{x:g}")
    axes[0].axhline(0, color="0.4", lw=0.8, ls="--", zorder=0)
    for axis in axes:
        axis.title.set_fontsize(9)
    legend_below(figure, axes[0], len(found))
    say(
        figure,
        f"means over the tokens of {_prompts(found)} prompts; shaded: 95% intervals over prompts (ours: "
        "none of the three has a counterpart in the released code of R&N)",
    )
    return figure


def _lines(axis: Axes, estimates: dict[str, Estimate]) -> None:
    """One line per model: estimates with their 95% intervals."""
    for model_name, (colour, marker) in looks(estimates).items():
        estimate = estimates[model_name]
        axis.plot(estimate.value, color=colour, marker=marker, ms=4, label=model_name)
        axis.fill_between(np.arange(len(estimate)), *estimate.interval(), color=colour, alpha=0.2, lw=0)
    longest = max(map(len, estimates.values()))
    axis.set_xticks(np.arange(0, longest, max(1, longest // 8)))


def _prompts(found: dict[str, xr.Dataset]) -> int:
    return next(iter(found.values())).sizes["prompt"]
