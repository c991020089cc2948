"""What ablating each layer does, over prompts: means of ``layers``, with bootstrap samples.

Components are numbered in order of depth: attention ``2 l`` and MLP ``2 l + 1`` of layer ``l``. All
quantities are defined in :mod:`selfrepair.measure.layers` (McGrath et al. 2023, §2), in logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from selfrepair.analysis.estimates import Estimate, draws
from selfrepair.statistics import later_half

#: A downstream component is touched if it changes by more than this share of the direct effect.
COUPLED = 0.1
#: Logits that are no change: float32 passes stacked differently differ by as much.
ROUNDING = 1e-5
PARTS = ("attention", "MLP")
#: What each ablated component has one of for each prompt.
BY_COMPONENT = ("direct_effect", "total_effect", "norm_term", "compensation")
#: Prompts' variance of a direct effect (logits²) below which there is no slope on it.
NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class LateMlps:
    """The late MLPs' summed change when an attention layer below is ablated, and its direct effect."""

    change: Estimate
    direct_effect: Estimate


@dataclass(frozen=True)
class LayerMeans:
    """Means over prompts (logits), by component.

    ``change`` and ``absolute_change`` are by ablated and observed component. ``absolute_change`` and ``absolute_direct_effect`` are means of absolute values, so that changes of either
    sign count; ``slope`` is that of compensation on direct effect over prompts (least squares, with
    intercept). ``downstream`` says which components lie downstream of which.
    """

    model_name: str
    n_prompts: int
    downstream: Bool[np.ndarray, "component observed"]
    effect: Estimate
    direct_effect: Estimate
    total_effect: Estimate
    norm_term: Estimate
    compensation: Estimate
    slope: Estimate
    absolute_direct_effect: Estimate
    change: Estimate
    absolute_change: Estimate

    @classmethod
    def of(
        cls,
        effects: xr.Dataset,
        only: Bool[np.ndarray, " prompt"] | None = None,
        n_bootstrap: int = 1000,
        seed: int = 0,
    ) -> LayerMeans:
        """Of the measurement ``layers``, or ``only`` of some of its prompts."""
        if only is not None:
            effects = effects.isel(prompt=np.flatnonzero(only))
        n = effects.sizes["prompt"]
        weights = draws(n, n_bootstrap, seed) / n
        value = {
            name: effects[name].transpose(..., "prompt").values.astype(np.float64)
            for name in ("effect", "change", *BY_COMPONENT)
        }
        return cls(
            model_name=str(effects.attrs["model"]),
            n_prompts=n,
            downstream=effects["downstream"].values,
            slope=_slope(value["direct_effect"], value["compensation"], weights),
            absolute_direct_effect=Estimate(np.abs(value["direct_effect"]) @ weights.T),
            absolute_change=Estimate(np.abs(value["change"]) @ weights.T),
            **{name: Estimate(of_prompts @ weights.T) for name, of_prompts in value.items()},
        )

    @property
    def n_layers(self) -> int:
        return len(self.effect) // 2

    def attention_later_half(self) -> Int[np.ndarray, " chosen"]:
        """Attention components of the later half of the layers."""
        return np.arange(2 * later_half(self.n_layers), 2 * self.n_layers, 2)

    def later_attention(self) -> Int[np.ndarray, " chosen"]:
        """Those that have attention above."""
        return self.attention_later_half()[:-1]

    def late_mlps(self) -> Int[np.ndarray, " chosen"]:
        """MLP components of the last third of the layers, at least of the last."""
        first = min(round(2 / 3 * self.n_layers), self.n_layers - 1)
        return np.arange(2 * first + 1, 2 * self.n_layers, 2)

    def attention_with_downstream(self) -> Int[np.ndarray, " chosen"]:
        """Attention components with any component downstream; none in a model of one parallel block."""
        return 2 * np.flatnonzero(self.downstream[::2].any(1))

    def attention_below_late_mlps(self) -> Int[np.ndarray, " chosen"]:
        """Attention components below all of :meth:`late_mlps`; none in a model of one parallel block."""
        return 2 * np.flatnonzero(self.downstream[::2, self.late_mlps()[0]])

    def strongest_below_late_mlps(self) -> Int[np.ndarray, " draw"]:
        """That of these with the largest mean direct effect, for each draw anew."""
        attention = self.attention_below_late_mlps()
        return attention[self.direct_effect[attention].drawn.argmax(0)]

    def late_mlps_ablated(self) -> LateMlps:
        """With that component ablated."""
        strongest, draw = self.strongest_below_late_mlps(), np.arange(self.effect.drawn.shape[-1])
        change = self.change.drawn[strongest[None], self.late_mlps()[:, None], draw[None]].sum(0)
        return LateMlps(Estimate(change), Estimate(self.direct_effect.drawn[strongest, draw]))

    def coupling(self, share: float = COUPLED) -> Estimate:
        """By layer, the share of the components downstream of its attention that an ablation touches.

        Touched is what changes by more than ``share`` of the attention's direct effect (means of absolute
        values); NaN where nothing is downstream.
        """
        below = self.downstream[::2]
        threshold = np.maximum(share * self.absolute_direct_effect.drawn[::2, None], ROUNDING)
        touched = Estimate(
            ((self.absolute_change.drawn[::2] > threshold) & below[..., None]).astype(np.float64)
        )
        return touched.sum(1) / below.sum(1).astype(np.float64)

    def compensation_share(self) -> Estimate:
        """Compensation over direct effect, both summed over :meth:`later_attention`; NaN without any."""
        later = self.later_attention()
        return self.compensation[later].sum() / self.direct_effect[later].sum()

    def by_layer(self) -> pd.DataFrame:
        """``model, part, layer, quantity, estimate, low, high`` of all quantities of components."""
        tables = []
        for quantity in ("effect", *BY_COMPONENT, "slope"):
            table = getattr(self, quantity).table(
                {"component": range(2 * self.n_layers)}, model=self.model_name
            )
            layer, is_mlp = np.divmod(table["component"].to_numpy(), 2)
            tables.append(table.assign(part=np.array(PARTS)[is_mlp], layer=layer, quantity=quantity))
        columns = ["model", "part", "layer", "quantity", "estimate", "low", "high"]
        return pd.concat(tables, ignore_index=True)[columns]


def _slope(
    x: Float[np.ndarray, "component prompt"],
    y: Float[np.ndarray, "component prompt"],
    weights: Float[np.ndarray, "draw prompt"],
) -> Estimate:
    """Of ``y`` on ``x`` by least squares; NaN where ``x`` does not vary. ``weights`` sum to 1."""
    mean = x @ weights.T
    covariance = (x * y) @ weights.T - mean * (y @ weights.T)
    variance = (x * x) @ weights.T - mean**2
    undefined = np.full_like(variance, np.nan)
    return Estimate(np.divide(covariance, variance, out=undefined, where=variance > NO_VARIANCE))
