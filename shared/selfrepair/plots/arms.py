"""Figures of notebook 08: what dropout in training does to repair, and repair in the course of training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair.analysis.arms import CURVES, QUANTITIES, arms_table
from selfrepair.plots.panels import grid, legend_below, say

#: What panels are called, by quantity.
TITLES = {
    "non-norm": "heads and MLPs together",
    "heads": "other heads",
    "mlps": "MLPs",
    "layernorm": "final norm",
    "self-repair": "all of it: self-repair",
    "compensation-facts": "layers downstream, on facts",
    "compensation-prose": "layers downstream, on prose",
    "loss_held_out_prose": "loss on held-out prose",
}
#: Colour and marker of each curve.
CURVE_LOOKS = dict(
    zip(CURVES, (("#0173b2", "o"), ("#56b4e9", "s"), ("#1f3b73", "D"), ("#c2700a", "^")), strict=True)
)
#: Colours of the parts over training.
PART_COLOURS = {"layernorm": "#7f7f7f", "heads": "#0173b2", "mlps": "#c2700a", "non-norm": "#000000"}


#: How far right of a mean the single models stand that it is of.
BESIDE = 0.035


def dose_curves(curves: Mapping[str, pd.DataFrame], arms: xr.Dataset, amount: str) -> Figure:
    """What is given back against the dropout that a model was trained with: a panel for each quantity.

    Lines: means over training seeds with their 95% intervals (prompts and seeds drawn); points beside them:
    single arms. ``amount`` says how many prompts they were measured on.
    """
    panels = (*QUANTITIES, "loss_held_out_prose")
    figure, axes = grid(len(panels), 4, 2.35, 2.2)
    tables = {name: arms_table(curve.arms(arms)) for name, curve in CURVES.items()}
    for axis, quantity in zip(axes, panels, strict=True):
        for name, curve in curves.items():
            colour, marker = CURVE_LOOKS[name]
            points = tables[name].assign(dose=tables[name][CURVES[name].dose])
            axis.scatter(points["dose"] + BESIDE, points[quantity], s=6, color=colour, lw=0, zorder=3)
            if quantity in QUANTITIES:
                line = curve[curve["quantity"] == quantity]
                axis.fill_between(line["dose"], line["low"], line["high"], color=colour, alpha=0.15, lw=0)
            else:
                line = points.groupby("dose", as_index=False)[quantity].mean()
                line = line.rename(columns={quantity: "estimate"})
            label = f"{name} ({curve.loc[curve['dose'] > 0, 'n_arms'].min()} seeds)"
            axis.plot(
                line["dose"], line["estimate"], color=colour, marker=marker, ms=3.5, lw=1.3, label=label
            )
        if quantity in QUANTITIES:
            axis.axhline(0, color="0.6", lw=0.7, zorder=0)
        axis.set_title(TITLES[quantity], fontsize=9)
        axis.set_xlabel("dropout in training", fontsize=9)
    for axis in axes[::4]:
        axis.set_ylabel("share of the direct effect", fontsize=9)
    axes[len(panels) - 1].set_ylabel("nats per token", fontsize=9)
    legend_below(figure, axes[0], columns=4)
    says = "Given back of the direct effect: of heads (first five panels), of attention layers (next two)"
    prompts = f"{amount} of prose; facts: those that a model answers"
    means = "Lines: means over seeds; bands: 95% intervals over prompts and seeds"
    say(figure, f"{says}; {prompts}. {means}; points beside the means: single models")
    return figure


def over_training(arms: xr.Dataset, amount: str) -> Figure:
    """What each part gives back of the heads' direct effects at checkpoints of one model's training.

    Bands: 95% intervals over prompts, of which ``amount`` says how many. Beside it, the loss on held-out
    prose.
    """
    table = arms_table(arms).sort_values("step")
    figure, (left, right) = grid(2, 2, 4.0, 2.7)
    left.set_title("given back of the heads' direct effects", fontsize=9)
    right.set_title(TITLES["loss_held_out_prose"], fontsize=9)
    for part, colour in PART_COLOURS.items():
        left.plot(table["step"], table[part], color=colour, marker="o", ms=3.5, lw=1.3, label=TITLES[part])
        left.fill_between(
            table["step"], table[f"{part}_low"], table[f"{part}_high"], color=colour, alpha=0.15, lw=0
        )
    left.axhline(0, color="0.6", lw=0.7, zorder=0)
    left.set_ylabel("share of the direct effect")
    right.plot(table["step"], table["loss_held_out_prose"], color="0.2", marker="o", ms=3.5, lw=1.3)
    right.set_ylabel("loss (nats per token)")
    for axis in (left, right):
        _log_steps(axis, table["step"].to_numpy())
    legend_below(figure, left, columns=4)
    (group,) = table["group"].unique()
    say(figure, f"{group}: one model, one seed, no dropout; {amount}; bands: 95% intervals over prompts")
    return figure


def _log_steps(axis: Axes, steps: np.ndarray) -> None:
    """Training steps on a logarithmic axis that begins with step 0: up to the next one it is linear."""
    begins = max(1, int(steps[steps > 0].min()))
    axis.set_xscale("symlog", linthresh=begins)
    axis.set_xlim(-1, 1.2 * steps.max())
    axis.set_xticks(steps, [str(step) for step in steps], rotation=45, fontsize=7)
    axis.minorticks_off()
    axis.set_xlabel(f"training step (logarithmic from {begins} on)", fontsize=9)


def live_against_table(table: pd.DataFrame) -> Figure:
    """Quantities measured now (crosses) and in the arms' table (points, with 95% intervals), by model."""
    quantities = [name for name in QUANTITIES if name in set(table["quantity"])]
    figure, axes = grid(len(quantities), 4, 2.35, 2.0)
    models = list(dict.fromkeys(table["model"]))
    for axis, quantity in zip(axes, quantities, strict=True):
        rows = table[table["quantity"] == quantity].set_index("model").loc[models]
        places = np.arange(len(rows))
        errors = np.abs(rows[["low", "high"]].to_numpy().T - rows["table"].to_numpy())
        axis.errorbar(rows["table"], places, xerr=errors, fmt="o", ms=4, color="0.5", label="in the table")
        axis.plot(rows["now"], places, "x", color="#d55e00", ms=6, mew=1.5, label="measured now")
        axis.axvline(0, color="0.6", lw=0.7, zorder=0)
        axis.set_yticks(places, [""] * len(models))
        axis.set_ylim(len(models) - 0.5, -0.5)
        axis.set_title(TITLES[quantity], fontsize=9)
        axis.set_xlabel("share of the direct effect")
    for axis in axes[::4]:
        axis.set_yticks(range(len(models)), models, fontsize=7)
    legend_below(figure, axes[0], columns=2)
    says = "Given back of the direct effect of heads, and of attention layers (layers downstream)"
    say(figure, f"{says}; bars: the table's 95% intervals over prompts")
    return figure
