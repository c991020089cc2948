"""The papers' claims, what our numbers say of each, and verdicts by rules written before looking.

``claims.yaml`` beside this file names for each claim its source, our wording, the notebook that measures
it, the statistic and the range that the claim puts it in. A model's interval wholly inside the range
speaks for the claim, wholly outside against it, else it leaves the matter open.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

CLAIMS_FILE = Path(__file__).with_name("claims.yaml")

#: Statistic → the estimate, then bootstrap samples of it (or the estimate alone, as of released numbers).
Samples = dict[str, np.ndarray]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper; it holds for a model where ``statistic`` lies between ``at_least`` and ``at_most``."""

    id: str
    notebook: str
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


def claims_table(notebook: str, measured: dict[str, Samples], published: dict[str, Samples] | None = None) -> pd.DataFrame:
    """One row per claim of ``notebook`` ("01"): the published values, ours with 95 % intervals per model, and the verdict.

    A model that lacks a claim's statistic is not judged by it.
    """
    rows = []
    for claim in load_claims():
        if claim.notebook != notebook:
            continue
        results, judgements = [], []
        for model, statistics in measured.items():
            if claim.statistic not in statistics:
                continue
            samples = statistics[claim.statistic]
            low, high = np.nanquantile(samples[1:], [0.025, 0.975])
            judgements.append(judge(low, high, claim))
            digits = 2 if max(abs(samples[0]), abs(low), abs(high)) >= 0.1 else 3
            results.append(f"{model} {samples[0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] {judgements[-1]}")
        known = {model: statistics[claim.statistic][0] for model, statistics in (published or {}).items() if claim.statistic in statistics}
        rows.append(
            {
                "id": claim.id,
                "notebook": notebook,
                "source": claim.source,
                "claim": claim.claim,
                "statistic": claim.statistic,
                "holds if": _range(claim),
                "published": "; ".join(f"{model} {value:.2f}" for model, value in known.items()),
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
    lines = ["| claim | measured by; holds if | published | measured | verdict |", "| --- | --- | --- | --- | --- |"]
    for row in table.rename(columns={"holds if": "rule"}).itertuples():
        cells = (
            f"{row.claim} ({row.source})",
            f"{row.statistic}; {row.rule}",
            _lines(row.published),
            _lines(row.measured),
            f"**{row.verdict}**",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _lines(models: str) -> str:
    return models.replace("; ", "<br>")
