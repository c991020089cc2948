"""Numbers as text and tables have them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd


def number(value: float, digits: int = 2) -> str:
    """``-0.118`` → ``−0.12``, without a sign where it is rounded to 0.

    Raises:
        ValueError: not a number, or infinite: there is nothing to say.
    """
    if not np.isfinite(value):
        raise ValueError(f"{value} cannot be said in a sentence")
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def or_dash(value: float, digits: int = 2) -> str:
    """:func:`number`, or – where there is none."""
    return number(value, digits) if np.isfinite(value) else "–"


def signed(value: float, digits: int = 2) -> str:
    """:func:`number` with its sign, ``+`` too.

    Raises:
        ValueError: as :func:`number`.
    """
    said = number(value, digits)
    return said if said.startswith("−") else f"+{said}"


def span(values: Iterable[float], digits: int = 2) -> str:
    """The least and the largest: ``0.11 to 0.17``, or one number if they are alike when rounded.

    Raises:
        ValueError: as :func:`number`, or no values.
    """
    found = np.asarray(list(values), dtype=float)
    low, high = number(found.min(), digits), number(found.max(), digits)
    return low if low == high else f"{low} to {high}"


def significant(value: float, digits: int = 2) -> str:
    """So many significant digits: ``0.0349`` → ``0.035``, ``-1.02`` → ``−1.0``, ``1234.0`` → ``1234``."""
    text = f"{value:#.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:.0f}"
    return text.replace("-", "−").removesuffix(".")


def table_html(table: pd.DataFrame, digits: int = 2) -> str:
    """A table for a notebook: so many significant digits, – where there is no number.

    The index is shown if it has a name.
    """
    shown = table.rename_axis(columns=None)
    if table.index.name is not None:
        shown = shown.reset_index()
    return shown.to_html(
        index=False, na_rep="–", border=0, float_format=lambda value: significant(value, digits)
    )
