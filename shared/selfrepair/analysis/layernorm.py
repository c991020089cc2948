"""What the final norm repairs, what other parts do, and how much of that depends on the way of counting."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.estimates import Estimate, draws, selected_means
from selfrepair.analysis.head_table import (
    PARTS,
    heads_table,
    select_each_top,
    strongest_head,
    with_self_repair,
)
from selfrepair.statistics import clipped_share, later_half, select_top

WAYS = ("clipped", "unclipped mean", "median", "ratio of means")


@dataclass(frozen=True)
class Breakdown:
    """Self-repair by part over each head's top tokens; samples draw whole prompts.

    ``logits[part]``, ``direct_effect`` (logits) and ``shares[way][part]`` are ``[layer, head]``. Ways of
    counting a part's share of the direct effect: the per-token ratio ``clipped`` to [0, 1] and averaged,
    averaged as it is (``unclipped mean``), its ``median``, and the ``ratio of means`` of a head.
    """

    model: str
    logits: dict[str, Estimate]
    direct_effect: Estimate
    shares: dict[str, dict[str, Estimate]]

    @classmethod
    def of_sweep(cls, sweep: xr.Dataset, fraction: float, n_bootstrap: int = 400, seed: int = 0) -> Breakdown:
        """Tokens whose direct effect is exactly 0 have no ratio: unclipped mean and median leave them out."""
        sweep = with_self_repair(sweep)
        effect = sweep["direct_effect"].values.astype(np.float64)
        chosen = select_each_top(effect, fraction)
        weights = draws(sweep.sizes["prompt"], n_bootstrap, seed)
        values = {part: sweep[f"self_repair_{part}"].values.astype(np.float64) for part in PARTS}
        logits = {part: selected_means(value, chosen, weights) for part, value in values.items()}
        mean_effect = selected_means(effect, chosen, weights)
        shares: dict[str, dict[str, Estimate]] = {way: {} for way in WAYS}
        defined = chosen & (effect != 0)
        for part, value in values.items():
            ratio = np.divide(value, effect, out=np.zeros_like(value), where=defined)
            shares["clipped"][part] = selected_means(np.clip(ratio, 0, 1), chosen, weights)
            shares["unclipped mean"][part] = selected_means(ratio, defined, weights)
            shares["median"][part] = Estimate(_medians(ratio, defined, weights))
            shares["ratio of means"][part] = logits[part] / mean_effect
        return cls(sweep.attrs["model"], logits, mean_effect, shares)

    @classmethod
    def of_table(cls, table: pd.DataFrame) -> Breakdown:
        """Of one model's rows of a heads table, without samples; it has no per-token means and medians."""
        (model,) = table["model"].unique()
        shape = (table["layer"].nunique(), table["head"].nunique())
        ordered = table.sort_values(["layer", "head"])

        def column(name: str) -> Estimate:
            return Estimate.bare(ordered[name].to_numpy().reshape(shape))

        logits = {part: column(f"self_repair_{part}") for part in PARTS}
        effect = column("direct_effect")
        shares = {
            "clipped": {part: column(f"clipped_share_{part}") for part in PARTS},
            "ratio of means": {part: logits[part] / effect for part in PARTS},
        }
        return cls(model, logits, effect, shares)

    def restored(self, parts: Iterable[str], layers: slice = slice(None)) -> Estimate:
        """What parts give back of the direct effect: the ratio of the sums over all heads of some layers."""
        totals = (self.logits[part][layers].sum((0, 1)) for part in parts)
        return functools.reduce(operator.add, totals) / self.direct_effect[layers].sum((0, 1))

    @property
    def later(self) -> slice:
        """The later half of the layers."""
        return slice(later_half(len(self.direct_effect)), None)

    def by_layer(self) -> pd.DataFrame:
        """Per layer, part and quantity (``logits`` or a way of counting): mean over heads, 95 % interval.

        The ratio of means of a layer is that of the sums over its heads; the others are means over heads.
        """
        layers = {"layer": range(len(self.direct_effect))}
        tables = []
        for part in PARTS:
            over_heads = {"logits": self.logits[part].mean(1)}
            over_heads |= {way: self.shares[way][part].mean(1) for way in WAYS[:-1]}
            over_heads["ratio of means"] = self.logits[part].sum(1) / self.direct_effect.sum(1)
            for quantity, found in over_heads.items():
                tables.append(found.table(layers, model=self.model, part=part, quantity=quantity))
        columns = ["model", "layer", "part", "quantity", "estimate", "low", "high"]
        return pd.concat(tables, ignore_index=True)[columns]

    def over_tokens(self, part: str) -> dict[str, Estimate]:
        """A part's share, each way: per token within a head, then the mean over all heads."""
        ways = {way: self.shares[way][part].nanmean((0, 1)) for way in WAYS[:-1]}
        return ways | {"ratio of means": self.restored([part])}

    def over_heads(self, part: str) -> dict[str, Estimate]:
        """The same from head means alone, which is all that released tables allow.

        Mean of the clipped shares, mean and median over heads of the ratios of means, ratio of sums.
        """
        ratios = self.shares["ratio of means"][part]
        return {
            "clipped": self.shares["clipped"][part].mean((0, 1)),
            "unclipped mean": ratios.mean((0, 1)),
            "median": ratios.map(lambda drawn: np.median(drawn, axis=(0, 1))),
            "ratio of means": self.restored([part]),
        }

    def with_norm_frozen(self) -> pd.DataFrame:
        """Self-repair over direct effect, later half of the layers, by ``final norm``: as it is, and frozen.

        Frozen, σ_clean is kept in the ablated run: the layernorm part is 0 and nothing before the norm
        changes, so that heads and MLPs remain.
        """
        parts_left = {"as it is": PARTS, "frozen": ("heads", "mlps")}
        tables = [
            self.restored(parts, self.later).table({}, model=self.model, **{"final norm": norm})
            for norm, parts in parts_left.items()
        ]
        return pd.concat(tables, ignore_index=True)


def counting_table(ways_of_models: Mapping[str, Mapping[str, Estimate]]) -> pd.DataFrame:
    """``model, way, estimate, low, high``, of models' :meth:`Breakdown.over_heads` or ``over_tokens``."""
    tables = [
        estimate.table({}, model=model, way=way)
        for model, ways in ways_of_models.items()
        for way, estimate in ways.items()
    ]
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class ScaleRatios:
    """``σ_clean / σ_ablated`` of one head's ablation: above 1 where ablation shrinks the final norm's scale.

    There it raises logits. ``top`` are the tokens on which the head's direct effect is largest.
    """

    model: str
    ablation: str
    layer: int
    head: int
    all_tokens: Float[np.ndarray, "prompt position"]
    top: Bool[np.ndarray, "prompt position"]

    @classmethod
    def of_sweep(cls, sweep: xr.Dataset, layer: int, head: int, fraction: float) -> ScaleRatios:
        ratio = (sweep["sigma_clean"] / sweep["sigma_ablated"][layer, head]).values.astype(np.float64)
        top = select_top(sweep["direct_effect"].values[layer, head], fraction)
        return cls(sweep.attrs["model"], sweep.attrs["ablation"], layer, head, ratio, top)

    def share_above_one(self, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
        """Share of the head's top tokens with a ratio above 1."""
        above = (self.all_tokens > 1).astype(np.float64)
        weights = draws(len(self.top), n_bootstrap, seed)
        return selected_means(above, self.top, weights)


def by_model(sweeps: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, dict[str, xr.Dataset]]:
    """Kind of ablation → model → sweep, as model → kind of ablation → sweep."""
    models = next(iter(sweeps.values()))
    return {model: {kind: of_models[model] for kind, of_models in sweeps.items()} for model in models}


def scale_ratios(
    sweeps: Mapping[str, Mapping[str, xr.Dataset]], fraction: float, head: tuple[int, int] | None = None
) -> list[list[ScaleRatios]]:
    """For the first model, and the first with RMSNorm: the ratios of one head for every kind of ablation.

    ``sweeps`` are as :func:`by_model` gives them. The head is, if none is given, the strongest of the last
    layer under the first kind of ablation.
    """
    rows = []
    for model in _models_to_show(sweeps):
        kinds = list(sweeps[model].values())
        place = strongest_head(heads_table(kinds[0], fraction), layer=-1) if head is None else head
        rows.append([ScaleRatios.of_sweep(sweep, *place, fraction) for sweep in kinds])
    return rows


def _models_to_show(sweeps: Mapping[str, Mapping[str, xr.Dataset]]) -> list[str]:
    with_rms_norm = [
        model
        for model, kinds in sweeps.items()
        if next(iter(kinds.values())).attrs["architecture"] == "llama"
    ]
    return list(dict.fromkeys([*list(sweeps)[:1], *with_rms_norm[:1]]))


def scale_table(ratios: Sequence[Sequence[ScaleRatios]]) -> pd.DataFrame:
    """Share of ``top tokens`` with a ratio above 1, 95 % interval over prompts; that of ``all tokens``."""
    tables = [
        one.share_above_one()
        .table({}, model=one.model, head=f"L{one.layer}H{one.head}", ablation=one.ablation)
        .assign(**{"all tokens": float((one.all_tokens > 1).mean())})
        for of_head in ratios
        for one in of_head
    ]
    return pd.concat(tables, ignore_index=True).rename(columns={"estimate": "top tokens"})


def layernorm_statistics(
    sweeps: Mapping[str, xr.Dataset], fraction: float, n_bootstrap: int = 400, seed: int = 0
) -> Statistics:
    """What the claims of notebook 03 are about, by id, of one model's sweeps by kind of ablation.

    The first sweep is the one that claims about a single kind are judged on.
    """
    first = next(iter(sweeps.values()))
    shares = [_clipped_layernorm_share(sweep, fraction, n_bootstrap, seed) for sweep in sweeps.values()]
    statistics = {
        "layernorm-clipped-share": shares[0],
        "sigma-falls-last-layer": _share_above_one(first, fraction, n_bootstrap, seed),
    }
    if len(shares) > 1:
        statistics["layernorm-share-over-ablations"] = shares[0].map(
            lambda *kinds: np.ptp(kinds, axis=0), *shares[1:]
        )
    if first.attrs["architecture"] == "gpt_neox":
        statistics |= _mlp_statistics(Breakdown.of_sweep(first, fraction, n_bootstrap, seed))
    return statistics


def published_statistics(table: pd.DataFrame) -> Statistics:
    """The same from one model's released heads table, as far as it holds them."""
    breakdown = Breakdown.of_table(table)
    statistics = {"layernorm-clipped-share": breakdown.over_heads("layernorm")["clipped"]}
    return statistics | (_mlp_statistics(breakdown) if "pythia" in breakdown.model else {})


def _mlp_statistics(breakdown: Breakdown) -> Statistics:
    """Of a Pythia model."""
    return {"mlp-repair-pythia": breakdown.restored(["mlps"], breakdown.later)}


def _clipped_layernorm_share(sweep: xr.Dataset, fraction: float, n_bootstrap: int, seed: int) -> Estimate:
    repair = with_self_repair(sweep)["self_repair_layernorm"].values.astype(np.float64)
    effect = sweep["direct_effect"].values.astype(np.float64)
    chosen = select_each_top(effect, fraction)
    weights = draws(sweep.sizes["prompt"], n_bootstrap, seed)
    return selected_means(clipped_share(repair, effect), chosen, weights).mean((0, 1))


def _share_above_one(sweep: xr.Dataset, fraction: float, n_bootstrap: int, seed: int) -> Estimate:
    last = sweep.isel(layer=slice(-1, None))
    chosen = select_each_top(last["direct_effect"].values, fraction)
    above = (sweep["sigma_clean"].values > last["sigma_ablated"].values).astype(np.float64)
    weights = draws(sweep.sizes["prompt"], n_bootstrap, seed)
    return selected_means(above, chosen, weights).mean((0, 1))


def _medians(
    ratio: Float[np.ndarray, "layer head prompt position"],
    defined: Bool[np.ndarray, "layer head prompt position"],
    weights: Float[np.ndarray, "draw prompt"],
) -> Float[np.ndarray, "layer head draw"]:
    """Median over each head's tokens, a token counted as often as its prompt is drawn.

    Of two middle values the lower one.
    """
    medians = np.full((*ratio.shape[:2], len(weights)), np.nan)
    for layer, head in np.ndindex(ratio.shape[:2]):
        prompts, _ = here = np.nonzero(defined[layer, head])
        values = ratio[layer, head][here]
        order = np.argsort(values, kind="stable")
        if not len(order):
            continue
        cumulative = weights[:, prompts[order]].cumsum(1)
        middle = np.argmax(cumulative >= cumulative[:, -1:] / 2, axis=1)
        medians[layer, head] = np.where(cumulative[:, -1] > 0, values[order][middle], np.nan)
    return medians
