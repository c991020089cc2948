"""What figures of several panels share: grid, labels, one legend below, what they say above."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def grid(
    n_panels: int, columns: int, width: float, height: float, same_y: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure with ``n_panels`` axes of this size (inches), row by row; ``same_y``: of one range."""
    columns = min(columns, n_panels)
    rows = -(-n_panels // columns)
    size = (width * columns, height * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=same_y)
    for axis in axes.flat[n_panels:]:
        axis.remove()
    return figure, axes.flat[:n_panels]


def label_left(axes: np.ndarray, columns: int, label: str) -> None:
    """A label for the y axis of the first panel of every row."""
    for axis in axes[::columns]:
        axis.set_ylabel(label)


def legend_below(figure: Figure, axes: Axes | Iterable[Axes], columns: int) -> None:
    """What the legends of one panel or several would say, once, for all."""
    entries = {
        label: handle
        for axis in ([axes] if isinstance(axes, Axes) else axes)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    place: dict[str, Any] = {
        "loc": "outside lower center",
        "ncol": min(columns, int(figure.get_figwidth() // 2)),
    }
    figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=8, **place)


def say(figure: Figure, text: str) -> None:
    """What is shown, above all panels, in as many lines as it needs, of much the same length."""
    widest = int(14 * figure.get_figwidth())
    n_lines = len(textwrap.wrap(text, widest))
    width = next(width for width in range(1, widest + 1) if len(textwrap.wrap(text, width)) <= n_lines)
    figure.suptitle(textwrap.fill(text, width), fontsize=9, color="0.3")
