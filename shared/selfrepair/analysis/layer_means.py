"""What ablating each layer does, over prompts: means of ``layers``, with bootstrap samples.

Components are numbered in order of depth: attention ``2 l`` and MLP ``2 l + 1`` of layer ``l``. All
quantities are defined in :mod:`selfrepair.measure.layer_ablation` (McGrath et al. 2023, §2 and §4), in
logits.
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
#: Prompts' variance (logits²) below which there is no line through them.
NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class Fit:
    """A line of least squares, with intercept, over prompts.

    ``r_squared`` is the share of variance that it explains, with the sign of the slope.
    """

    slope: Estimate
    r_squared: Estimate


@dataclass(frozen=True)
class LayerMeans:
    """Means over prompts (logits), by component.

    ``centred_effect`` is the unembedding-based effect of the output less its mean over donors, which is the
    direct effect against them. ``unembedding_larger`` is the share of prompts on which the unembedding-based
    effect is above the ablation-based one; ``agreement`` the fit of the latter on the former;
    ``compensation_fit`` that of compensation on the direct effect. ``change`` and ``absolute_change`` are by
    ablated and observed component; ``absolute_…`` are means of absolute values, so that changes of either
    sign count. ``downstream`` says which components lie downstream of which.
    """

    model_name: str
    n_prompts: int
    downstream: Bool[np.ndarray, "component observed"]
    effect: Estimate
    direct_effect: Estimate
    total_effect: Estimate
    norm_term: Estimate
    compensation: Estimate
    unembedding_larger: Estimate
    agreement: Fit
    compensation_fit: Fit
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
        """Of a measurement of layers, or ``only`` of some of its prompts, with the draws of all of them."""
        n = effects.sizes["prompt"]
        only = np.ones(n, dtype=bool) if only is None else only
        weights = draws(n, n_bootstrap, seed) * only
        total = weights.sum(1, keepdims=True)
        weights = weights / np.where(total == 0, np.nan, total)  # a draw may have none of the prompts
        value = {
            name: effects[name].transpose(..., "prompt").values.astype(np.float64)
            for name in ("effect", "change", *BY_COMPONENT)
        }
        return cls(
            model_name=str(effects.attrs["model"]),
            n_prompts=int(only.sum()),
            downstream=effects["downstream"].values,
            unembedding_larger=Estimate((value["effect"] > value["total_effect"]) @ weights.T),
            agreement=_fit(value["effect"], value["total_effect"], weights),
            compensation_fit=_fit(value["direct_effect"], value["compensation"], weights),
            absolute_direct_effect=Estimate(np.abs(value["direct_effect"]) @ weights.T),
            absolute_change=Estimate(np.abs(value["change"]) @ weights.T),
            **{name: Estimate(of_prompts @ weights.T) for name, of_prompts in value.items()},
        )

    @property
    def n_layers(self) -> int:
        return len(self.effect) // 2

    def compensation_by(self, part: str) -> Estimate:
        """Compensation by attention layers alone, or by MLPs: the two sum to ``compensation``."""
        return self.change[:, PARTS.index(part) :: 2].sum(1)

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

    def with_downstream(self, part: str) -> Int[np.ndarray, " chosen"]:
        """Components of a part with any component downstream; attention of one parallel block has none."""
        components = np.arange(PARTS.index(part), 2 * self.n_layers, 2)
        return components[self.downstream[components].any(1)]

    def attention_below(self, component: int) -> Int[np.ndarray, " chosen"]:
        """Attention components that this one lies downstream of."""
        return 2 * np.flatnonzero(self.downstream[::2, component])

    def coupling(self, part: str, share: float = COUPLED) -> Estimate:
        """By layer, the share of a part's components downstream of its attention that an ablation touches.

        Touched is what changes by more than ``share`` of the attention's direct effect (means of absolute
        values); NaN where nothing is downstream.
        """
        return self._beyond(self.absolute_change[::2, PARTS.index(part) :: 2], part, share)

    def coupling_if_replaced(self, part: str, share: float = COUPLED) -> Estimate:
        """The same if each component downstream changed as much as when it is itself ablated.

        That is what layers would do that follow all that comes before them.
        """
        own = Estimate(self.absolute_direct_effect.drawn[None, PARTS.index(part) :: 2])
        return self._beyond(own, part, share)

    def _beyond(self, change: Estimate, part: str, share: float) -> Estimate:
        below = self.downstream[::2, PARTS.index(part) :: 2]
        threshold = np.maximum(share * self.absolute_direct_effect.drawn[::2, None], ROUNDING)
        touched = (change.drawn > threshold) & below[..., None]
        return Estimate(touched.astype(np.float64)).sum(1) / below.sum(1).astype(np.float64)

    def compensation_share(self) -> Estimate:
        """Compensation over direct effect, both summed over :meth:`later_attention`; NaN without any."""
        later = self.later_attention()
        return self.compensation[later].sum() / self.direct_effect[later].sum()

    def by_layer(self, **constant: object) -> pd.DataFrame:
        """``model, part, layer, quantity, estimate, low, high`` of all quantities of components."""
        quantities = {name: getattr(self, name) for name in ("effect", *BY_COMPONENT, "unembedding_larger")}
        quantities |= {
            "compensation_by_attention": self.compensation_by("attention"),
            "compensation_by_mlps": self.compensation_by("MLP"),
            "agreement_r_squared": self.agreement.r_squared,
            "compensation_slope": self.compensation_fit.slope,
            "compensation_r_squared": self.compensation_fit.r_squared,
        }
        tables = []
        for quantity, estimate in quantities.items():
            table = estimate.table({"component": range(2 * self.n_layers)}, model=self.model_name)
            layer, is_mlp = np.divmod(table["component"].to_numpy(), 2)
            tables.append(table.assign(part=np.array(PARTS)[is_mlp], layer=layer, quantity=quantity))
        columns = ["model", *constant, "part", "layer", "quantity", "estimate", "low", "high"]
        return pd.concat(tables, ignore_index=True).assign(**constant)[columns]


def _fit(
    x: Float[np.ndarray, "component prompt"],
    y: Float[np.ndarray, "component prompt"],
    weights: Float[np.ndarray, "draw prompt"],
) -> Fit:
    """Of ``y`` on ``x``; NaN where either does not vary. ``weights`` sum to 1."""
    mean_x, mean_y = x @ weights.T, y @ weights.T
    covariance = (x * y) @ weights.T - mean_x * mean_y
    variance_x, variance_y = (x * x) @ weights.T - mean_x**2, (y * y) @ weights.T - mean_y**2
    varies_x, varies_y = variance_x > NO_VARIANCE, variance_y > NO_VARIANCE
    undefined = np.full_like(covariance, np.nan)
    slope = np.divide(covariance, variance_x, out=undefined.copy(), where=varies_x)
    product = variance_x * variance_y
    signed = covariance * np.abs(covariance)
    return Fit(
        Estimate(slope), Estimate(np.divide(signed, product, out=undefined, where=varies_x & varies_y))
    )
