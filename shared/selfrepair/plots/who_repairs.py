"""Figures of notebook 09: growth of every pair of heads, how few carry it, resemblance, joint costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.head_growth import CONTROL, STRONGEST, TOP, PairGrowth
from selfrepair.analysis.joint_ablation import JointCosts
from selfrepair.analysis.words import number, signed
from selfrepair.plots.panels import grid, label_left, legend_below, say

#: What panels of matrices are of.
SELECTIONS = {TOP: "where the head mattered", CONTROL: "control: where it did not"}
#: So much of the pairs is drawn, those that grow most.
SHOWN = 0.5
#: Colour, marker and filling of the other head that is ablated, and what it is called.
OTHERS = {
    "backup": ("C0", "o", "C0", "with its strongest backup"),
    "middling": ("0.35", "s", "white", "with a later head of middling growth"),
}
#: By panel: what it shows, and the label of each estimate in it: the claim's statistic, then its control.
ALIKE = {
    "cosine of outputs": {
        "backups-output-cosine": "head and its backups",
        "backups-output-cosine-same-layer": "head and others of the backups' layer",
    },
    "cosine of attention patterns": {
        "backups-pattern-cosine": "head and its backups",
        "backups-pattern-cosine-same-layer": "head and others of the backups' layer",
    },
    "rank correlation of growth": {
        "same-backups": "after another head",
        "same-backups-control-tokens": "the same on control tokens",
        "same-head": "ceiling: after the same head",
    },
}
#: Colour, marker and filling of the estimates of a panel, in order.
ALIKE_LOOKS = (("C0", "o", "C0"), ("0.35", "s", "white"), ("0.35", "|", "0.35"))


def growth_matrices(growths: Sequence[PairGrowth]) -> Figure:
    """Mean growth (logits) by ablated head (down) and later head (across): two panels for each model.

    Heads in order of layer and number; lines are between layers. Grey: the other head is not later.
    """
    figure, axes = grid(2 * len(growths), 4, 2.7, 2.75)
    matrices = [one.matrix(selection) for one in growths for selection in SELECTIONS]
    limit = float(np.nanquantile(np.abs(np.concatenate([m.ravel() for m in matrices[::2]])), 0.995))
    colours = plt.get_cmap("RdBu_r").with_extremes(bad="0.9")
    panels = [(one, label) for one in growths for label in SELECTIONS.values()]
    for axis, matrix, (one, label) in zip(axes, matrices, panels, strict=True):
        image = axis.imshow(matrix, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
        _layers_as_ticks(axis, one)
        axis.set_title(f"{one.model}\n{label}", fontsize=9)
    for axis in axes[-4:]:
        axis.set_xlabel("layer of the later head", fontsize=9)
    label_left(axes, 4, "layer of the ablated head")
    figure.colorbar(
        image, ax=list(axes), extend="both", shrink=0.5, label="mean change of direct effect (logits)"
    )
    say(
        figure,
        "every row is a head that is ablated, every column a head of a later layer; red: it writes more of "
        f"the correct token, blue: less; grey: it is not later; {_prompts(growths)} prompts",
    )
    return figure


def _layers_as_ticks(axis: Axes, one: PairGrowth) -> None:
    for edge in range(1, one.n_layers):
        axis.axhline(edge * one.n_heads - 0.5, color="0.6", lw=0.4)
        axis.axvline(edge * one.n_heads - 0.5, color="0.6", lw=0.4)
    ticks = np.arange(0, one.n_layers, -(-one.n_layers // 12))
    places = (ticks + 0.5) * one.n_heads - 0.5
    axis.set(xticks=places, yticks=places, xticklabels=ticks, yticklabels=ticks)
    axis.tick_params(length=0)
    sns.despine(ax=axis, left=True, bottom=True)


def concentration(growths: Sequence[PairGrowth]) -> Figure:
    """Growth that the pairs that grow most carry together, against how many of all pairs they are.

    A panel for each model, with the same for Gaussian growth and for growth on control tokens.
    """
    figure, axes = grid(len(growths), 3, 3.2, 2.7, same_y=True)
    gaussian = "were growth Gaussian, as wide as it is for each ablated head"
    for axis, one in zip(axes, growths, strict=True):
        axis.axhline(0, color="0.6", lw=0.7, zorder=0)
        axis.axvline(STRONGEST, color="0.75", lw=0.8, zorder=0)
        shares = np.arange(1, len(one.later) + 1) / len(one.later)
        carried = one.cumulative()
        axis.fill_between(shares, *carried.interval(), color="C0", alpha=0.25, lw=0)
        axis.plot(shares, carried.value, color="C0", lw=1.5, label="top tokens")
        finely = np.linspace(0.005, SHOWN, 100)
        axis.plot(finely, one.if_gaussian(finely).value, color="0.2", lw=1, ls="--", label=gaussian)
        axis.plot(shares, one.cumulative(CONTROL).value, color="0.5", lw=1, ls=":", label="control tokens")
        tenth, by_chance = one.share_of_strongest().value, one.share_if_gaussian().value
        axis.plot(STRONGEST, tenth, color="C0", marker="o", ms=5, ls="none")
        axis.plot(STRONGEST, by_chance, color="0.2", marker="s", mfc="white", ms=5, ls="none")
        axis.set(xlim=(0, SHOWN), ylim=(-0.05, 1.1), xlabel="share of the pairs, largest first")
        means = f"tenth {number(tenth)}, if Gaussian {number(by_chance)}"
        axis.set_title(f"{one.model}, {len(one.later)} pairs\n{means}", fontsize=9)
    label_left(axes, 3, "share of the\npositive growth")
    legend_below(figure, axes[0], columns=3)
    say(
        figure,
        f"pairs in order of their growth on {_prompts(growths, even=True)} prompts of even number, growth on "
        f"{_prompts(growths, even=False)} of odd number; band: 95% interval over the latter; grey line, "
        "circle and square: the strongest tenth",
    )
    return figure


def alike(found: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """Three panels, a row for each model: the statistic and its control, with 95% intervals."""
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 0.36 * len(found) + 2.2), sharey=True)
    for axis, (title, labels) in zip(axes, ALIKE.items(), strict=True):
        axis.axvline(0, color="0.6", lw=0.7, zorder=0)
        for row, estimates in enumerate(found.values()):
            for i, (name, label) in enumerate(labels.items()):
                estimate, (colour, marker, filling) = estimates[name], ALIKE_LOOKS[i]
                height = row + 0.24 * i - 0.12 * (len(labels) - 1)
                axis.plot(estimate.interval(), [height] * 2, color=colour, lw=1.2)
                look = {"color": colour, "marker": marker, "mfc": filling, "ms": 5, "ls": "none"}
                axis.plot(estimate.value, height, label=label if row == 0 else None, **look)
        axis.set_xlabel(title)
        axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes[0].set(yticks=range(len(found)), yticklabels=list(found), ylim=(len(found) - 0.5, -0.5))
    say(figure, "bars: 95% intervals over prompts; for cosines they say only which pairs grow most")
    return figure


def joint_excess(found: Sequence[JointCosts]) -> Figure:
    """Loss (nats per token) of two heads ablated together, less the sum of their costs, against it."""
    figure, axes = grid(len(found), 3, 3.2, 2.8)
    for axis, one in zip(axes, found, strict=True):
        axis.axhline(0, color="0.3", ls="--", lw=0.9, zorder=0)
        for other, (colour, marker, filling, label) in OTHERS.items():
            alone = one.sum_of_both("loss", other)
            excess = one.together("loss", other) - alone
            bars = np.abs(np.stack(excess.interval()) - excess.value)
            axis.errorbar(
                *(alone.value, excess.value, bars),
                **{"fmt": marker, "ms": 5, "mfc": filling, "color": colour, "elinewidth": 0.8},
                label=label,
            )
        means = [signed(float(one.excess("loss", other).value), 3) for other in OTHERS]
        axis.set_title(f"{one.model}\nmean {means[0]}, control {means[1]}", fontsize=9)
        axis.set_xlabel("sum of what each costs alone")
    label_left(axes, 3, "cost together less the sum")
    legend_below(figure, axes[0], columns=2)
    say(
        figure,
        "rise of the loss (nats per token) on the ablated head's top tokens, "
        f"{_amounts(one.n_prompts for one in found)} prompts of odd number; bars: 95% intervals over "
        "prompts; dashed: together as much as the sum",
    )
    return figure


def _prompts(growths: Sequence[PairGrowth], even: bool | None = None) -> str:
    """How many there are, or how many of even or odd number."""
    halves = [one.is_even if even is None else one.is_even[one.is_even == even] for one in growths]
    return _amounts(map(len, halves))


def _amounts(counted: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(counted))))
