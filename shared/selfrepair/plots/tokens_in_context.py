"""Text whose tokens are coloured by a number each: HTML for a notebook, a figure for the results."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from selfrepair.analysis.passages import Passage
from selfrepair.analysis.words import signed

#: Red below 0, white, blue above: told apart by colour-blind readers, and light enough for black text.
COLOURS = ListedColormap(plt.get_cmap("RdBu")(np.linspace(0.2, 0.8, 257)), "light RdBu")
#: Characters that would not be seen.
SHOWN = str.maketrans({"\n": "↵", "\t": "⇥", "\r": None})
#: Of the figure: columns of text, size of a character (inches, in DejaVu Sans Mono of this many points, which
#: is rounded up to whole pixels).
COLUMNS, POINTS = 96, 8
ADVANCE, LINE_HEIGHT = 0.63 * POINTS / 72, 1.75 * POINTS / 72


def passages_html(passages: Sequence[Passage], limit: float) -> str:
    """Texts as HTML, each token on the colour of its value (logits), which is shown when one points at it.

    A passage's marked token has a line around it. From ``limit`` on the colours are at their strongest.

    Raises:
        ValueError: not one value for each token, or a limit that is not above 0.
    """
    colour = _colours(limit)
    text = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere"
    shown = []
    for passage in passages:
        if passage.heading:
            shown.append(f"<div><b>{html.escape(passage.heading)}</b></div>")
        shown.append(f'<div style="{text};margin-bottom:0.6em">{"".join(_spans(passage, colour))}</div>')
    around = "background:#fff;color:#000;padding:0.6em;line-height:1.7"
    return f'<div style="{around}">{"".join(shown)}{_legend(limit)}</div>'


def _spans(passage: Passage, colour: Callable[[float], tuple]) -> Iterator[str]:
    for index, (token, value) in enumerate(zip(passage.tokens, passage.values, strict=True)):
        style = f"background:{to_hex(colour(value))}" if np.isfinite(value) else "color:#595959"
        style += ";outline:2px solid #000" if index == passage.marked else ""
        title = f"{signed(value, 3)} logits" if np.isfinite(value) else "no value"
        yield f'<span style="{style}" title="{title}">{html.escape(_shown(token))}</span>'


def _legend(limit: float) -> str:
    ends = ",".join(to_hex(COLOURS(place)) for place in np.linspace(0, 1, 9))
    bar = f"display:inline-block;width:9em;height:0.8em;background:linear-gradient(to right,{ends})"
    return (
        f'<div style="font-size:smaller;margin-top:0.5em">{signed(-limit)} <span style="{bar}"></span> '
        f"{signed(limit)} logits. Point at a token to see its value.</div>"
    )


def passages_figure(passages: Sequence[Passage], limit: float, unit: str) -> Figure:
    """The same as a figure, with a bar that says which colour is which value, and of what: the ``unit``.

    Raises:
        ValueError: as :func:`passages_html`.
    """
    colour = _colours(limit)
    placed = [(passage, _placed(passage)) for passage in passages]
    n_lines = sum(pieces[-1].line + 1 if pieces else 0 for _, pieces in placed) + 2 * len(placed)
    size = (COLUMNS * ADVANCE + 0.4, n_lines * LINE_HEIGHT + 0.8)
    figure = plt.figure(figsize=size)
    figure.set_layout_engine("none")  # not layout="none", of which nothing is left after the first savefig
    axis = figure.add_axes((0.2 / size[0], 0.7 / size[1], 1 - 0.4 / size[0], n_lines * LINE_HEIGHT / size[1]))
    axis.set(xlim=(0, COLUMNS), ylim=(n_lines, 0))
    axis.axis("off")
    look: dict[str, Any] = {"fontsize": POINTS, "va": "center_baseline", "parse_math": False}
    top = 0.5
    for passage, pieces in placed:
        axis.text(0, top + 0.5, passage.heading, fontweight="bold", **look)
        for piece in pieces:
            height, is_marked = top + 1 + piece.line, piece.index == passage.marked
            value = float(passage.values[piece.index])
            box: dict[str, Any] = {
                "facecolor": colour(value) if np.isfinite(value) else "none",
                "edgecolor": "white",
                "lw": 0.5,
            }
            if is_marked:
                box |= {"edgecolor": "black", "lw": 1.4, "zorder": 2}
            if is_marked or np.isfinite(value):
                axis.add_patch(Rectangle((piece.column, height + 0.04), len(piece.text), 0.92, **box))
            font: dict[str, Any] = {"fontfamily": "DejaVu Sans Mono", "color": "black", "zorder": 3}
            axis.text(piece.column, height + 0.5, piece.text, **font, **look)
        top += 2 + (pieces[-1].line + 1 if pieces else 0)
    bar = figure.add_axes((0.2 / size[0], 0.5 / size[1], 2.6 / size[0], 0.12 / size[1]))
    scale = ScalarMappable(Normalize(-limit, limit), COLOURS)
    figure.colorbar(scale, cax=bar, orientation="horizontal", extend="both")  # values may lie beyond the ends
    bar.xaxis.set_major_locator(MaxNLocator(4))
    bar.tick_params(labelsize=POINTS)
    figure.text(2.9 / size[0], 0.56 / size[1], unit, fontsize=POINTS, va="center", parse_math=False)
    return figure


@dataclass(frozen=True)
class _Piece:
    """A token, or what there is room for of it, and where it stands."""

    index: int
    text: str
    line: int
    column: int


def _placed(passage: Passage) -> list[_Piece]:
    """Every token in its place; one too long for the rest of its line is on the next."""
    line = column = 0
    pieces = []
    for index, (token, _) in enumerate(zip(passage.tokens, passage.values, strict=True)):
        text = _shown(token)
        if column and column + len(text) > COLUMNS:
            line, column = line + 1, 0
        while text:
            pieces.append(_Piece(index, text[:COLUMNS], line, column))
            column += len(text[:COLUMNS])
            text = text[COLUMNS:]
            if text:
                line, column = line + 1, 0
    return pieces


def _colours(limit: float) -> Callable[..., Any]:
    """From a value to its colour."""
    if not limit > 0:
        raise ValueError(f"colours need a limit above 0, not {limit}")
    return ScalarMappable(Normalize(-limit, limit), COLOURS).to_rgba


def _shown(token: str) -> str:
    return token.translate(SHOWN)
