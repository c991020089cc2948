"""Figures of notebook 04 after the authors' figure code: the last MLP's part, its few largest changes; tokens
in context; and the claims' statistics beside their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.neuron_repair import (
    BREAKAGE,
    BREAKING,
    DIRECT_EFFECT,
    ERASING,
    FIRST,
    HALF,
    IN_WORDS,
    OVERLAP,
    REPAIR,
    REPAIRING,
    SINGLE,
    WEAKENING,
    NeuronRepair,
    mlp_part,
    part_of_self_repair,
)
from selfrepair.analysis.neurons import SELECTED, ModelNeurons
from selfrepair.analysis.rules import load_claims, load_statistics
from selfrepair.plots.panels import legend_below

#: Tokens, and the side of the MLP's change that is looked at there.
KINDS = {
    "tokens of largest direct effect": (DIRECT_EFFECT, REPAIRING),
    "tokens of largest MLP repair": (REPAIR, REPAIRING),
    "mirror: largest breakage, signs reversed": (BREAKAGE, BREAKING),
}
#: Shares of the MLPs' repair are drawn up to here (%), as by the authors.
CAP = 300


def parts_of_self_repair(models: Sequence[ModelNeurons]) -> Figure:
    """How much of a head's self-repair later MLPs are, over tokens; all heads of the chosen one's layer.

    Clipped to 0 … 100%, on tokens with positive self-repair (R&N §4, the authors' ``boolean_activation``).
    """
    figure, axes = _columns(1, models, height=3.0)
    bins = np.linspace(0, 100, 21)
    for axis, model in zip(axes[0], models, strict=True):
        (_, (scope, repair)) = model.scopes().items()
        for name, part, look in (
            ("all later MLPs", repair.mlps_repair, {"color": "C0", "alpha": 0.45}),
            ("the last MLP alone", repair.mlp_repair, {"color": "C3", "histtype": "step", "lw": 1.3}),
        ):
            share = 100 * part_of_self_repair(repair, part)
            axis.hist(share, bins, weights=np.full(len(share), 1 / len(share)), label=name, **look)
        found = mlp_part(repair, repair.mlps_repair, model.draws()[:1])
        for name, style in (("clipped", "-"), ("floor", ":")):
            label = {"clipped": "mean, all later MLPs", "floor": "its floor (random signs)"}[name]
            axis.axvline(100 * found[name].value, color="0.2", lw=1.3, ls=style, label=label)
        axis.set_title(f"{model.model}, {scope}\nn = {len(share)} of {len(repair.prompt)} tokens", fontsize=9)
        axis.set_xlabel("part of self-repair (%)")
    axes[0, 0].set_ylabel("share of tokens")
    legend_below(figure, axes[0, 0], columns=2)
    return figure


def few_neurons(models: Sequence[ModelNeurons]) -> Figure:
    """What the five largest changes of the last MLP make up; all heads of the chosen one's layer.

    Above: of what *all* MLPs repair, on the tokens where they repair most, up to 300% (R&N §4, the authors'
    ``sparse_neuron_activation``). Below: of the last MLP's positive change. Lines: the mirror image.
    """
    figure, axes = _columns(2, models, height=5.2, sharex=False)
    for column, model in zip(axes.T, models, strict=True):
        for name, (selection, side) in KINDS.items():
            (_, (scope, repair)) = model.scopes(selection).items()
            if selection != DIRECT_EFFECT:
                share = np.minimum(100 * repair.few_of_mlps(side), CAP)
                _distribution(column[0], share, np.linspace(0, CAP, 31), name)
            share = 100 * repair.few_of_total(side)
            _distribution(column[1], share, np.linspace(0, 100, 41), name)
        column[0].set_title(f"{model.model}, {scope}\nMLP {repair.mlp}, n = {len(share)} tokens", fontsize=9)
        column[0].set_xlabel("five neurons, of what all MLPs repair (%)")
        column[1].set_xlabel("five neurons, of the positive change (%)")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of tokens")
    legend_below(figure, axes[1, 0], columns=1)
    return figure


def _distribution(
    axis: Axes, values: Float[np.ndarray, " token"], bins: Float[np.ndarray, " edge"], kind: str
) -> None:
    """Shares of tokens, of those where the value is defined; ``kind`` is one of ``KINDS``."""
    values = values[np.isfinite(values)]
    look: dict[str, Any] = (
        {"histtype": "step", "lw": 1.3} if kind != "tokens of largest MLP repair" else {"alpha": 0.4}
    )
    look["color"] = f"C{list(KINDS).index(kind)}"
    axis.hist(values, bins.tolist(), weights=np.full(len(values), 1 / len(values)), label=kind, **look)


def first_neuron(models: Sequence[ModelNeurons]) -> Figure:
    """The neuron that repairs most on each token: its clean direct effect and its change; the chosen head.

    Columns: models; rows: tokens by direct effect, by the MLPs' repair, and the mirror image. Colour: the
    last MLP's clean direct effect, without its bias. On the dashed line nothing of the clean direct effect
    is left. (R&N §4, the authors' ``erasure_neuron``, has the ablated direct effect in place of the change.)
    """
    figure, axes = plt.subplots(
        len(KINDS),
        len(models),
        figsize=(3.3 * len(models) + 1, 8.8),
        squeeze=False,
        sharex="col",
        sharey="col",
    )
    for column, model in zip(axes.T, models, strict=True):
        for axis, (name, (selection, side)) in zip(column, KINDS.items(), strict=True):
            scope, repair = next(iter(model.scopes(selection).items()))
            points = _scatter(axis, repair, side)
            does = "erases" if side == REPAIRING else "supports"
            text = f"{does}: {100 * repair.first_erases(side).mean():.0f}%"
            axis.text(0.97, 0.96, text, transform=axis.transAxes, va="top", ha="right", fontsize=9)
            axis.set_title(f"{model.model}, {scope}, n = {len(repair.prompt)}\n{name}", fontsize=8)
        column[-1].set_xlabel("clean direct effect (logits)")
        points_of = np.concatenate([axis.collections[0].get_offsets() for axis in column])
        left, right = min(points_of[:, 0].min(), 0.0), max(points_of[:, 0].max(), 0.0)
        margin, top = 0.06 * (right - left), 1.2 * points_of[:, 1].max()
        column[0].set(xlim=(left - margin, right + margin), ylim=(-0.04 * top, top))
    for axis in axes[:, 0]:
        axis.set_ylabel("change (logits)")
    bar = figure.colorbar(points, ax=axes, aspect=40)
    bar.set_label("last MLP's clean direct effect (logits; beyond the ends: their colour)")
    return figure


#: Ends of the colours of :func:`first_neuron` (logits).
REACH = 3.0


def _scatter(axis: Axes, repair: NeuronRepair, side: int) -> PathCollection:
    sign = 1 - 2 * side
    clean, change = repair.largest_clean[:, side, 0], repair.largest[:, side, 0]
    look: dict[str, Any] = {
        "cmap": "coolwarm_r",
        "norm": Normalize(-REACH, REACH),
        "s": 9,
        "lw": 0.2,
        "edgecolors": "0.4",
    }
    points = axis.scatter(clean, change, c=sign * repair.mlp_direct_effect, **look)
    axis.axline((0, 0), slope=-1, color="0.2", lw=0.9, ls="--")
    axis.axhline(0, color="0.7", lw=0.7, zorder=0)
    axis.axvline(0, color="0.7", lw=0.7, zorder=0)
    return points


def frequencies(models: Sequence[ModelNeurons]) -> Figure:
    """How often a neuron is among the ten of the last MLP that repair most, most frequent neuron first.

    The chosen head's tokens. Beside it the ten of largest absolute clean direct effect, and random ones (R&N
    §4, from the authors' figure code).
    """
    figure, axes = _columns(1, models, height=3.3)
    for axis, model in zip(axes[0], models, strict=True):
        for i, (name, (selection, _)) in enumerate(SELECTED.items()):
            scope, repair = next(iter(model.scopes(selection).items()))
            for kind, style in (("repairers", "-"), ("strongest", "--")):
                often = 100 * repair.sets(kind).frequencies()
                rank = np.arange(1, len(often) + 1)
                what = {"repairers": "repair most", "strongest": "largest clean effect"}[kind]
                look: dict[str, Any] = {
                    "color": f"C{i}",
                    "ls": style,
                    "lw": 1.4 if kind == "repairers" else 1.0,
                }
                axis.plot(rank, often, label=f"{what}; tokens of {name}", **look)
        chance = 100 * repair.sets("repairers").random_frequencies()
        axis.plot(rank, chance, color="0.4", lw=1.2, ls=":", label="random neurons")
        axis.set(xscale="log", xlabel="neurons, most frequent first", ylim=(0, None))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(
            f"{model.model}, {scope}\nMLP {repair.mlp}, n = {len(repair.prompt)} tokens", fontsize=9
        )
    axes[0, 0].set_ylabel("tokens with the neuron\namong the ten (%)")
    legend_below(figure, axes[0, 0], columns=1)
    return figure


def against_controls(found: Mapping[str, Mapping[str, Statistics]], notebook: str = "04") -> Figure:
    """Every claim's statistic (filled) beside its control (open), by model and by how tokens are selected.

    ``found`` is what :func:`selfrepair.analysis.neurons.by_selection` gives. With 95% intervals; dashed: the
    end of the claim's range, where the axis reaches it.
    """
    claims = [claim for claim in load_claims() if claim.notebook == notebook]
    known = load_statistics()
    found = {
        selected: {model: statistics for model, statistics in models.items() if statistics}
        for selected, models in found.items()
    }
    names = list(next(iter(found.values())))
    figure, axes = plt.subplots(2, 3, figsize=(10.4, 0.9 * len(names) + 3.0), sharey=True)
    for axis, claim in zip(axes.flat, claims, strict=False):
        control = str(known[claim.statistic].control_id)
        drawn = {claim.statistic: True, control: False}
        for i, models in enumerate(found.values()):
            for y, statistics in enumerate(models.values()):
                height = y + 0.3 * i - 0.15
                for name, is_filled in drawn.items():
                    look: dict[str, Any] = {"color": f"C{i}", "mfc": f"C{i}" if is_filled else "none"}
                    axis.plot(statistics[name].interval(), [height, height], color=f"C{i}", lw=1.3, zorder=1)
                    size = 5 if is_filled else 7.5
                    axis.plot(statistics[name].value, height, ls="", marker="o", ms=size, **look)
        reach = 1.08 * axis.dataLim.x1 if names else 1.0
        for end in (claim.at_least, claim.at_most):
            if 0 < end < reach:
                axis.axvline(end, color="0.3", lw=0.9, ls="--")
        side = "above" if claim.side > 0 else "below"
        title = f"{IN_WORDS[claim.statistic]}:\n{claim.rule} and {side} its control"
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(_UNITS[claim.statistic], fontsize=9)
        axis.set_xlim(0, reach)
    for axis in axes.flat[len(claims) :]:
        axis.set_axis_off()
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    handles = [Line2D([], [], color=f"C{i}", lw=3) for i in range(len(found))]
    for face, size in (("0.3", 5), ("none", 7.5)):
        handles.append(Line2D([], [], color="0.3", marker="o", mfc=face, ms=size, ls=""))
    labels = [f"tokens of {name}" for name in found]
    labels += ["statistic", "control"]
    figure.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False, fontsize=8)
    return figure


#: What the axes of :func:`against_controls` show.
_UNITS = {
    HALF: "share of neurons for half of\nthe positive change",
    SINGLE: "share of tokens",
    OVERLAP: "Jaccard overlap",
    ERASING: "share of the positive change",
    WEAKENING: "share of a group's own change",
    FIRST: "share of tokens",
}


def _columns(
    rows: int, models: Sequence[ModelNeurons], height: float, sharex: bool = True
) -> tuple[Figure, np.ndarray]:
    """Axes ``[row, model]`` that share an axis of shares row by row."""
    return plt.subplots(
        rows,
        len(models),
        figsize=(3.3 * len(models) + 0.5, height + 0.3),
        squeeze=False,
        sharex=sharex,
        sharey="row",
    )
