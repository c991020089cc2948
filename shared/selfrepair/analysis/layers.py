"""What notebook 06 says of layers on facts: statistics, tables, one prompt in parts, training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.estimates import Estimate, mean_over_prompts
from selfrepair.analysis.layer_means import PARTS, LayerMeans


@dataclass(frozen=True)
class FactRun:
    """A model's ``facts`` and ``layers`` as they were measured, and the means of the latter."""

    facts: xr.Dataset
    effects: xr.Dataset
    means: LayerMeans

    @classmethod
    def of(cls, facts: xr.Dataset, effects: xr.Dataset, n_bootstrap: int = 1000) -> FactRun:
        """Of the measurements ``facts`` and ``layers`` of one model."""
        effects = effects.load()
        return cls(facts, effects, LayerMeans.of(effects, n_bootstrap=n_bootstrap))

    @property
    def name(self) -> str:
        return self.means.model_name

    @property
    def without_dropout(self) -> bool:
        """Whether it is known to have been trained without."""
        return bool(self.effects.attrs["trained_without_dropout"])

    def by_phrasing(self) -> pd.DataFrame:
        """By phrasing: prompts, compensation, direct effect, and their ratio with its interval.

        Compensation and direct effect are in logits, sums of :meth:`LayerMeans.later_attention`.
        """
        phrasings = np.array(self.facts.attrs["phrasings"])
        tables = []
        for phrasing in np.unique(phrasings):
            means = LayerMeans.of(self.effects, phrasings == phrasing)
            later = means.later_attention()
            of_phrasing = {
                "model": self.name,
                "phrasing": phrasing,
                "prompts": means.n_prompts,
                "direct effect": means.direct_effect[later].sum().value,
                "compensation": means.compensation[later].sum().value,
            }
            tables.append(means.compensation_share().table({}, **of_phrasing))
        table = pd.concat(tables, ignore_index=True)
        return table.rename(columns={"estimate": "compensation over direct effect"})


def statistics(means: LayerMeans, without_dropout: bool) -> dict[str, Estimate]:
    """Estimates by the ids of ``statistics.yaml``; those that a model has too few layers for are left out.

    ``without_dropout``: it is known to have been trained without.
    """
    half, later, late = means.attention_later_half(), means.later_attention(), means.late_mlps()
    found = {
        "ablation-over-unembedding": means.total_effect[half].sum() / means.effect[half].sum(),
        "late-mlps-effect": means.effect[late].mean(),
    }
    if len(means.attention_with_downstream()):
        found["coupled-layers"] = means.coupling().nanmean()
    if len(means.attention_below_late_mlps()):
        ablated = means.late_mlps_ablated()
        found["late-mlps-change"] = ablated.change / ablated.direct_effect
    if len(later):
        found["downstream-compensation"] = means.compensation_share()
        found["compensation-slope"] = means.slope[later].mean()
        if without_dropout:
            found["downstream-compensation-without-dropout"] = means.compensation_share()
    return found


def prompts_table(runs: Sequence[FactRun]) -> pd.DataFrame:
    """Facts asked, answered and measured on, mean number of donors and their spread, by model.

    The spread (logits) is the standard deviation between donors of the total effect of one attention layer on
    one prompt.
    """
    rows = [
        {
            "model": run.name,
            "asked": run.facts.attrs["n_asked"],
            "answered": run.facts.attrs["n_answered"],
            "measured": run.means.n_prompts,
            "dropped, alone in length": run.facts.attrs["n_alone"],
            "donors": float(run.effects["n_donors"].mean()),
            "spread between donors": float(run.effects["total_effect_spread"][::2].mean()),
        }
        for run in runs
    ]
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class WorkedPrompt:
    """One prompt, and the number of the component that is ablated on it."""

    component: int
    prompt: int
    text: str
    answer: str


def worked_prompt(run: FactRun) -> WorkedPrompt:
    """The attention with the largest mean direct effect, on the prompt of median compensation.

    That is neither the best nor the worst case. Attention with none above does not count, unless there is one
    layer.
    """
    attention = np.arange(0, max(2, 2 * (run.means.n_layers - 1)), 2)
    component = int(attention[run.means.direct_effect[attention].value.argmax()])
    compensation = run.effects["compensation"].transpose("ablated", "prompt").values[component]
    prompt = int(np.argsort(compensation, kind="stable")[len(compensation) // 2])
    return WorkedPrompt(
        component, prompt, run.facts.attrs["texts"][prompt], run.facts.attrs["answers"][prompt]
    )


def worked_table(run: FactRun, worked: WorkedPrompt) -> pd.DataFrame:
    """One prompt part by part, in order of depth: ``part, clean, ablated`` (logits, averaged over donors).

    The clean column sums to the clean logit, the ablated one, with the final norm's row, to the ablated
    logit.
    """
    here, component = run.effects.isel(prompt=worked.prompt), worked.component
    effect = here["effect"].values.astype(np.float64)
    ablated = effect + here["change"].transpose("ablated", "observed").values[component]
    ablated[component] -= float(here["direct_effect"][component])
    rest = float(here["clean_logit"]) - effect.sum()
    names = [f"{PARTS[i % 2]} {i // 2}" for i in range(len(effect))]
    return pd.DataFrame(
        {
            "part": ["embedding, constants", *names, "final norm"],
            "clean": [rest, *effect, 0.0],
            "ablated": [rest, *ablated, float(here["norm_term"][component])],
        }
    )


def over_training(effects: xr.Dataset) -> pd.DataFrame:
    """Facts answered, and the effects' means, at each step of the measurement ``layers_over_training``.

    Columns: ``model, prompts, step, quantity, estimate, low, high``. Effects (logits) of attention are means
    over :meth:`LayerMeans.later_attention`, those of MLPs over :meth:`LayerMeans.late_mlps`.
    """
    tables = []
    for step in effects["step"].values.tolist():
        here = effects.sel(step=step)
        means = LayerMeans.of(here)
        n, later, late = means.n_prompts, means.later_attention(), means.late_mlps()
        change = means.late_mlps_ablated().change
        quantities = {
            "answered": mean_over_prompts(here["answered"].values.astype(np.float64)),
            "direct effect": means.direct_effect[later].mean(),
            "total effect": means.total_effect[later].mean(),
            "compensation": means.compensation[later].mean(),
            "late MLPs": means.effect[late].mean(),
            "late MLPs, attention ablated": means.effect[late].mean() + change / len(late),
        }
        for quantity, estimate in quantities.items():
            tables.append(estimate.table({}, model=means.model_name, prompts=n, step=step, quantity=quantity))
    return pd.concat(tables, ignore_index=True)
