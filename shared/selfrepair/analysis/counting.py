"""Notebook 07: self-repair in every way of counting it, and how much each choice moves the answer.

All is of the later half of the layers, where direct effects are large enough to be shared out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from selfrepair.analysis.breakdown import (
    FLOOR,
    RESOLVED,
    SUMS,
    WAYS,
    Breakdown,
    PartMeans,
    TokensOfHeads,
    table_of,
)
from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.published import TOKENS_OF_FRACTION, published_by_model
from selfrepair.analysis.self_repair import with_self_repair
from selfrepair.analysis.shares import select_each_top
from selfrepair.statistics import PARTS, later_half

#: Shares of tokens that a head may be judged on, those of its largest direct effect.
FRACTIONS = (0.001, 0.005, 0.02, 0.1, 0.25, 1)
#: Up to this fraction every way of counting has a value in most heads; over all tokens hardly any head has
#: an unclipped mean.
QUARTER = 0.25
#: Bootstrap samples of each of the many points.
N_BOOTSTRAP = 200
#: What may be chosen, by the columns of :func:`multiverse` and as readers are shown it.
CHOICES = {"fraction": "fraction of tokens", "way": "way of counting", "kind": "kind of ablation"}
#: Donors of the sweep itself among the draws of :func:`with_draws`.
OWN_DONORS = 0


def later_layers(sweep: xr.Dataset) -> xr.Dataset:
    """The later half of the layers."""
    return sweep.isel(layer=slice(later_half(sweep.sizes["layer"]), None))


def points(
    sweep: xr.Dataset, fractions: Sequence[float] = FRACTIONS, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
) -> pd.DataFrame:
    """What the parts of self-repair are of the direct effect, each way, for each fraction of tokens.

    ``part`` (one of :data:`~selfrepair.analysis.breakdown.SUMS`), ``way, fraction, estimate, low, high,
    floor``, means over heads as of :meth:`~selfrepair.analysis.breakdown.Breakdown.over_tokens`. The
    ``floor`` is what signs at random give: 0 except where ratios are clipped. The interval (95%) is over
    prompts. NaN where a way has no value: the unclipped mean is over the heads that have one, and over all
    tokens hardly any has.
    """
    rows = []
    later = later_layers(sweep).load()  # once for all fractions
    for fraction in fractions:
        tokens = TokensOfHeads.of_sweep(later, fraction, n_bootstrap, seed)
        sums = {name: np.sum([tokens.parts[part] for part in parts], axis=0) for name, parts in SUMS.items()}
        found = Breakdown.of_tokens(dataclasses.replace(tokens, parts=sums))
        for part in SUMS:
            floors = dict.fromkeys(WAYS, 0.0) | {WAYS[0]: float(found.floor(part)[FLOOR].value)}
            for way, share in found.over_tokens(part).items():
                place = {"part": part, "way": way, "fraction": fraction}
                low, high = (float(end) for end in share.interval())
                of_point = {"estimate": share.value, "low": low, "high": high, "floor": floors[way]}
                rows.append(place | of_point)
    return pd.DataFrame(rows)


def multiverse(kinds: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """:func:`points` of one model's sweeps, ``kind`` of ablation by kind."""
    tables = [points(sweep).assign(kind=kind) for kind, sweep in kinds.items()]
    return pd.concat(tables, ignore_index=True)


def with_draws(
    kinds: Mapping[str, xr.Dataset], draws: xr.Dataset | None, name: str = "resample"
) -> dict[int, xr.Dataset]:
    """By draw, one model's resample sweeps with other donors, and first its own; all on the same prompts.

    Empty where there are no ``draws``.
    """
    if draws is None:
        return {}
    prompts = draws["prompt"].values
    own = {OWN_DONORS: kinds[name].sel(prompt=prompts)} if name in kinds else {}
    return own | {int(draw): draws.sel(draw=draw) for draw in draws["draw"].values}


def multiverse_of_draws(draws: Mapping[int, xr.Dataset]) -> pd.DataFrame | None:
    """:func:`points` without intervals, ``draw`` by draw, of :func:`with_draws`; nothing of none.

    Beside them ``n_prompts``, how many each draw has.
    """
    tables = [
        points(sweep, n_bootstrap=0).assign(draw=draw, n_prompts=sweep.sizes["prompt"])
        for draw, sweep in draws.items()
    ]
    return pd.concat(tables, ignore_index=True) if tables else None


def by_way(table: pd.DataFrame, part: str, kind: str) -> pd.DataFrame:
    """One part's shares under one kind, of :func:`multiverse`: by fraction (rows) and way (columns)."""
    here = table[(table["part"] == part) & (table["kind"] == kind)]
    return here.pivot(index="fraction", columns="way", values="estimate")[list(WAYS)]


def clipped_course(universes: Mapping[str, pd.DataFrame], part: str, kind: str) -> pd.DataFrame:
    """How a part's clipped share and its floor change with the fraction of tokens: a row for each model.

    ``rise``, ``floor's rise``: from the smallest fraction to :data:`QUARTER`; ``floor's rise after``: from
    there to all tokens. ``falls``: over all tokens the share's 95% interval lies below that at the quarter.
    """
    rows = {}
    for model, table in universes.items():
        here = table[(table["part"] == part) & (table["kind"] == kind) & (table["way"] == WAYS[0])]
        few, quarter, every = (here.set_index("fraction").loc[at] for at in (min(FRACTIONS), QUARTER, 1))
        rows[model] = {
            "rise": quarter["estimate"] - few["estimate"],
            "floor's rise": quarter["floor"] - few["floor"],
            "floor's rise after": every["floor"] - quarter["floor"],
            "falls": every["high"] < quarter["low"],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def without_unclipped_mean(sweep: xr.Dataset, fraction: float) -> tuple[int, int]:
    """How many heads of the later layers have no unclipped mean, and how many heads these layers have.

    A head has none where the direct effect of one of its tokens is below
    :data:`~selfrepair.analysis.breakdown.RESOLVED`.
    """
    effect = later_layers(sweep)["direct_effect"].values.astype(np.float64)
    unresolved = select_each_top(effect, fraction) & (np.abs(effect) < RESOLVED)
    lacks_one = unresolved.any((2, 3))
    return int(lacks_one.sum()), lacks_one.size


def main_effects(values: Float[np.ndarray, "*choice"]) -> list[float]:
    """How much of the sum of squares each choice explains by itself: a share for each axis.

    ``values`` are of every combination. A choice's share is the sum of squares of its levels' means around
    the mean of all, each mean counted as often as its level comes, over the sum of squares of all values.
    The rest, up to 1, is due to combinations of choices. NaN where a value is missing or nothing differs.
    """
    around = values - values.mean()
    total = (around**2).sum()
    shares = []
    for axis in range(values.ndim):
        others = tuple(other for other in range(values.ndim) if other != axis)
        of_levels = around.mean(others)
        shares.append(float((of_levels**2).sum() * values.size / len(of_levels) / total) if total else np.nan)
    return shares


def variance_explained(table: pd.DataFrame, choices: Mapping[str, str], most: float) -> pd.DataFrame:
    """How much of the variance of the answer each choice explains, by part: :func:`main_effects`.

    ``table`` has a row for every combination of ``choices`` (column → how it is shown) and part, of which
    fractions above ``most`` are left out. Beside them ``choices together``, and the ``least`` and the
    ``largest`` answer.
    """
    rows = []
    for part in SUMS:
        here = table[(table["part"] == part) & (table["fraction"] <= most)]
        levels = [here[choice].unique() for choice in choices]
        in_order = here.set_index(list(choices))["estimate"].reindex(pd.MultiIndex.from_product(levels))
        answers = in_order.to_numpy().reshape([len(of_choice) for of_choice in levels])
        shares = main_effects(answers)
        of_choices = dict(zip(choices.values(), shares, strict=True))
        together = {"choices together": 1 - sum(shares)}
        rows.append(
            {"part": part} | of_choices | together | {"least": answers.min(), "largest": answers.max()}
        )
    return pd.DataFrame(rows)


def donors_matter(draws: Mapping[int, xr.Dataset], fraction: float) -> dict[str, float]:
    """What hangs on the donors, of :func:`with_draws`.

    ``model``: by how much the model's self-repair over direct effect differs between draws, largest minus
    smallest. ``tokens``: of the variance of a head's self-repair (logits) over its top tokens and draws, the
    share between draws of the same token, mean over heads.
    """
    sweeps = [with_self_repair(later_layers(sweep)) for sweep in draws.values()]
    shares = [PartMeans.of_sweep(sweep, fraction, 0).restored(PARTS).value for sweep in sweeps]
    chosen = select_each_top(sweeps[0]["direct_effect"].values.astype(np.float64), fraction)
    repair = np.stack([sweep["self_repair"].values.astype(np.float64) for sweep in sweeps])
    of_heads = []
    for head in np.ndindex(chosen.shape[:2]):
        values = repair[(slice(None), *head)][:, chosen[head]]
        of_heads.append(values.var(0, ddof=1).mean() / values.var(ddof=1) if values.size > 1 else np.nan)
    return {"model": float(np.ptp(shares)), "tokens": float(np.nanmean(of_heads))}


def released_points() -> pd.DataFrame:
    """:func:`points` as far as the released tables hold them, by ``model``: clipped, and ratios of means."""
    tables = []
    for fraction, tokens in TOKENS_OF_FRACTION.items():
        for model, rows in published_by_model(tokens).items():
            later = rows[rows["layer"] >= later_half(rows["layer"].nunique())]
            means = PartMeans.of_table(later)
            ratios = {name: means.restored(parts) for name, parts in SUMS.items()}
            names = {part: f"clipped_share_{part}" for part in PARTS}
            clipped = {
                part: Estimate.bare(later[name].mean()) for part, name in names.items() if name in later
            }
            for way, shares in (("clipped", clipped), ("ratio of means", ratios)):
                if shares:
                    table = table_of({model: shares}, "part")
                    tables.append(table.assign(way=way, fraction=fraction))
    return pd.concat(tables, ignore_index=True)


def variance_of_models(
    universes: Mapping[str, pd.DataFrame], most: float, choices: Mapping[str, str] = CHOICES
) -> pd.DataFrame:
    """:func:`variance_explained` of every model, under each other; without a choice that a model lacks."""
    tables = []
    for model, table in universes.items():
        has = {choice: shown for choice, shown in choices.items() if table[choice].nunique() > 1}
        tables.append(variance_explained(table, has, most).assign(model=model))
    columns = ["model", "part", *choices.values(), "choices together", "least", "largest"]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns)


def donors_table(draws: Mapping[str, Mapping[int, xr.Dataset]], fraction: float) -> pd.DataFrame:
    """:func:`donors_matter` of the models that have draws: a row for each."""
    rows = []
    for model, of_model in draws.items():
        if len(of_model) > 1:
            found = donors_matter(of_model, fraction)
            row = {"model": model, "draws": len(of_model), "range of the model's share": found["model"]}
            rows.append(row | {"share of the tokens' variance": found["tokens"]})
    return pd.DataFrame(rows)
