"""The papers' claims, what our numbers say of each, and verdicts by rules written before looking.

``claims.yaml`` beside this file names for each claim its source, our wording, the statistic and the
range that the claim puts it in. A model's interval wholly inside the range speaks for the claim,
wholly outside against it, else it leaves the matter open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
import yaml
from jaxtyping import Float

from selfrepair.breakdown import with_self_repair
from selfrepair.statistics import bootstrap_weights, select_top

CLAIMS_FILE = Path(__file__).with_name("claims.yaml")


@dataclass(frozen=True)
class HeadMeans:
    """Mean self-repair and direct effect (logits) of every head; last axis: the estimate, then bootstrap samples of it."""

    self_repair: Float[np.ndarray, "layer head sample"]
    direct_effect: Float[np.ndarray, "layer head sample"]

    @classmethod
    def of_sweep(cls, sweep: xr.Dataset, fraction: float, n_bootstrap: int = 1000, seed: int = 0) -> HeadMeans:
        """Over each head's top ``fraction`` of tokens; samples draw whole prompts."""
        sweep = with_self_repair(sweep)
        n_prompts = sweep.sizes["prompt"]
        weights = np.concatenate([np.ones((1, n_prompts)), bootstrap_weights(n_prompts, n_bootstrap, seed)])
        effect, repair = (sweep[name].values.astype(np.float64) for name in ("direct_effect", "self_repair"))
        chosen = np.stack([[select_top(head, fraction) for head in layer] for layer in effect])
        counts = chosen.sum(-1) @ weights.T
        means = [np.where(chosen, values, 0).sum(-1) @ weights.T / np.where(counts, counts, np.nan) for values in (repair, effect)]
        return cls(*means)

    @classmethod
    def of_table(cls, table: pd.DataFrame) -> HeadMeans:
        """Of one model's rows of a heads table: the estimate alone."""
        shape = (table["layer"].nunique(), table["head"].nunique(), 1)
        ordered = table.sort_values(["layer", "head"])
        return cls(*(ordered[name].to_numpy().reshape(shape) for name in ("self_repair", "direct_effect")))

    def layers(self, first: float, last: float) -> HeadMeans:
        """The layers from the fraction ``first`` of the depth up to ``last``."""
        n = len(self.self_repair)
        part = slice(round(first * n), round(last * n))
        return HeadMeans(self.self_repair[part], self.direct_effect[part])


def _mean_repair(heads: HeadMeans) -> np.ndarray:
    return np.nanmean(heads.self_repair, axis=(0, 1))


#: Name → function from head means to one value per sample.
STATISTICS: dict[str, Callable[[HeadMeans], np.ndarray]] = {
    "mean self-repair, later half of layers": lambda heads: _mean_repair(heads.layers(0.5, 1)),
    "share of heads with positive self-repair, later half of layers": lambda heads: (heads.layers(0.5, 1).self_repair > 0).mean((0, 1)),
    "self-repair over direct effect, later half of layers": lambda heads: (
        np.nansum(heads.layers(0.5, 1).self_repair, axis=(0, 1)) / np.nansum(heads.layers(0.5, 1).direct_effect, axis=(0, 1))
    ),
    "mean self-repair, first quarter of layers": lambda heads: _mean_repair(heads.layers(0, 0.25)),
    "mean self-repair, later half minus first quarter": lambda heads: (
        _mean_repair(heads.layers(0.5, 1)) - _mean_repair(heads.layers(0, 0.25))
    ),
}


@dataclass(frozen=True)
class Claim:
    """A claim of a paper; it holds for a model where ``statistic`` lies between ``at_least`` and ``at_most``."""

    id: str
    source: str
    claim: str
    statistic: str
    at_least: float
    at_most: float


def load_claims() -> list[Claim]:
    """The claims of ``claims.yaml``, in its order."""
    rows = yaml.safe_load(CLAIMS_FILE.read_text())
    return [Claim(**{"at_least": -np.inf, "at_most": np.inf, **row}) for row in rows]


def judge(low: float, high: float, claim: Claim) -> str:
    """What one model's interval says of a claim: ``yes``, ``no`` or ``open``."""
    if claim.at_least <= low and high <= claim.at_most:
        return "yes"
    if high < claim.at_least or low > claim.at_most:
        return "no"
    return "open"


def verdict(judgements: list[str]) -> str:
    """*reproduced* if every model says yes, *not reproduced* if none does, else *partly*."""
    if not judgements:
        return "not testable here"
    if all(judgement == "yes" for judgement in judgements):
        return "reproduced"
    return "partly" if "yes" in judgements else "not reproduced"


def claims_table(measured: dict[str, HeadMeans], published: dict[str, HeadMeans]) -> pd.DataFrame:
    """One row per claim: the published values, ours with 95 % intervals per model, and the verdict."""
    rows = []
    for claim in load_claims():
        statistic = STATISTICS[claim.statistic]
        results, judgements = [], []
        for model, heads in measured.items():
            samples = statistic(heads)
            low, high = np.nanquantile(samples[1:], [0.025, 0.975])
            judgements.append(judge(low, high, claim))
            results.append(f"{model} {samples[0]:.2f} [{low:.2f}, {high:.2f}] {judgements[-1]}")
        rows.append(
            {
                "id": claim.id,
                "source": claim.source,
                "claim": claim.claim,
                "statistic": claim.statistic,
                "holds if": _range(claim),
                "published": "; ".join(f"{model} {statistic(heads)[0]:.2f}" for model, heads in published.items()),
                "measured": "; ".join(results),
                "verdict": verdict(judgements),
            }
        )
    return pd.DataFrame(rows)


def _range(claim: Claim) -> str:
    ends = [f"≥ {claim.at_least:g}" if np.isfinite(claim.at_least) else "", f"≤ {claim.at_most:g}" if np.isfinite(claim.at_most) else ""]
    return " and ".join(end for end in ends if end)


def to_markdown(table: pd.DataFrame) -> str:
    """The claims table as Markdown, one line per model in the cells that list models."""
    head = [column for column in table.columns if column != "id"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in table[head].itertuples(index=False):
        lines.append("| " + " | ".join(str(value).replace("; ", "<br>") for value in row) + " |")
    return "\n".join(lines)
