"""Figures of one panel per model: their grid, labels, one legend below, what they say above."""

from __future__ import annotations

import textwrap

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


def legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """The legend of one of the panels, for all."""
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncol=min(columns, int(figure.get_figwidth() // 2)),
        frameon=False,
        fontsize=8,
    )


def say(figure: Figure, text: str) -> None:
    """What is shown, above all panels, in as many lines as it needs."""
    figure.suptitle(textwrap.fill(text, int(14 * figure.get_figwidth())), fontsize=9, color="0.3")


def signed(value: float) -> str:
    """Two decimals and a real minus sign."""
    return f"{value:.2f}".replace("-", "−")
