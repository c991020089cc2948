"""What the final norm repairs, what the other parts do, and how much of that depends on the way of counting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from selfrepair.analysis.head_table import PARTS, select_each_top, with_self_repair
from selfrepair.analysis.claims import Samples
from selfrepair.statistics import bootstrap_weights, clipped_share, selected_means

WAYS = ("clipped", "unclipped mean", "median", "ratio of means")


@dataclass(frozen=True)
class Breakdown:
    """Self-repair by part over each head's top tokens; last axis: the estimate, then bootstrap samples over prompts.

    ``logits[part]``, ``direct_effect`` and ``shares[way][part]`` are ``[layer, head, sample]``. Ways of
    counting a part's share of the direct effect: the per-token ratio ``clipped`` to [0, 1] and averaged,
    averaged as it is (``unclipped mean``), its ``median``, and the ``ratio of means`` of a head.
    """

    model: str
    logits: dict[str, Float[np.ndarray, "layer head sample"]]
    direct_effect: Float[np.ndarray, "layer head sample"]
    shares: dict[str, dict[str, Float[np.ndarray, "layer head sample"]]]

    @classmethod
    def of_sweep(cls, sweep: xr.Dataset, fraction: float, n_bootstrap: int = 400, seed: int = 0) -> Breakdown:
        """Tokens whose direct effect is exactly 0 have no ratio and are left out of the unclipped mean and the median."""
        sweep = with_self_repair(sweep)
        effect = sweep["direct_effect"].values.astype(np.float64)
        chosen = select_each_top(effect, fraction)
        weights = _weights(sweep, n_bootstrap, seed)
        values = {part: sweep[f"self_repair_{part}"].values.astype(np.float64) for part in PARTS}
        logits = {part: selected_means(value, chosen, weights) for part, value in values.items()}
        mean_effect = selected_means(effect, chosen, weights)
        defined = chosen & (effect != 0)
        ratios = {part: np.divide(value, effect, out=np.zeros_like(value), where=defined) for part, value in values.items()}
        shares = {
            "clipped": {part: selected_means(np.clip(ratio, 0, 1), chosen, weights) for part, ratio in ratios.items()},
            "unclipped mean": {part: selected_means(ratio, defined, weights) for part, ratio in ratios.items()},
            "median": {part: _medians(ratio, defined, weights) for part, ratio in ratios.items()},
            "ratio of means": {part: logits[part] / mean_effect for part in PARTS},
        }
        return cls(sweep.attrs["model"], logits, mean_effect, shares)

    def by_layer(self) -> pd.DataFrame:
        """Per layer, part and quantity (``logits`` or a way of counting): mean over heads, 95 % interval.

        The ratio of means of a layer is that of the sums over its heads; the others are means over heads.
        """
        rows = []
        for part in PARTS:
            quantities = {"logits": self.logits[part]} | {way: self.shares[way][part] for way in WAYS[:-1]}
            samples = {name: value.mean(1) for name, value in quantities.items()}
            samples["ratio of means"] = self.logits[part].sum(1) / self.direct_effect.sum(1)
            for quantity, value in samples.items():
                low, high = np.nanquantile(value[:, 1:], [0.025, 0.975], axis=-1)
                for layer, estimate in enumerate(value[:, 0]):
                    rows.append((self.model, layer, part, quantity, estimate, low[layer], high[layer]))
        return pd.DataFrame(rows, columns=["model", "layer", "part", "quantity", "estimate", "low", "high"])

    def over_tokens(self, part: str) -> Samples:
        """A part's share, each way, as ``[sample]``: per token within a head, then the mean over all heads."""
        samples = {way: np.nanmean(self.shares[way][part], axis=(0, 1)) for way in WAYS[:-1]}
        return samples | {"ratio of means": self.logits[part].sum((0, 1)) / self.direct_effect.sum((0, 1))}

    def over_heads(self, part: str) -> Samples:
        """The same from head means alone, which is all that released tables allow: mean, median over heads, ratio of sums."""
        ratios = self.shares["ratio of means"][part]
        return {
            "clipped": self.shares["clipped"][part].mean((0, 1)),
            "unclipped mean": ratios.mean((0, 1)),
            "median": np.median(ratios, axis=(0, 1)),
            "ratio of means": self.logits[part].sum((0, 1)) / self.direct_effect.sum((0, 1)),
        }

    @classmethod
    def of_table(cls, table: pd.DataFrame) -> Breakdown:
        """Of one model's rows of a heads table, without samples; per-token means and medians are not in it and stay empty."""
        (model,) = table["model"].unique()
        shape = (table["layer"].nunique(), table["head"].nunique(), 1)
        column = {name: table.sort_values(["layer", "head"])[name].to_numpy().reshape(shape) for name in table.columns.drop("model")}
        logits = {part: column[f"self_repair_{part}"] for part in PARTS}
        shares = {
            "clipped": {part: column[f"clipped_share_{part}"] for part in PARTS},
            "ratio of means": {part: logits[part] / column["direct_effect"] for part in PARTS},
        }
        return cls(model, logits, column["direct_effect"], shares)

    def with_norm_frozen(self) -> pd.DataFrame:
        """Self-repair over direct effect in the later half of the layers: as it is, and with σ_clean kept in the ablated run.

        With the norm frozen, the layernorm part is 0 and nothing before the norm changes, so that heads and MLPs remain.
        """
        later = slice(round(0.5 * len(self.direct_effect)), None)
        total = {part: value[later].sum((0, 1)) for part, value in self.logits.items()}
        effect = self.direct_effect[later].sum((0, 1))
        rows = []
        for norm, parts in (("as it is", PARTS), ("frozen", ("heads", "mlps"))):
            samples = sum(total[part] for part in parts) / effect
            low, high = np.nanquantile(samples[1:], [0.025, 0.975]) if len(samples) > 1 else (np.nan, np.nan)
            rows.append((self.model, norm, samples[0], low, high))
        return pd.DataFrame(rows, columns=["model", "final norm", "self-repair over direct effect", "low", "high"])


@dataclass(frozen=True)
class ScaleRatios:
    """``σ_clean / σ_ablated`` of one head's ablation: above 1 where ablation shrinks the final norm's scale and so raises logits."""

    model: str
    ablation: str
    layer: int
    head: int
    all_tokens: Float[np.ndarray, "prompt position"]
    top: Bool[np.ndarray, "prompt position"]

    @classmethod
    def of_sweep(cls, sweep: xr.Dataset, layer: int, head: int, fraction: float) -> ScaleRatios:
        ratio = (sweep["sigma_clean"] / sweep["sigma_ablated"][layer, head]).values.astype(np.float64)
        top = select_each_top(sweep["direct_effect"].values[layer, head][None, None], fraction)[0, 0]
        return cls(sweep.attrs["model"], sweep.attrs["ablation"], layer, head, ratio, top)

    def share_above_one(self, n_bootstrap: int = 1000, seed: int = 0) -> pd.Series:
        """Share of the head's top tokens, with its 95 % interval over prompts, and of all tokens."""
        weights = np.concatenate([np.ones((1, len(self.top))), bootstrap_weights(len(self.top), n_bootstrap, seed)])
        samples = selected_means((self.all_tokens > 1).astype(np.float64)[None, None], self.top[None, None], weights)[0, 0]
        low, high = np.nanquantile(samples[1:], [0.025, 0.975])
        return pd.Series({"top tokens": samples[0], "low": low, "high": high, "all tokens": float((self.all_tokens > 1).mean())})


def counting_table(shares: list[Samples], models: list[str]) -> pd.DataFrame:
    """``model, way, estimate, low, high`` of what :meth:`Breakdown.over_heads` or ``over_tokens`` gave for each model."""
    rows = []
    for model, ways in zip(models, shares, strict=True):
        for way, samples in ways.items():
            low, high = np.nanquantile(samples[1:], [0.025, 0.975]) if len(samples) > 1 else (np.nan, np.nan)
            rows.append((model, way, samples[0], low, high))
    return pd.DataFrame(rows, columns=["model", "way", "estimate", "low", "high"])


def layernorm_statistics(sweeps: dict[str, xr.Dataset], fraction: float, n_bootstrap: int = 400, seed: int = 0) -> Samples:
    """The statistics that the claims of notebook 03 are about, of one model's sweeps by kind of ablation.

    The first sweep is the one that claims about a single kind are judged on.
    """
    first = next(iter(sweeps.values()))
    shares = {kind: _clipped_layernorm_share(sweep, fraction, n_bootstrap, seed) for kind, sweep in sweeps.items()}
    statistics = {
        "clipped LayerNorm share, mean over heads": next(iter(shares.values())),
        "share of top tokens with σ_clean / σ_ablated above 1, heads of the last layer": _share_above_one(
            first, fraction, n_bootstrap, seed
        ),
    }
    if len(shares) > 1:
        stacked = np.stack(list(shares.values()))
        statistics["clipped LayerNorm share, largest minus smallest over the kinds of ablation"] = stacked.max(0) - stacked.min(0)
    if first.attrs["architecture"] == "gpt_neox":
        statistics |= mlp_statistics(Breakdown.of_sweep(first, fraction, n_bootstrap, seed))
    return statistics


def published_statistics(table: pd.DataFrame) -> Samples:
    """The same from one model's released heads table, as far as it holds them."""
    breakdown = Breakdown.of_table(table)
    statistics = {"clipped LayerNorm share, mean over heads": breakdown.over_heads("layernorm")["clipped"]}
    return statistics | (mlp_statistics(breakdown) if "pythia" in breakdown.model else {})


def mlp_statistics(breakdown: Breakdown) -> Samples:
    """What MLPs restore of the direct effect in the later half of the layers (a Pythia model's)."""
    later = slice(round(0.5 * len(breakdown.direct_effect)), None)
    ratio = breakdown.logits["mlps"][later].sum((0, 1)) / breakdown.direct_effect[later].sum((0, 1))
    return {"self-repair by MLPs over direct effect, later half of layers, Pythia": ratio}


def _clipped_layernorm_share(sweep: xr.Dataset, fraction: float, n_bootstrap: int, seed: int) -> Float[np.ndarray, " sample"]:
    repair = with_self_repair(sweep)["self_repair_layernorm"].values.astype(np.float64)
    effect = sweep["direct_effect"].values.astype(np.float64)
    chosen = select_each_top(effect, fraction)
    return selected_means(clipped_share(repair, effect), chosen, _weights(sweep, n_bootstrap, seed)).mean((0, 1))


def _share_above_one(sweep: xr.Dataset, fraction: float, n_bootstrap: int, seed: int) -> Float[np.ndarray, " sample"]:
    last = sweep.isel(layer=slice(-1, None))
    chosen = select_each_top(last["direct_effect"].values, fraction)
    above = (sweep["sigma_clean"].values > last["sigma_ablated"].values).astype(np.float64)
    return selected_means(above, chosen, _weights(sweep, n_bootstrap, seed)).mean((0, 1))


def _weights(sweep: xr.Dataset, n_bootstrap: int, seed: int) -> Float[np.ndarray, "sample prompt"]:
    n_prompts = sweep.sizes["prompt"]
    return np.concatenate([np.ones((1, n_prompts)), bootstrap_weights(n_prompts, n_bootstrap, seed)])


def _medians(
    ratio: Float[np.ndarray, "layer head prompt position"],
    defined: Bool[np.ndarray, "layer head prompt position"],
    weights: Float[np.ndarray, "sample prompt"],
) -> Float[np.ndarray, "layer head sample"]:
    """Median over each head's tokens, a token counted as often as its prompt is drawn (lower one of two middle values)."""
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
