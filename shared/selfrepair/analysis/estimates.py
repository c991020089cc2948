"""Values with bootstrap samples of them: intervals, arithmetic that keeps samples together, and one form of table."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from selfrepair.statistics import bootstrap_weights

LEVEL = 0.95


class Interval(NamedTuple):
    """Ends of an interval; arrays where the estimate is one."""

    low: Float[np.ndarray, "*what"] | float
    high: Float[np.ndarray, "*what"] | float


@dataclass(frozen=True)
class Estimate:
    """A value, or an array of them, and bootstrap samples: ``drawn[..., 0]`` is the value, the rest samples.

    Samples of estimates that are computed from the same :func:`draws` belong together, so that sums and ratios
    of such estimates have the samples that they should. An estimate without samples is a bare number, as published.
    """

    drawn: Float[np.ndarray, "*what draw"]

    @classmethod
    def bare(cls, value: Float[np.ndarray, "*what"] | float) -> Estimate:
        """A value of which there are no samples."""
        return cls(np.asarray(value, dtype=np.float64)[..., None])

    @property
    def value(self) -> Float[np.ndarray, "*what"] | float:
        return self.drawn[..., 0]

    @property
    def samples(self) -> Float[np.ndarray, "*what sample"]:
        return self.drawn[..., 1:]

    def interval(self, level: float = LEVEL) -> Interval:
        """Percentile interval; undefined samples are left out, and without any its ends are NaN."""
        if not self.samples.shape[-1]:
            nothing = np.full(np.shape(self.value), np.nan)
            return Interval(nothing, nothing)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice")
            low, high = np.nanquantile(self.samples, [(1 - level) / 2, (1 + level) / 2], axis=-1)
        return Interval(low, high)

    def map(self, function: Callable[..., np.ndarray], *others: Estimate) -> Estimate:
        """``function`` of the arrays, which must leave their last axis alone."""
        return Estimate(np.asarray(function(self.drawn, *(other.drawn for other in others))))

    def mean(self, axis: int | tuple[int, ...] = 0) -> Estimate:
        """Over axes of ``what``, which are counted from 0."""
        return self.map(lambda drawn: drawn.mean(axis))

    def sum(self, axis: int | tuple[int, ...] = 0) -> Estimate:
        """Over axes of ``what``, which are counted from 0."""
        return self.map(lambda drawn: drawn.sum(axis))

    def __getitem__(self, index: object) -> Estimate:
        """Some of ``what``."""
        return Estimate(self.drawn[(*index, ...) if isinstance(index, tuple) else (index, ...)])

    def __len__(self) -> int:
        return len(self.drawn)

    def __add__(self, other: Estimate | float) -> Estimate:
        return Estimate(self.drawn + _drawn(other))

    def __sub__(self, other: Estimate | float) -> Estimate:
        return Estimate(self.drawn - _drawn(other))

    def __mul__(self, other: Estimate | float) -> Estimate:
        return Estimate(self.drawn * _drawn(other))

    def __truediv__(self, other: Estimate | float) -> Estimate:
        """NaN where the divisor is 0."""
        divisor = np.asarray(_drawn(other))
        return Estimate(self.drawn / np.where(divisor == 0, np.nan, divisor))

    def table(self, labels: Mapping[str, Sequence[object]], **constant: object) -> pd.DataFrame:
        """One row for each of ``what``: constant columns, its label along each axis, ``estimate``, ``low``, ``high``."""
        low, high = self.interval()
        columns = (np.ravel(self.value), np.ravel(low), np.ravel(high))
        frame = pd.DataFrame(list(itertools.product(*labels.values())), columns=list(labels)) if labels else pd.DataFrame(index=[0])
        for name, values in zip(("estimate", "low", "high"), columns, strict=True):
            frame[name] = values
        return frame.assign(**constant)[[*constant, *labels, "estimate", "low", "high"]]


def _drawn(value: Estimate | float) -> np.ndarray | float:
    return value.drawn if isinstance(value, Estimate) else value


def draws(n_prompts: int, n_bootstrap: int = 1000, seed: int = 0) -> Float[np.ndarray, "draw prompt"]:
    """How often each prompt counts: once for the estimate, then as drawn with replacement."""
    return np.concatenate([np.ones((1, n_prompts)), bootstrap_weights(n_prompts, n_bootstrap, seed)])


def later_half(n_layers: int) -> int:
    """First layer of the later half."""
    return round(0.5 * n_layers)
