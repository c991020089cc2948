"""Tables of a model's ablated heads: what an ablation costs, what repairs it, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from selfrepair.analysis.estimates import Estimate, draws, selected_means
from selfrepair.analysis.self_repair import with_self_repair
from selfrepair.analysis.shares import clipped_floor, select_each_top
from selfrepair.statistics import PARTS, clipped_share, later_half
from selfrepair.store.files import write_atomically

EFFECTS = ("logit_change", "direct_effect", "ablated_direct_effect")


@dataclass(frozen=True)
class LayerTokens:
    """Effects (logits) of one layer's heads on every token, and the tokens that each head is judged on."""

    effects: Mapping[str, Float[np.ndarray, "head prompt position"]]
    chosen: Bool[np.ndarray, "head prompt position"]

    @classmethod
    def of_sweep(cls, sweep: xr.Dataset, layer: int, fraction: float) -> LayerTokens:
        """A head's tokens are its top ``fraction`` by direct effect.

        Raises:
            UserError: ``fraction`` is not in (0, 1].
        """
        whole = with_self_repair(sweep.isel(layer=layer))
        names = (*EFFECTS, *(f"self_repair_{part}" for part in PARTS), "self_repair")
        effects = {name: whole[name].values.astype(np.float64) for name in names}
        return cls(effects, select_each_top(effects["direct_effect"][None], fraction)[0])

    def means(self, name: str, weights: Float[np.ndarray, "draw prompt"]) -> Estimate:
        """Mean of an effect over each head's tokens, ``[head]``."""
        return selected_means(self.effects[name], self.chosen, weights)

    def of_head(self, head: int) -> dict[str, Float[np.ndarray, " token"]]:
        """The effects of one head on its tokens."""
        return {name: values[head][self.chosen[head]] for name, values in self.effects.items()}


def heads_table(
    sweep: xr.Dataset, fraction: float = 0.02, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """One row per head: means (logits) over its top ``fraction`` of tokens by direct effect.

    The columns of the authors' published tables, and: ``self_repair`` with its 95% interval over
    prompts (``_low``, ``_high``; NaN of a head whose tokens all lie in one prompt); beside the published
    ``clipped_share_*`` (mean of per-token clipped shares)
    ``clipped_floor_*`` (the same with signs at random, :func:`clipped_floor`) and ``share_of_means_*`` (mean
    of the part over mean direct effect); ``n_tokens``.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    weights = draws(sweep.sizes["prompt"], n_bootstrap, seed)
    rows = []
    for layer in range(sweep.sizes["layer"]):
        tokens = LayerTokens.of_sweep(sweep, layer, fraction)
        in_several = tokens.chosen.any(-1).sum(-1) > 1  # prompts: of one, every draw gives the same mean
        ends = tokens.means("self_repair", weights).interval()
        low, high = (np.where(in_several, end, np.nan) for end in ends)
        for head in range(sweep.sizes["head"]):
            interval = {"self_repair_low": low[head], "self_repair_high": high[head]}
            name = {"model": sweep.attrs["model"], "layer": layer, "head": head}
            rows.append(
                name
                | _means_of_head(tokens.of_head(head))
                | interval
                | {"n_tokens": int(tokens.chosen[head].sum())}
            )
    return pd.DataFrame(rows)


def _means_of_head(effects: Mapping[str, Float[np.ndarray, " token"]]) -> dict[str, float]:
    """Means over a head's tokens, in the order of the columns of a heads table."""
    means = {name: values.mean() for name, values in effects.items()}
    direct_effect = effects["direct_effect"]
    parts = {part: effects[f"self_repair_{part}"] for part in PARTS}
    return {
        **{name: means[name] for name in EFFECTS},
        **{f"self_repair_{part}": means[f"self_repair_{part}"] for part in PARTS},
        **{f"clipped_share_{part}": clipped_share(parts[part], direct_effect).mean() for part in PARTS},
        **{f"clipped_floor_{part}": clipped_floor(parts[part], direct_effect).mean() for part in PARTS},
        **{f"share_of_means_{part}": means[f"self_repair_{part}"] / means["direct_effect"] for part in PARTS},
        "self_repair": means["self_repair"],
    }


def heads_of_models(sweeps: Mapping[str, xr.Dataset], fraction: float) -> pd.DataFrame:
    """:func:`heads_table` of several models, one under the other.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    return pd.concat([heads_table(sweep, fraction) for sweep in sweeps.values()], ignore_index=True)


def write_heads(table: pd.DataFrame, ablation: str, out_dir: Path) -> None:
    """Keeps a heads table of one kind of ablation in a results folder, as ``heads_<ablation>.csv``."""
    content = table.to_csv(index=False, float_format="%.6g")
    write_atomically(out_dir / f"heads_{ablation}.csv", content.encode())


def layer_means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the heads of each model's layers, with ``relative_depth`` = layer / (layers − 1)."""
    means = (
        table.drop(columns="head")
        .groupby(["model", "layer"], sort=False)
        .mean(numeric_only=True)
        .reset_index()
    )
    depth = means.groupby("model")["layer"].transform("max").clip(lower=1)
    return means.assign(relative_depth=means["layer"] / depth)


def extreme_heads(table: pd.DataFrame) -> pd.DataFrame:
    """The heads of least and of most self-repair (logits) of each model of a heads table, one row each."""
    places = table.groupby("model", sort=False)["self_repair"].agg(["idxmin", "idxmax"])
    rows = table.loc[places.stack()].reset_index(drop=True)
    name = "L" + rows["layer"].astype(str) + "H" + rows["head"].astype(str)
    effects = {"self-repair": rows["self_repair"], "direct effect": rows["direct_effect"]}
    return rows.assign(head=name, **effects)[["model", "head", *effects]]


def share_in_zone(table: pd.DataFrame) -> float:
    """Share of heads in the self-repair zone: something is lost, but less than the direct effect."""
    change = table["logit_change"]
    return float(((-table["direct_effect"] < change) & (change < 0)).mean())


def restored_of_strong(table: pd.DataFrame, least: float = 1.0) -> float:
    """Self-repair over direct effect, of a heads table's later half of layers: sums over strong heads.

    Strong are those of :func:`strong_heads`; NaN where there are none.
    """
    strong = strong_heads(table, least)
    return strong["self_repair"].sum() / strong["direct_effect"].sum() if len(strong) else np.nan


def strong_heads(table: pd.DataFrame, least: float = 1.0) -> pd.DataFrame:
    """A heads table's rows of the later half of layers with a direct effect above ``least`` (logits)."""
    return table[in_later_half(table) & (table["direct_effect"] > least)]


def in_later_half(table: pd.DataFrame) -> pd.Series:
    """Which rows of a table, by ``model`` and ``layer``, are of the later half of the model's layers."""
    n_layers = table.groupby("model")["layer"].transform("nunique")
    return table["layer"] >= n_layers.map(later_half)


def furthest_below(table: pd.DataFrame) -> pd.DataFrame:
    """Of each model the head furthest below the no-repair line, with ``above`` (logits) and ``is_later``.

    ``above`` is logit change plus direct effect: the height above the line, negative below it. ``is_later``
    says whether the head's layer is in the later half.
    """
    table = table.assign(above=table["logit_change"] + table["direct_effect"])
    table = table.assign(is_later=in_later_half(table))
    lowest = table.groupby("model", sort=False)["above"].idxmin()
    return table.loc[lowest, ["model", "layer", "head", "above", "is_later"]].reset_index(drop=True)


def strongest_head(table: pd.DataFrame, layer: int) -> tuple[int, int]:
    """``(layer, head)`` with the largest mean direct effect in a layer of one model's heads table.

    Layers may be counted from the last, -1.
    """
    layer = range(table["layer"].max() + 1)[layer]
    here = table[table["layer"] == layer]
    return layer, int(here.loc[here["direct_effect"].idxmax(), "head"])
