"""The figures: seaborn and matplotlib, colour-blind-safe, saved as PNG and PDF."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair.breakdown import layer_means

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def use_style() -> None:
    """Sizes that stay readable at column width, and the colour-blind-safe palette."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind", font_scale=1.1)
    plt.rcParams.update(
        {"figure.dpi": 110, "savefig.dpi": 200, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
    )


def save(figure: Figure, out_dir: Path, name: str) -> None:
    """Writes ``figures/<name>.png`` and ``.pdf`` under ``out_dir``."""
    folder = out_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def self_repair_by_depth(panels: dict[str, pd.DataFrame]) -> Figure:
    """Self-repair (logits) of every head against relative depth, with layer means; one panel per table (R&N Fig. 1)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False)
    for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
        means = layer_means(table)
        for i, (model, rows) in enumerate(table.groupby("model", sort=False)):
            colour = f"C{i}"
            depth = rows["layer"] / max(1, rows["layer"].max())
            axis.scatter(depth + 0.008 * (i - 2), rows["self_repair"], s=9, color=colour, alpha=0.35, linewidths=0)
            here = means[means["model"] == model]
            axis.plot(here["relative_depth"], here["self_repair"], color=colour, marker=MARKERS[i % len(MARKERS)], ms=5, label=model)
        axis.axhline(0, color="0.4", lw=0.8, ls="--", zorder=0)
        axis.set(title=title, xlabel="relative depth of the ablated head's layer")
        _symmetric_log(axis, table["self_repair"])
        axis.legend(frameon=False, fontsize=8, title="layer means", title_fontsize=8)
    axes[0, 0].set_ylabel("self-repair (logits)")
    return figure


def effect_against_change(panels: dict[str, pd.DataFrame]) -> Figure:
    """Direct effect against logit change per head, with the no-repair line ``y = −x`` and the self-repair zone."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.0), squeeze=False)
    for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
        right = 1.08 * table["direct_effect"].max()
        line = np.array([0, right])
        axis.fill_between(line, -line, 0, color="0.9", zorder=0, label="self-repair zone")
        axis.plot(line, -line, color="0.3", lw=1, ls="--", label="no repair: $y = -x$")
        axis.axhline(0, color="0.3", lw=0.8)
        for i, (model, rows) in enumerate(table.groupby("model", sort=False)):
            axis.scatter(
                rows["direct_effect"],
                rows["logit_change"],
                s=14,
                color=f"C{i}",
                marker=MARKERS[i % len(MARKERS)],
                alpha=0.7,
                linewidths=0,
                label=model,
            )
        low = min(1.15 * table["logit_change"].quantile(0.02), -right)
        axis.set(
            title=title, xlabel="direct effect (logits)", xlim=(min(0, 1.1 * table["direct_effect"].min()), right), ylim=(low, 0.35 * right)
        )
        below = int((table["logit_change"] < low).sum())
        if below:
            axis.annotate(f"{below} heads below", (0.03, 0.02), xycoords="axes fraction", fontsize=8, color="0.3")
    axes[0, 0].set_ylabel("change of logit on ablation (logits)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, frameon=False, fontsize=8)
    return figure


def _symmetric_log(axis: Axes, values: pd.Series) -> None:
    """A symmetric-log y axis, linear below the typical size, where some heads' values dwarf the others."""
    typical = float(values.abs().median())
    if values.abs().max() > 12 * typical > 0:
        threshold = 10.0 ** np.round(np.log10(2 * typical))
        axis.set_yscale("symlog", linthresh=threshold)
        axis.annotate(f"linear within ±{threshold:g}, logarithmic beyond", (0.02, 0.02), xycoords="axes fraction", fontsize=7, color="0.4")
