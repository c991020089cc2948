"""One layer earlier: do heads change alike with the previous layer's input and when it lacks a head?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.estimates import Estimate, draws

#: So many times as many heads do one thing as another are said to be far more. Chosen after looking.
FAR_MORE = 1.5


@dataclass(frozen=True)
class MeanChanges:
    """Of direct effects (logits), ``[later_layer, head]``: fed the earlier input, and under ablation."""

    earlier: Estimate
    ablated: Estimate


def mean_changes(changes: xr.Dataset, n_bootstrap: int = 1000, seed: int = 0) -> MeanChanges:
    """Of a model's ``earlier_input``, over the tokens it was summed over; samples draw whole prompts."""
    weights = draws(changes.sizes["prompt"], n_bootstrap, seed).T
    counts = (changes["count"].values @ weights)[:, None]
    return MeanChanges(
        *(Estimate(changes[name].values @ weights) / Estimate(counts) for name in ("earlier", "ablated"))
    )


def correlation(changes: MeanChanges) -> Estimate:
    """Pearson's correlation over all heads; NaN where a sample has no token of some layer."""
    x, y = (
        drawn.reshape(-1, drawn.shape[-1]) - drawn.mean((0, 1))
        for drawn in (changes.earlier.drawn, changes.ablated.drawn)
    )
    return Estimate((x * y).sum(0) / np.sqrt((x * x).sum(0) * (y * y).sum(0)))


def changes_table(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Of every model's ``earlier_input``: how the two changes of its heads go together.

    ``correlation`` with its interval ``low`` to ``high``; how many of the ``heads`` write more of the correct
    token both times and how many less, and which of the two ``most`` do, ``more`` or ``less``:
    :data:`FAR_MORE` times as many as the other, else ``neither``. ``size``: the mean absolute change under
    ablation over that with the earlier input.
    """
    rows = []
    for model_name, changes in found.items():
        means = mean_changes(changes)
        earlier, ablated = means.earlier.value, means.ablated.value
        r = correlation(means)
        low, high = r.interval()
        more, less = (int(((s * earlier > 0) & (s * ablated > 0)).sum()) for s in (1, -1))
        most = "more" if more > FAR_MORE * less else "less" if less > FAR_MORE * more else "neither"
        rows.append(
            {
                "model": model_name,
                "heads": earlier.size,
                "more both times": more,
                "less both times": less,
                "most": most,
                "size": np.abs(ablated).mean() / np.abs(earlier).mean(),
                "correlation": float(r.value),
                "low": float(low),
                "high": float(high),
            }
        )
    return pd.DataFrame(rows).set_index("model")
