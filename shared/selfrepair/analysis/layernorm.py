"""Notebook 03: when ablation lowers the final norm's scale, what repairs, and what the claims are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from selfrepair.analysis.breakdown import Breakdown, PartMeans, TokensOfHeads, table_of
from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.estimates import Estimate, draws, selected_means
from selfrepair.analysis.head_table import heads_table, in_later_half, strongest_head
from selfrepair.analysis.published import comparable, published_by_model
from selfrepair.errors import UserError
from selfrepair.statistics import select_top


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
    """Kind of ablation → model → sweep, as model → kind of ablation → sweep.

    The first kind has every model, another one may have some.
    """
    models = next(iter(sweeps.values()))
    return {
        model: {kind: of_models[model] for kind, of_models in sweeps.items() if model in of_models}
        for model in models
    }


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
        place = head_to_show(kinds[0], fraction, head)
        rows.append([ScaleRatios.of_sweep(sweep, *place, fraction) for sweep in kinds])
    return rows


def last_layers_head(sweep: xr.Dataset, fraction: float) -> tuple[int, int]:
    """``(layer, head)``: the last layer's with the largest mean direct effect on its top tokens."""
    return strongest_head(heads_table(sweep, fraction), layer=-1)


def head_to_show(sweep: xr.Dataset, fraction: float, head: tuple[int, int] | None = None) -> tuple[int, int]:
    """``(layer, head)``: the one that is given, or :func:`last_layers_head`.

    Raises:
        UserError: the model has no such head.
    """
    if head is None:
        return last_layers_head(sweep, fraction)
    n_layers, n_heads = sweep.sizes["layer"], sweep.sizes["head"]
    if not (0 <= head[0] < n_layers and 0 <= head[1] < n_heads):
        raise UserError(
            f"{sweep.attrs['model']}: no head {list(head)}; give [layer, head], "
            f"layers from 0 to {n_layers - 1}, heads from 0 to {n_heads - 1}"
        )
    return head


def _models_to_show(sweeps: Mapping[str, Mapping[str, xr.Dataset]]) -> list[str]:
    with_rms_norm = [
        model
        for model, kinds in sweeps.items()
        if next(iter(kinds.values())).attrs["architecture"] == "llama"
    ]
    return list(dict.fromkeys([*list(sweeps)[:1], *with_rms_norm[:1]]))


def scale_table(ratios: Sequence[Sequence[ScaleRatios]]) -> pd.DataFrame:
    """Share of ``top tokens`` with a ratio above 1, 95% interval over prompts; that of ``all tokens``."""
    tables = [
        one.share_above_one()
        .table({}, model=one.model, head=f"L{one.layer}H{one.head}", ablation=one.ablation)
        .assign(**{"all tokens": float((one.all_tokens > 1).mean())})
        for of_head in ratios
        for one in of_head
    ]
    return pd.concat(tables, ignore_index=True).rename(columns={"estimate": "top tokens"})


def breakdowns(sweeps: Mapping[str, Mapping[str, xr.Dataset]], fraction: float) -> dict[str, Breakdown]:
    """Of every model, under the first kind of ablation; ``sweeps`` are as :func:`by_model` gives them."""
    return {model: Breakdown.of_sweep(sweep, fraction) for model, sweep in _first_kind(sweeps).items()}


def released_breakdowns() -> dict[str, Breakdown]:
    """Of every model that the authors released: means of heads over their top 2% of tokens, no samples."""
    return {model: Breakdown.of_table(rows) for model, rows in published_by_model().items()}


def layer_table(models: Mapping[str, Breakdown]) -> pd.DataFrame:
    """The rows of :meth:`Breakdown.by_layer` of every model."""
    return pd.concat([one.by_layer() for one in models.values()], ignore_index=True)


def shares_over_heads(models: Mapping[str, Breakdown]) -> pd.DataFrame:
    """The final norm's share by each way of counting, from head means, and the clipped one's floor if known.

    ``model, way, estimate, low, high``.
    """
    found = {model: one.over_heads("layernorm") | one.floor("layernorm") for model, one in models.items()}
    return table_of(found, "way")


def shares_over_tokens(models: Mapping[str, Breakdown]) -> pd.DataFrame:
    """The same with ratios per token within each head, which released tables do not allow."""
    found = {model: one.over_tokens("layernorm") | one.floor("layernorm") for model, one in models.items()}
    return table_of(found, "way")


def by_place(table: pd.DataFrame) -> pd.DataFrame:
    """The estimates of :func:`layer_table`: a row for each model, layer and part, a column for each quantity.

    ``from_last`` counts layers from the last one (0); ``is_later`` are those of the later half.
    """
    places = ["model", "layer", "part"]
    found = table.pivot(index=places, columns="quantity", values="estimate").reset_index()
    last = found.groupby("model")["layer"].transform("max")
    return found.assign(from_last=last - found["layer"], is_later=in_later_half(found))


def above_floor(models: Mapping[str, Breakdown], part: str) -> pd.DataFrame:
    """:meth:`Breakdown.above_floor` of every model: ``model, estimate, low, high``."""
    found = {model: {"": one.above_floor(part)} for model, one in models.items()}
    return table_of(found, "part").drop(columns="part")


def second_to_last_layer(models: Mapping[str, Breakdown]) -> pd.DataFrame:
    """:meth:`Breakdown.second_to_last` of the final norm: ``model, estimate, low, high``."""
    found = {model: {"": one.second_to_last("layernorm")} for model, one in models.items()}
    return table_of(found, "layer").drop(columns="layer")


def heads_without_repair(models: Mapping[str, Breakdown]) -> pd.DataFrame:
    """:meth:`Breakdown.without_repair` of the final norm: ``model, quantity, estimate, low, high``."""
    return table_of({model: one.without_repair("layernorm") for model, one in models.items()}, "quantity")


def means_of_top_tokens(
    measured: Mapping[str, Breakdown], released: Mapping[str, Breakdown]
) -> dict[str, PartMeans]:
    """What each part gives back on the heads' top tokens, ours and ``(published)``."""
    return {model: one.means for model, one in measured.items()} | {
        as_published(model): one.means for model, one in released.items()
    }


def means_of_all_tokens(sweeps: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, PartMeans]:
    """The same over all tokens, which the authors released of two models."""
    measured = {model: PartMeans.of_sweep(sweep, 1) for model, sweep in _first_kind(sweeps).items()}
    return measured | {
        as_published(model): PartMeans.of_table(rows)
        for model, rows in published_by_model("all_tokens").items()
    }


def restored_shares(models: Mapping[str, PartMeans]) -> pd.DataFrame:
    """What each part gives back of the direct effect, later half of layers: ``model, part, estimate, …``."""
    return table_of({model: means.restored_by_part() for model, means in models.items()}, "part")


def restored_logits(models: Mapping[str, PartMeans]) -> pd.DataFrame:
    """The same in logits, beside the mean direct effect."""
    return table_of({model: means.by_part() for model, means in models.items()}, "part")


def as_published(model: str) -> str:
    """How tables and figures name a model whose numbers the authors released."""
    return f"{model} (published)"


def _first_kind(sweeps: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, xr.Dataset]:
    return {model: next(iter(kinds.values())) for model, kinds in sweeps.items()}


def claimed(
    sweeps: Mapping[str, Mapping[str, xr.Dataset]], fraction: float
) -> tuple[dict[str, Statistics], dict[str, Statistics]]:
    """What the claims of notebook 03 are about, by model: measured, and published if over as many tokens."""
    measured = {model: layernorm_statistics(kinds, fraction) for model, kinds in sweeps.items()}
    return measured, {model: published_statistics(rows) for model, rows in comparable(fraction).items()}


def layernorm_statistics(
    sweeps: Mapping[str, xr.Dataset], fraction: float, n_bootstrap: int = 400, seed: int = 0
) -> Statistics:
    """What the claims of notebook 03 are about, by id, of one model's sweeps by kind of ablation.

    The first sweep is the one that claims about a single kind are judged on. Where top tokens are all tokens,
    there is nothing to say of them against all, and that statistic is left out with its control.
    """
    tokens = [TokensOfHeads.of_sweep(sweep, fraction, n_bootstrap, seed) for sweep in sweeps.values()]
    shares = [one.clipped("layernorm").mean((0, 1)) for one in tokens]
    floors = [one.floor("layernorm").mean((0, 1)) for one in tokens]
    first = next(iter(sweeps.values()))
    statistics = {"layernorm-clipped-share": shares[0], "layernorm-clipped-floor": floors[0]}
    if not (top := tokens[0].chosen[-1]).all():
        falls = (first["sigma_clean"].values > first["sigma_ablated"].values[-1]).astype(np.float64)
        chosen = {"sigma-falls-last-layer": top, "sigma-falls-all-tokens": np.ones(falls.shape, dtype=bool)}
        for name, where in chosen.items():
            statistics[name] = selected_means(falls, where, tokens[0].weights).mean()
    if len(tokens) > 1:
        statistics["layernorm-share-over-ablations"] = _range(shares)
        statistics["layernorm-floor-over-ablations"] = _range(floors)
    if first.attrs["architecture"] == "gpt_neox":
        statistics |= _mlp_statistics(tokens[0].means())
    return statistics


def published_statistics(table: pd.DataFrame) -> Statistics:
    """The same from one model's released heads table, as far as it holds them."""
    breakdown = Breakdown.of_table(table)
    statistics: Statistics = {"layernorm-clipped-share": breakdown.over_heads("layernorm")["clipped"]}
    of_mlps = _mlp_statistics(breakdown.means) if "pythia" in breakdown.means.model else {}
    return {**statistics, **of_mlps}


def _mlp_statistics(means: PartMeans) -> Statistics:
    """Of a Pythia model."""
    return {"mlp-repair-pythia": means.restored(["mlps"], means.later)}


def _range(of_kinds: Sequence[Estimate]) -> Estimate:
    """The largest minus the smallest."""
    return of_kinds[0].map(lambda *kinds: np.ptp(kinds, axis=0), *of_kinds[1:])
