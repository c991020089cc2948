"""What notebook 06 says of layers on facts and on prose: statistics and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.estimates import Estimate, mean_over_prompts
from selfrepair.analysis.layer_means import PARTS, LayerMeans

CONDITIONS = FACTS, PROSE = ("facts", "prose")
#: What McGrath et al. 2023 print of Chinchilla 7B on factual prompts: about 70% restored in middle layers
#: (§6); R² 0.92 of compensation on direct effect at layer 23 of 32 (Fig. 7).
PUBLISHED = {
    "chinchilla-7b": {
        "downstream-compensation-facts": Estimate.bare(0.7),
        "best-layer-r2-facts": Estimate.bare(0.92),
    }
}


@dataclass(frozen=True)
class LayerRun:
    """What was measured of a model's layers on ``facts`` or on ``prose``, and its means over prompts.

    Where a layer is chosen by what is then said of it, it is chosen on one half of the prompts (those of even
    number) and that is read off the other: ``choosing`` and ``reading`` are the means of the halves.
    """

    condition: str
    effects: xr.Dataset
    means: LayerMeans
    choosing: LayerMeans
    reading: LayerMeans

    @classmethod
    def of(cls, condition: str, effects: xr.Dataset, n_bootstrap: int = 1000) -> LayerRun:
        """Of the measurement ``layers`` or ``layers_on_prose`` of one model."""
        effects = effects.load()
        is_even = np.arange(effects.sizes["prompt"]) % 2 == 0
        return cls(
            condition,
            effects,
            LayerMeans.of(effects, n_bootstrap=n_bootstrap),
            LayerMeans.of(effects, is_even, n_bootstrap=0),
            LayerMeans.of(effects, ~is_even, n_bootstrap=n_bootstrap),
        )

    @property
    def name(self) -> str:
        return self.means.model_name

    @property
    def without_dropout(self) -> bool:
        """Whether it is known to have been trained without."""
        return bool(self.effects.attrs["trained_without_dropout"])

    def best(self, part: str) -> int | None:
        """The component of a part whose compensation goes most with its direct effect: largest signed R².

        Of attention layers, one of :meth:`LayerMeans.later_attention`, as for the share that is given back;
        of MLPs, one with any component downstream. ``None`` without any, or with too few prompts.
        """
        is_attention = part == PARTS[0]
        components = self.means.later_attention() if is_attention else self.means.with_downstream(part)
        r_squared = self.choosing.compensation_fit.r_squared.value[components]
        if np.isnan(r_squared).all():
            return None
        return int(components[np.nanargmax(r_squared)])

    def strongest_below_late_mlps(self) -> int | None:
        """The attention with the largest mean direct effect of those below all late MLPs."""
        return self._strongest_below(int(self.means.late_mlps()[0]))

    def _strongest_below(self, component: int) -> int | None:
        below = self.means.attention_below(component)
        return int(below[self.choosing.direct_effect.value[below].argmax()]) if len(below) else None

    def erasure_weakens(self) -> Estimate | None:
        """Change of the late MLPs that lower the token, over the direct effect of the attention ablated.

        That is the one with the largest mean direct effect of those below all these MLPs. ``None`` if no late
        MLP lowers the token, or none of them has attention below.
        """
        late = self.means.late_mlps()
        erasing = late[self.choosing.effect.value[late] < 0]
        ablated = self._strongest_below(int(erasing[0])) if len(erasing) else None
        if ablated is None:
            return None
        return self.reading.change[ablated, erasing].sum() / self.reading.direct_effect[ablated]


def statistics(run: LayerRun) -> dict[str, Estimate]:
    """Estimates by the ids of ``statistics.yaml``; those that cannot be had of a model are left out."""
    means, best = run.means, run.best("attention")
    found = {
        "unembedding-larger": means.unembedding_larger[::2].mean(),
        "late-mlps-effect": means.effect[means.late_mlps()].mean(),
    }
    if means.downstream[::2, ::2].any():
        found["coupled-attention"] = means.coupling("attention").nanmean()
        found["coupled-attention-replaced"] = means.coupling_if_replaced("attention").nanmean()
    if len(means.later_attention()):
        found["downstream-compensation"] = means.compensation_share()
        if run.without_dropout:
            found["downstream-compensation-without-dropout"] = means.compensation_share()
    if best is not None:
        found["best-layer-slope"] = run.reading.compensation_fit.slope[best]
        found["best-layer-r2"] = run.reading.compensation_fit.r_squared[best]
    if (weakening := run.erasure_weakens()) is not None:
        found["erasing-mlps-change"] = weakening
    return {
        f"{name}-{run.condition}": estimate for name, estimate in found.items() if np.isfinite(estimate.value)
    }


def statistics_of_models(runs: Sequence[LayerRun]) -> dict[str, dict[str, Estimate]]:
    """:func:`statistics` on all conditions, by model."""
    found: dict[str, dict[str, Estimate]] = {run.name: {} for run in runs}
    for run in runs:
        found[run.name] |= statistics(run)
    return found


def statistics_table(found: Mapping[str, Mapping[str, Estimate]]) -> pd.DataFrame:
    """Values of :func:`statistics_of_models`: a row for each id, a column for each model; NaN where it has
    none."""
    return pd.DataFrame(
        {
            model_name: {name: float(estimate.value) for name, estimate in of_model.items()}
            for model_name, of_model in found.items()
        }
    )


def prompts_table(runs: Sequence[LayerRun], facts: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Facts asked and answered, prompts, mean number of donors and their spread, by condition and model.

    The spread (logits) is the standard deviation between donors of the total effect of one attention layer on
    one prompt; beside it, how large that effect is (its absolute value); both are means.
    """
    rows = []
    for run in runs:
        total, spread = (
            run.effects[name].transpose("ablated", "prompt").values[::2]
            for name in ("total_effect", "total_effect_spread")
        )
        asked = facts[run.name].attrs if run.condition == FACTS else {}
        rows.append(
            {
                "condition": run.condition,
                "model": run.name,
                "asked": asked.get("n_asked", ""),
                "answered": asked.get("n_answered", ""),
                "prompts": run.means.n_prompts,
                "donors": float(run.effects["n_donors"].mean()),
                "size of the effect": float(np.abs(total).mean()),
                "spread between donors": float(spread.mean()),
            }
        )
    return pd.DataFrame(rows)


def unembedding_larger(runs: Sequence[LayerRun]) -> pd.DataFrame:
    """Share of prompts and attention layers whose unembedding-based effect is above the ablation-based one.

    By condition and model: ``share``, with its interval ``low`` to ``high``.
    """
    tables = [
        run.means.unembedding_larger[::2].mean().table({}, condition=run.condition, model=run.name)
        for run in runs
    ]
    return pd.concat(tables, ignore_index=True).rename(columns={"estimate": "share"})


def balance(runs: Sequence[LayerRun]) -> pd.DataFrame:
    """From the unembedding-based effect to the ablation-based one (logits), by condition and model.

    Means over prompts and attention layers of the later half. The output's ``mean part`` is the unembedding-
    based effect less the direct effect against donors; that, less what is given back by attention, MLPs and
    the final norm, is the ablation-based effect.
    """
    rows = []
    for run in runs:
        means, half = run.means, run.means.attention_later_half()
        given = [means.compensation_by(part) for part in PARTS]
        parts = (means.effect, means.effect - means.direct_effect, means.direct_effect, *given)
        names = ("unembedding-based", "mean part", "direct effect", "by attention", "by MLPs")
        values = dict(zip(names, parts, strict=True))
        values |= {"by the final norm": means.norm_term, "ablation-based": means.total_effect}
        of_half = {name: float(value.value[half].mean()) for name, value in values.items()}
        rows.append({"condition": run.condition, "model": run.name, **of_half})
    return pd.DataFrame(rows)


def reactions(runs: Sequence[LayerRun]) -> pd.DataFrame:
    """What lies downstream of ablated attention layers: how much of it falls, by condition and model.

    ``pairs``: of an attention layer and a component downstream of it, whose mean effect ``falls`` in so many
    of them. ``layers``: attention layers with anything downstream; in so many the compensation ``takes away``
    more than it gives back (its mean is below 0).
    """
    rows = []
    for run in runs:
        means, attention = run.means, run.means.with_downstream(PARTS[0])
        change = means.change.value[attention][means.downstream[attention]]
        rows.append(
            {
                "condition": run.condition,
                "model": run.name,
                "pairs": change.size,
                "falls": int((change < 0).sum()),
                "layers": len(attention),
                "takes away": int((means.compensation.value[attention] < 0).sum()),
            }
        )
    return pd.DataFrame(rows)


def late_mlps(runs: Sequence[LayerRun]) -> pd.DataFrame:
    """Mean effects (logits) of the late MLPs (:meth:`LayerMeans.late_mlps`), by condition, model and layer.

    ``raw``; ``centred``, of the output less its mean over donors; ``ablated``, raw with the attention layer
    of :meth:`LayerRun.strongest_below_late_mlps` ablated, NaN without one.
    """
    rows = []
    for run in runs:
        means, ablated = run.means, run.strongest_below_late_mlps()
        for component in means.late_mlps().tolist():
            raw = float(means.effect.value[component])
            change = np.nan if ablated is None else float(means.change.value[ablated, component])
            rows.append(
                {
                    "condition": run.condition,
                    "model": run.name,
                    "layer": component // 2,
                    "raw": raw,
                    "centred": float(means.direct_effect.value[component]),
                    "ablated": raw + change,
                }
            )
    return pd.DataFrame(rows)


def best_layers(runs: Sequence[LayerRun]) -> pd.DataFrame:
    """The layer of each part whose compensation goes most with its direct effect, and how much it does.

    ``slope`` and ``R²`` with their intervals; the layer is chosen on one half of the prompts, they are read
    off the other.
    """
    tables = [pd.DataFrame(columns=["condition", "model", "ablated", "quantity", "estimate", "low", "high"])]
    for run in runs:
        fit = run.reading.compensation_fit
        for part in PARTS:
            if (best := run.best(part)) is None:
                continue
            about = {"condition": run.condition, "model": run.name, "ablated": f"{part} {best // 2}"}
            for quantity, estimate in (("slope", fit.slope[best]), ("R²", fit.r_squared[best])):
                tables.append(estimate.table({}, **about, quantity=quantity))
    return pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)


def by_phrasing(run: LayerRun, facts: xr.Dataset) -> pd.DataFrame:
    """By phrasing of facts: prompts, compensation, direct effect, and their ratio with its interval.

    Compensation and direct effect are in logits, sums of :meth:`LayerMeans.later_attention`.
    """
    phrasings = np.array(facts.attrs["phrasings"])
    tables = []
    for phrasing in np.unique(phrasings):
        means = LayerMeans.of(run.effects, phrasings == phrasing)
        later = means.later_attention()
        of_phrasing = {
            "model": run.name,
            "phrasing": phrasing,
            "prompts": means.n_prompts,
            "direct effect": means.direct_effect[later].sum().value,
            "compensation": means.compensation[later].sum().value,
        }
        tables.append(means.compensation_share().table({}, **of_phrasing))
    table = pd.concat(tables, ignore_index=True)
    return table.rename(columns={"estimate": "compensation over direct effect"})


def over_training(effects: xr.Dataset) -> pd.DataFrame:
    """Facts answered, and the effects' means, at each step of the measurement ``layers_over_training``.

    Columns: ``model, prompts, step, quantity, estimate, low, high``. Effects (logits) of attention are means
    over :meth:`LayerMeans.later_attention`, those of MLPs over :meth:`LayerMeans.late_mlps`.
    """
    tables = []
    for step in effects["step"].values.tolist():
        here = effects.sel(step=step)
        means = LayerMeans.of(here)
        n, later = means.n_prompts, means.later_attention()
        quantities = {
            "answered": mean_over_prompts(here["answered"].values.astype(np.float64)),
            "direct effect": means.direct_effect[later].mean(),
            "total effect": means.total_effect[later].mean(),
            "compensation": means.compensation[later].mean(),
            "late MLPs": means.effect[means.late_mlps()].mean(),
        }
        for quantity, estimate in quantities.items():
            tables.append(estimate.table({}, model=means.model_name, prompts=n, step=step, quantity=quantity))
    return pd.concat(tables, ignore_index=True)
