"""Do neighbours write alike? Mean cosines between outputs of heads, by how many layers they are apart."""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Float

from selfrepair.analysis.estimates import Estimate, mean_over_prompts


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
    return mean_over_prompts(_apart(cosines, 1, 1) - _apart(cosines, 3, n_layers), n_bootstrap, seed)


def _apart(cosines: xr.Dataset, least: int, most: int) -> Float[np.ndarray, " prompt"]:
    """Per prompt, the mean over pairs of heads whose layers are ``least`` to ``most`` apart."""
    layer = np.arange(cosines.sizes["layer"])
    distance = np.abs(layer[:, None] - layer)
    return cosines["layers"].values[(distance >= least) & (distance <= most)].mean(0)
