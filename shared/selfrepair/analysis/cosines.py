"""Do neighbours write alike? Mean cosines between outputs of heads, by how many layers they are apart."""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from selfrepair.analysis.estimates import Estimate, mean_over_prompts
from selfrepair.analysis.layer_orders import end_of_orders, layer_orders

#: How far apart, in layers, heads are at least that are called distant.
DISTANT = 3


def head_cosines(cosines: xr.Dataset) -> Float[np.ndarray, "any_head any_head"]:
    """Mean over all tokens, signed, between every two heads, in order of layer, then head.

    ``cosines`` is what :class:`selfrepair.measure.cosines.Cosines` measured of a model.
    """
    return cosines["heads_sum"].values.sum(0) / cosines.sizes["prompt"]


def cosine_by_distance(cosines: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """``[layers_apart]``: mean signed cosine over all pairs of heads whose layers are 0, 1, 2 … apart."""
    apart = [_apart(cosines, distance, distance) for distance in range(cosines.sizes["layer"])]
    return mean_over_prompts(np.stack(apart), n_bootstrap, seed)


def neighbours_minus_distant(cosines: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Mean signed cosine between heads of neighbouring layers minus that of layers at least three apart."""
    n_layers = cosines.sizes["layer"]
    return mean_over_prompts(_apart(cosines, 1, 1) - _apart(cosines, DISTANT, n_layers), n_bootstrap, seed)


def neighbours_in_random_order(cosines: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """What :func:`neighbours_minus_distant` does not exceed in 95% of all orders of the layers.

    NaN with four layers, as :func:`end_of_orders` says.
    """
    n_layers = cosines.sizes["layer"]
    near, far = (_is_apart(n_layers, *ends) for ends in ((1, 1), (DISTANT, n_layers)))
    depth = np.argsort(layer_orders(n_layers), axis=1)
    weights = (near / near.sum() - far / far.sum())[depth[:, :, None], depth[:, None, :]]
    layers = mean_over_prompts(cosines["layers"].values.reshape(n_layers**2, -1), n_bootstrap, seed)
    return end_of_orders(weights.reshape(len(depth), -1), layers)


def _apart(cosines: xr.Dataset, least: int, most: int) -> Float[np.ndarray, " prompt"]:
    """Per prompt, the mean over pairs of heads whose layers are ``least`` to ``most`` apart."""
    return cosines["layers"].values[_is_apart(cosines.sizes["layer"], least, most)].mean(0)


def _is_apart(n_layers: int, least: int, most: int) -> Bool[np.ndarray, "any_layer any_layer"]:
    layer = np.arange(n_layers)
    distance = np.abs(layer[:, None] - layer)
    return (distance >= least) & (distance <= most)
