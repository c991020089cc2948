"""What chance makes of a trend over layers: the same layers in any order."""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float, Int

from selfrepair.analysis.estimates import Estimate

#: What share of the orders the control is at least as large as.
LEVEL = 0.95
#: All orders of up to so many layers are taken, of more layers so many random ones.
LAYERS_IN_FULL, N_RANDOM = 8, 5000
#: Values that differ by less are the same order, read the other way round.
ROUNDING = 1e-12


def layer_orders(n_layers: int, seed: int = 0) -> Int[np.ndarray, "order layer"]:
    """Which layer stands at each depth: all orders, or of many layers :data:`N_RANDOM`, by ``seed``."""
    if n_layers <= LAYERS_IN_FULL:
        return np.array(list(itertools.permutations(range(n_layers))))
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.permuted(np.tile(np.arange(n_layers), (N_RANDOM, 1)), axis=1)


def end_of_orders(weights: Float[np.ndarray, "order part"], parts: Estimate) -> Estimate:
    """The smallest value that 95% of the orders do not exceed, in each sample.

    In an order the statistic is the sum of ``parts [part]`` by its ``weights``. NaN where no order has a
    larger value, as with few layers: then the true order cannot lie above it, whatever it is.
    """
    kinds, times = np.unique(weights, axis=0, return_counts=True)
    found = []
    for drawn in parts.drawn.T:
        values = kinds @ drawn
        order = np.argsort(values)
        end = values[order[np.searchsorted(np.cumsum(times[order]), LEVEL * times.sum())]]
        found.append(end if values.max() > end + ROUNDING else np.nan)
    return Estimate(np.array(found))
