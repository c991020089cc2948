"""Figures of notebook 00: one logit as a sum, and what one head's ablation does to it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair.analysis.words import signed
from selfrepair.plots.panels import grid, label_left, legend_below

#: Colours of the kinds of component, in the order in which they come.
KINDS = {
    "embedding": "#7f7f7f",
    "head": "C0",
    "attention bias": "C2",
    "MLP": "C1",
    "constant": "#000000",
}


def components(
    heads: Float[np.ndarray, "layer head"],
    mlps: Float[np.ndarray, " layer"],
    biases: Float[np.ndarray, " layer"],
    embedding: float,
    constant: float,
    logit: float,
    marked: tuple[int, int],
) -> Figure:
    """Direct effects (logits) of every component on one token, in the order of depth, and their running sum.

    ``biases`` are the attention layers'; ``logit`` is where the running sum has to end; ``marked`` are the
    layer and the number of a head to name.
    """
    bars = [("embedding", embedding)]
    starts = []
    for layer, of_heads in enumerate(heads):
        starts.append(len(bars))
        bars += [("head", effect) for effect in of_heads]
        bars += [("attention bias", biases[layer]), ("MLP", mlps[layer])]
    starts.append(len(bars))
    bars.append(("constant", constant))
    figure, axis = plt.subplots(figsize=(8.5, 3.6))
    for kind, colour in KINDS.items():
        places = [place for place, (of_kind, _) in enumerate(bars) if of_kind == kind]
        axis.bar(places, [bars[place][1] for place in places], color=colour, width=0.85, label=kind)
    total = np.cumsum([effect for _, effect in bars])
    axis.step(range(len(bars)), total, where="mid", color="0.45", lw=1, label="sum so far")
    axis.axhline(logit, color="C3", lw=1, ls="--", label=f"centred logit, {signed(float(logit))}")
    axis.axhline(0, color="0.3", lw=0.8)
    for layer, (start, end) in enumerate(itertools.pairwise(starts)):
        axis.axvspan(start - 0.5, end - 0.5, color="0.95" if layer % 2 else "white", zorder=-1, lw=0)
    middles = [(start + end - 1) / 2 for start, end in itertools.pairwise(starts)]
    axis.set_xticks(middles, [str(layer) for layer in range(len(heads))])
    layer, head = marked
    place, height = starts[layer] + head, max(0.0, float(heads[layer, head]))
    axis.annotate(f"L{layer}H{head}", (place, height), (0, 2), textcoords="offset points", ha="center")
    axis.set(xlabel="layer", ylabel="direct effect (logits)", xlim=(-1, len(bars)))
    legend_below(figure, axis, 4)
    return figure


def idea(
    expected: Float[np.ndarray, " token"], change: Float[np.ndarray, " token"], words: Sequence[str]
) -> Figure:
    """Change of the logit against the change that is expected without repair: the first token, then all.

    Upright lines are self-repair; ``words`` are the tokens, for labels.
    """
    figure, axes = grid(2, 2, 4.0, 3.6)
    for axis, n in zip(axes, (1, len(words)), strict=True):
        _lines(axis, np.concatenate([expected, change]))
        for x, y, word in zip(expected[:n], change[:n], words[:n], strict=True):
            axis.plot([x, x], [x, y], color="C0", lw=1.6)
            axis.plot(x, y, "o", ms=5, color="C0")
            shown = f"“{word.strip() or '↵'}”"
            # Away from the lines: above them on the left, below them on the right.
            place = {"xytext": (-6, 5), "ha": "right"} if y > x else {"xytext": (6, -11), "ha": "left"}
            look = {"fontsize": 8, "parse_math": False, "textcoords": "offset points"}
            axis.annotate(shown, (x, y), **place, **look)
        axis.set_title("one token" if n == 1 else f"{n} tokens", fontsize=9)
    label_left(axes, 2, "change of the logit (logits)")
    legend_below(figure, axes, 2)
    return figure


def change_against_expected(
    expected: Float[np.ndarray, "prompt position"],
    change: Float[np.ndarray, "prompt position"],
    top: Bool[np.ndarray, "prompt position"],
    fraction: float,
) -> Figure:
    """The same for all tokens; the ``top`` ones are the ``fraction`` with the largest direct effect."""
    figure, axis = plt.subplots(figsize=(5.6, 4.6))
    _lines(axis, np.concatenate([expected.ravel(), change.ravel()]))
    for chosen, colour, size, label in (
        (~top, "0.6", 7, "other tokens"),
        (top, "C0", 18, f"tokens with the largest direct effect ({fraction:.0%})"),
    ):
        axis.scatter(expected[chosen], change[chosen], s=size, color=colour, lw=0, label=label)
    axis.set_ylabel("change of the logit (logits)")
    legend_below(figure, axis, 2)
    return figure


def _lines(axis: Axes, values: Float[np.ndarray, " value"]) -> None:
    """The lines of no repair and of complete repair, and one range for both axes."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    margin = 0.08 * (high - low) or 1.0
    ends = (low - margin, high + margin)
    axis.plot(ends, ends, color="0.3", lw=1, ls="--", zorder=0, label="no repair")
    axis.axhline(0, color="C2", lw=1, zorder=0, label="complete repair")
    axis.set(xlim=ends, ylim=ends, xlabel="expected without repair (logits)")


def split(panels: Mapping[str, Mapping[str, float]]) -> Figure:
    """By panel, parts (logits) that sum to a change of the logit, each from where the one before it ends."""
    figure, axes = grid(len(panels), 2, 4.1, 3.0)
    for axis, (title, parts) in zip(axes, panels.items(), strict=True):
        values = list(parts.values())
        ends = np.cumsum(values)
        labels = [*parts, "change of\nthe logit"]
        starts, heights = [0, *ends[:-1], 0], [*values, ends[-1]]
        colours = ["C3", *["C0"] * (len(values) - 1), "0.35"]
        axis.bar(labels, heights, bottom=starts, color=colours, width=0.7)
        digits = 2 if max(map(abs, heights)) >= 0.1 else 3
        for place, (start, height) in enumerate(zip(starts, heights, strict=True)):
            look = {"xytext": (0, 2 if height > 0 else -2), "va": "bottom" if height > 0 else "top"}
            text, end = signed(float(height), digits), (place, start + height)
            axis.annotate(text, end, ha="center", fontsize=8, textcoords="offset points", **look)
        axis.axhline(0, color="0.3", lw=0.8)
        axis.margins(y=0.12)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(title, fontsize=9, parse_math=False)
    label_left(axes, 2, "logits")
    return figure
