"""Claims as a forest plot, a strip of SVG for each: estimates, intervals, controls and published numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from selfrepair.analysis.rules import MEASURED, PUBLISHED, Claim
from selfrepair.plots.style import looks

WIDTH, ROW, MARGIN, AXIS = 420, 11, 16, 18
#: Matplotlib's markers, as paths around 0.
MARKERS = {
    "o": "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "s": "M-3.2-3.2h6.4v6.4h-6.4z",
    "^": "M0-4.2 4 3h-8z",
    "v": "M0 4.2 4-3h-8z",
    "D": "M0-4.4 4.4 0 0 4.4-4.4 0z",
    "P": "M-1.4-4h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z",
    "X": "M-4-2-2-4 0-2 2-4 4-2 2 0 4 2 2 4 0 2-2 4-4 2-2 0z",
}
#: The mark of a control.
CROSS = "M-3-3 3 3M-3 3 3-3"


def strip(claim: Claim, rows: pd.DataFrame, models: Mapping[str, tuple[str, str]]) -> Markup:
    """One claim: a row for each of ``models`` (its colour and marker), and one for published ones.

    ``rows`` are the claim's of a long table of claims. Grey is the range that the claim names, a cross the
    control. A row's numbers are its title, which browsers show under the pointer.
    """
    measured = {row.model: row for row in rows[rows["source"] == MEASURED].itertuples()}
    published = list(rows[rows["source"] == PUBLISHED].itertuples())
    numbers = [
        *(claim.at_least, claim.at_most),
        *rows[["estimate", "low", "high", "control"]].to_numpy(dtype=float).ravel(),
    ]
    finite = [float(number) for number in numbers if np.isfinite(number)]
    if not rows["estimate"].notna().any():
        return Markup("")
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(min(finite), max(finite))
    low, high = min(*finite, ticks[1]), max(*finite, ticks[-2])
    high = high if high > low else low + 1

    def x(value: float) -> str:
        return f"{MARGIN + (WIDTH - 2 * MARGIN) * (value - low) / (high - low):.1f}"

    height = ROW * (len(models) + bool(published)) + 6
    parts = [_range(claim, x, low, high, height)]
    parts += [
        f'<path class="tick" d="M{x(tick)} 0V{height + 3}"/>'
        f'<text x="{x(tick)}" y="{height + 14}">{tick:g}</text>'
        for tick in ticks
        if low <= tick <= high
    ]
    for number, (model, (colour, marker)) in enumerate(models.items()):
        if model in measured and np.isfinite(measured[model].estimate):
            parts.append(_row(measured[model], x, 3 + ROW * (number + 0.5), colour, marker))
    parts += [
        f'<g class="published" transform="translate({x(row.estimate)} {3 + ROW * (len(models) + 0.5):g})">'
        f'<title>{escape(row.model)}, published: {row.estimate:.3g}</title><path d="{MARKERS["o"]}"/></g>'
        for row in published
        if np.isfinite(row.estimate)
    ]
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height + AXIS}" role="img" '
        f'aria-label="Its numbers are in the table below">{"".join(parts)}</svg>'
    )


def _range(claim: Claim, x: Callable[[float], str], low: float, high: float, height: int) -> str:
    """What the claim names, and 0 where that is shown."""
    first, last = max(claim.at_least, low), min(claim.at_most, high)
    named = f'<path class="range" d="M{x(first)} 0H{x(last)}V{height}H{x(first)}z"/>'
    return named + (f'<path class="zero" d="M{x(0)} 0V{height}"/>' if low <= 0 <= high else "")


def _row(row: Any, x: Callable[[float], str], y: float, colour: str, marker: str) -> str:
    """A measured model's interval, control and estimate."""
    said = f"{row.model}: {row.estimate:.3g}"
    drawn = ""
    if np.isfinite(row.low) and np.isfinite(row.high):
        said += f" [{row.low:.3g}, {row.high:.3g}]"
        drawn += f'<path stroke="{colour}" stroke-width="1.6" d="M{x(row.low)} {y:g}H{x(row.high)}"/>'
    if np.isfinite(row.control):
        said += f", control {row.control:.3g}"
        drawn += f'<path class="control" transform="translate({x(row.control)} {y:g})" d="{CROSS}"/>'
    place = f"translate({x(row.estimate)} {y:g})"
    drawn += f'<path fill="{colour}" transform="{place}" d="{MARKERS[marker]}"/>'
    return f"<g><title>{escape(said)}</title>{drawn}</g>"


def legend(models: Mapping[str, tuple[str, str]]) -> list[tuple[str, Markup]]:
    """Names and marks of the models, of a control and of published numbers."""
    marks = {
        model: f'<path fill="{colour}" d="{MARKERS[marker]}"/>' for model, (colour, marker) in models.items()
    }
    marks["control"] = f'<path class="control" d="{CROSS}"/>'
    marks["published"] = f'<g class="published"><path d="{MARKERS["o"]}"/></g>'
    marks["range of the claim"] = '<path class="range" d="M-6-6h12v12h-12z"/>'
    return [
        (name, Markup(f'<svg viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true">{mark}</svg>'))
        for name, mark in marks.items()
    ]


def models_of(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """The measured models of a long table of claims, with their colours and markers."""
    return looks(table.loc[table["source"] == MEASURED, "model"])
