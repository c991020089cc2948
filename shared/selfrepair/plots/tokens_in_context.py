"""Text whose tokens are coloured by a number each: HTML for a notebook, a figure for the results."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from selfrepair.analysis.words import signed

#: Red below 0, white, blue above: told apart by colour-blind readers, and light enough for black text.
COLOURS = ListedColormap(plt.get_cmap("RdBu")(np.linspace(0.2, 0.8, 257)), "light RdBu")
#: Characters that would not be seen.
SHOWN = str.maketrans({"\n": "↵", "\t": "⇥", "\r": None})
#: Of the figure: columns of text, size of a character (inches, in DejaVu Sans Mono of this many points, which
#: is rounded up to whole pixels).
COLUMNS, POINTS = 96, 8
ADVANCE, LINE_HEIGHT = 0.63 * POINTS / 72, 1.75 * POINTS / 72


def tokens_html(
    tokens: Sequence[str], values: Sequence[float], limit: float, marked: int | None = None
) -> str:
    """A text as HTML, each token on the colour of its value (logits), which is shown when one points at it.

    Args:
        tokens: their texts, in order.
        values: one of each; NaN where a token has none.
        limit: the value from which on the colours are at their strongest.
        marked: the index of a token to draw a line around.

    Raises:
        ValueError: not one value for each token, or a limit that is not above 0.
    """
    colour = _colours(limit)
    spans = []
    for index, (token, value) in enumerate(zip(tokens, values, strict=True)):
        style = f"background:{to_hex(colour(value))}" if np.isfinite(value) else "color:#595959"
        style += ";outline:2px solid #000" if index == marked else ""
        title = f"{signed(value, 3)} logits" if np.isfinite(value) else "no value"
        spans.append(f'<span style="{style}" title="{title}">{html.escape(_shown(token))}</span>')
    around = "background:#fff;color:#000;padding:0.6em;line-height:1.7"
    text = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere"
    return f'<div style="{around}"><div style="{text}">{"".join(spans)}</div>{_legend(limit)}</div>'


def _legend(limit: float) -> str:
    ends = ",".join(to_hex(COLOURS(place)) for place in np.linspace(0, 1, 9))
    bar = f"display:inline-block;width:9em;height:0.8em;background:linear-gradient(to right,{ends})"
    return (
        f'<div style="font-size:smaller;margin-top:0.5em">{signed(-limit)} <span style="{bar}"></span> '
        f"{signed(limit)} logits. Point at a token to see its value.</div>"
    )


def tokens_figure(
    rows: Mapping[str, tuple[Sequence[str], Sequence[float]]], limit: float, unit: str
) -> Figure:
    """Texts under a heading each, every token on the colour of its value, and a bar that says which is which.

    Args:
        rows: by heading, the texts of the tokens and a value of each; NaN where a token has none.
        limit: the value from which on the colours are at their strongest.
        unit: what the values are, beside the bar.

    Raises:
        ValueError: not one value for each token, or a limit that is not above 0.
    """
    colour = _colours(limit)
    placed = {heading: _placed(tokens, values) for heading, (tokens, values) in rows.items()}
    n_lines = sum(pieces[-1][0] + 1 if pieces else 0 for pieces in placed.values()) + 2 * len(placed)
    size = (COLUMNS * ADVANCE + 0.4, n_lines * LINE_HEIGHT + 0.8)
    figure = plt.figure(figsize=size)
    figure.set_layout_engine("none")  # not layout="none", of which nothing is left after the first savefig
    axis = figure.add_axes((0.2 / size[0], 0.7 / size[1], 1 - 0.4 / size[0], n_lines * LINE_HEIGHT / size[1]))
    axis.set(xlim=(0, COLUMNS), ylim=(n_lines, 0))
    axis.axis("off")
    look = {"fontsize": POINTS, "va": "center_baseline", "parse_math": False}
    top = 0.5
    for heading, pieces in placed.items():
        axis.text(0, top + 0.5, heading, fontweight="bold", **look)
        for line, column, piece, value in pieces:
            height = top + 1 + line
            if np.isfinite(value):
                box = {"facecolor": colour(value), "edgecolor": "white", "lw": 0.5}
                axis.add_patch(Rectangle((column, height + 0.04), len(piece), 0.92, **box))
            axis.text(column, height + 0.5, piece, fontfamily="DejaVu Sans Mono", color="black", **look)
        top += 2 + (pieces[-1][0] + 1 if pieces else 0)
    bar = figure.add_axes((0.2 / size[0], 0.5 / size[1], 2.6 / size[0], 0.12 / size[1]))
    figure.colorbar(ScalarMappable(Normalize(-limit, limit), COLOURS), cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=POINTS)
    bar.text(1.04, 0.5, unit, transform=bar.transAxes, fontsize=POINTS, va="center", parse_math=False)
    return figure


def _placed(tokens: Sequence[str], values: Sequence[float]) -> list[tuple[int, int, str, float]]:
    """Line, column, text and value of every token; one too long for the rest of its line is on the next."""
    line = column = 0
    pieces = []
    for token, value in zip(tokens, values, strict=True):
        text = _shown(token)
        if column and column + len(text) > COLUMNS:
            line, column = line + 1, 0
        while text:
            pieces.append((line, column, text[:COLUMNS], value))
            column += len(text[:COLUMNS])
            text = text[COLUMNS:]
            if text:
                line, column = line + 1, 0
    return pieces


def _colours(limit: float):
    if not limit > 0:
        raise ValueError(f"colours need a limit above 0, not {limit}")
    return ScalarMappable(Normalize(-limit, limit), COLOURS).to_rgba


def _shown(token: str) -> str:
    return token.translate(SHOWN)
