"""One prompt taken apart, as notebook 06 draws it."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from selfrepair.analysis.worked_prompt import WorkedPrompt
from selfrepair.plots.panels import say


def worked_prompt(table: pd.DataFrame, ablated: str, worked: WorkedPrompt) -> Figure:
    """One prompt part by part, clean and with the part named ``ablated`` ablated (rows of
    :func:`selfrepair.analysis.worked_prompt.worked_table`)."""
    figure, axis = plt.subplots(figsize=(6.4, 0.3 * len(table) + 1.7))
    heights = np.arange(len(table))
    for column, offset, colour in (("clean", -0.2, "C0"), ("ablated", 0.2, "C1")):
        label = f"{column}: {table[column].sum():.1f} in all"
        axis.barh(heights + offset, table[column], height=0.38, color=colour, label=label)
    axis.axvline(0, color="0.3", lw=0.8)
    own = list(table["part"]).index(ablated)
    axis.axhspan(own - 0.5, own + 0.5, color="0.9", zorder=0, lw=0)
    axis.set_yticks(
        heights, [f"{part} (ablated)" if part == ablated else part for part in table["part"]], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_xlabel(f"effect (logits) on the first token of “{worked.answer.strip()}”")
    axis.set_title(f"“{worked.text} …”", fontsize=10, style="italic")
    how = f"{worked.ablation} ablation at {worked.positions}"
    donors = f", mean of {worked.n_donors} donors" if worked.n_donors > 1 else ""
    say(figure, f"{worked.model}; {ablated}: {how}{donors}")
    axis.legend(frameon=False, fontsize=8.5, loc="best")
    return figure
