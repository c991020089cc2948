"""Numbers as text has them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def number(value: float, digits: int = 2) -> str:
    """``-0.118`` → ``−0.12``, without a sign where it is rounded to 0.

    Raises:
        ValueError: not a number, or infinite: there is nothing to say.
    """
    if not np.isfinite(value):
        raise ValueError(f"{value} cannot be said in a sentence")
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def span(values: Iterable[float], digits: int = 2) -> str:
    """The least and the largest: ``0.11 to 0.17``, or one number if they are alike when rounded.

    Raises:
        ValueError: as :func:`number`, or no values.
    """
    found = np.asarray(list(values), dtype=float)
    low, high = number(found.min(), digits), number(found.max(), digits)
    return low if low == high else f"{low} to {high}"
