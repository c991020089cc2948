"""Values with bootstrap samples: intervals, arithmetic that keeps samples together, and one form of table."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.lib.array_utils import normalize_axis_tuple

from selfrepair.statistics import bootstrap_weights

#: On which side of a value an interval lies; the last: the value is in it.
ABOVE, BELOW, OPEN = "above", "below", "open"

LEVEL = 0.95


class Interval(NamedTuple):
    """Ends of an interval: floats, or arrays ``[*what]`` where the estimate is one."""

    low: Any
    high: Any


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value, or an array of them, and bootstrap samples: ``drawn[..., 0]`` is the value, the rest samples.

    Samples of estimates that are computed from the same :func:`draws` belong together, so that sums and
    ratios of such estimates have the samples that they should. An estimate without samples is a bare number,
    as published; beside one with samples it counts as known exactly.
    """

    drawn: Float[np.ndarray, "*what draw"]

    #: An array on the left of an operator is refused: NumPy would make an array of estimates.
    __array_ufunc__ = None

    @classmethod
    def bare(cls, value: Float[np.ndarray, "*what"] | float) -> Estimate:
        """A value of which there are no samples."""
        return cls(np.asarray(value, dtype=np.float64)[..., None])

    @classmethod
    def stack(cls, parts: Sequence[Estimate]) -> Estimate:
        """Estimates of the same shape and draws, along a new first axis."""
        return cls(np.stack([part.drawn for part in parts]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of ``what``; ``()`` for a single value."""
        return self.drawn.shape[:-1]

    @property
    def value(self) -> Any:
        """A float, or an array ``[*what]``."""
        return self.drawn[..., 0] if self.drawn.ndim > 1 else float(self.drawn[0])

    @property
    def samples(self) -> Float[np.ndarray, "*what sample"]:
        return self.drawn[..., 1:]

    def interval(self, level: float = LEVEL) -> Interval:
        """Percentile interval; undefined samples are left out, and without any its ends are NaN."""
        if not self.samples.shape[-1]:
            nothing = np.full(self.shape, np.nan)
            return Interval(nothing, nothing)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice")
            low, high = np.nanquantile(self.samples, [(1 - level) / 2, (1 + level) / 2], axis=-1)
        return Interval(low, high)

    def map(self, function: Callable[..., np.ndarray], *others: Estimate) -> Estimate:
        """``function`` of the arrays, which must leave their last axis alone."""
        return Estimate(np.asarray(function(self.drawn, *(other.drawn for other in others))))

    def mean(self, axis: int | tuple[int, ...] = 0) -> Estimate:
        """Over axes of ``what``."""
        return Estimate(self.drawn.mean(self._axes(axis)))

    def sum(self, axis: int | tuple[int, ...] = 0) -> Estimate:
        """Over axes of ``what``."""
        return Estimate(self.drawn.sum(self._axes(axis)))

    def nanmean(self, axis: int | tuple[int, ...] = 0) -> Estimate:
        """Over axes of ``what``, without what is undefined; NaN where nothing is defined."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mean of empty slice")
            return Estimate(np.nanmean(self.drawn, self._axes(axis)))

    def _axes(self, axis: int | tuple[int, ...]) -> tuple[int, ...]:
        return normalize_axis_tuple(axis, len(self.shape))

    def __getitem__(self, index: object) -> Estimate:
        """Some of ``what``."""
        if not self.shape:
            raise TypeError("an estimate of a single value has no parts")
        return Estimate(self.drawn[(*index, ...) if isinstance(index, tuple) else (index, ...)])

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an estimate of a single value has no length")
        return self.shape[0]

    def __add__(self, other: Estimate | Float[np.ndarray, "*what"] | float) -> Estimate:
        return Estimate(self.drawn + _drawn(other))

    def __sub__(self, other: Estimate | Float[np.ndarray, "*what"] | float) -> Estimate:
        return Estimate(self.drawn - _drawn(other))

    def __mul__(self, other: Estimate | Float[np.ndarray, "*what"] | float) -> Estimate:
        return Estimate(self.drawn * _drawn(other))

    def __truediv__(self, other: Estimate | Float[np.ndarray, "*what"] | float) -> Estimate:
        """NaN where the divisor is 0."""
        divisor = _drawn(other)
        return Estimate(self.drawn / np.where(divisor == 0, np.nan, divisor))

    def table(self, labels: Mapping[str, Sequence[object]], **constant: object) -> pd.DataFrame:
        """One row for each of ``what``: constant columns, labels by axis, ``estimate``, ``low``, ``high``.

        ``labels`` are one for each place along each axis of ``what``, in order of the axes.
        """
        low, high = self.interval()
        places = list(itertools.product(*labels.values()))
        by_label = {name: [place[axis] for place in places] for axis, name in enumerate(labels)}
        values = {"estimate": np.ravel(self.value), "low": np.ravel(low), "high": np.ravel(high)}
        return pd.DataFrame({**constant, **by_label, **values}, index=range(len(places)))


def _drawn(value: Estimate | Float[np.ndarray, "*what"] | float) -> Float[np.ndarray, "*what draw"]:
    return value.drawn if isinstance(value, Estimate) else np.asarray(value, dtype=np.float64)[..., None]


def draws(n_prompts: int, n_bootstrap: int = 1000, seed: int = 0) -> Float[np.ndarray, "draw prompt"]:
    """How often each prompt counts: once for the estimate, then as drawn with replacement."""
    return np.concatenate([np.ones((1, n_prompts)), bootstrap_weights(n_prompts, n_bootstrap, seed)])


def mean_over_prompts(
    per_prompt: Float[np.ndarray, "*what prompt"], n_bootstrap: int = 1000, seed: int = 0
) -> Estimate:
    """Mean over the last axis; samples draw whole prompts."""
    n_prompts = per_prompt.shape[-1]
    return Estimate(per_prompt @ draws(n_prompts, n_bootstrap, seed).T / n_prompts)


def selected_means(
    values: Float[np.ndarray, "*what prompt position"],
    chosen: Bool[np.ndarray, "*what prompt position"],
    weights: Float[np.ndarray, "draw prompt"],
) -> Estimate:
    """Means over chosen tokens when whole prompts are drawn; NaN where a draw has none of them."""
    totals = Estimate(np.where(chosen, values, 0).sum(-1) @ weights.T)
    return totals / Estimate(chosen.sum(-1) @ weights.T)


def sides_of(table: pd.DataFrame, value: float = 0.0) -> pd.Series:
    """On which side of ``value`` the interval ``low`` to ``high`` of each row lies."""
    sides = np.select([table["low"] > value, table["high"] < value], [ABOVE, BELOW], OPEN)
    return pd.Series(sides, index=table.index)
