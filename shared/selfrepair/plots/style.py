"""What every figure shares: style, saving, and one look per model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def use_style() -> None:
    """Sizes that stay readable at column width, and the colour-blind-safe palette."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind", font_scale=1.1)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def save(figure: Figure, out_dir: Path, name: str) -> None:
    """Writes ``figures/<name>.png`` and ``.pdf`` under ``out_dir``."""
    folder = out_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def looks(models: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model, no two alike, in order of first appearance."""
    return {model: (f"C{i % 10}", MARKERS[i % len(MARKERS)]) for i, model in enumerate(dict.fromkeys(models))}
