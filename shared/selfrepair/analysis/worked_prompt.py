"""One prompt taken apart: what each part of a model says on it, clean and with a layer ablated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.layer_means import PARTS
from selfrepair.analysis.layers import LayerRun


@dataclass(frozen=True)
class WorkedPrompt:
    """One prompt, the number of the component that is ablated on it, and how that is done."""

    component: int
    prompt: int
    text: str
    answer: str
    model: str
    ablation: str
    positions: str
    n_donors: int


def worked_prompt(run: LayerRun, facts: xr.Dataset) -> WorkedPrompt:
    """The attention with the largest mean direct effect, on the prompt of median compensation.

    That is neither the best nor the worst case. Attention with none above does not count, unless there is one
    layer.
    """
    attention = np.arange(0, max(2, 2 * (run.means.n_layers - 1)), 2)
    component = int(attention[run.means.direct_effect[attention].value.argmax()])
    compensation = run.effects["compensation"].transpose("ablated", "prompt").values[component]
    prompt = int(np.argsort(compensation, kind="stable")[len(compensation) // 2])
    attrs = run.effects.attrs
    return WorkedPrompt(
        component,
        prompt,
        text=facts.attrs["texts"][prompt],
        answer=facts.attrs["answers"][prompt],
        model=run.name,
        ablation=attrs["ablation"],
        positions={"last": "the last position", "all": "all positions"}[attrs["layer_positions"]],
        n_donors=int(run.effects["n_donors"][prompt]),
    )


def worked_table(run: LayerRun, worked: WorkedPrompt) -> pd.DataFrame:
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


def worked_sums(table: pd.DataFrame, component: int) -> pd.DataFrame:
    """What of :func:`worked_table` changes (logits): the ablated part, what is above it, the final norm."""
    change = (table["ablated"] - table["clean"]).to_numpy()
    own = component + 1  # the first row is what no component writes
    sums = {
        "ablated part": change[own],
        "parts above": change[own + 1 : -1].sum(),
        "final norm": change[-1],
        "logit": change.sum(),
    }
    return pd.DataFrame([sums])
