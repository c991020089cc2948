"""The papers' claims, what our numbers say of each, and verdicts by rules written before looking.

``claims.yaml`` beside this file names for each claim its source, our wording, the notebook that measures
it, the statistic and the range that the claim puts it in; ``statistics.yaml`` says what each statistic is.
A model's interval wholly inside the range speaks for the claim, wholly outside against it, else it leaves
the matter open.

Claims are kept as one long table, a row for each claim and model (:data:`COLUMNS`). What readers see is
made of it by :func:`results`, which alone rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock

from selfrepair.analysis.estimates import Estimate
from selfrepair.errors import UserError
from selfrepair.store.files import write_atomically

CLAIMS_FILE = Path(__file__).with_name("claims.yaml")
STATISTICS_FILE = Path(__file__).with_name("statistics.yaml")

#: Estimates of one model, each of a single number, by the statistic's id in ``statistics.yaml``.
Statistics = Mapping[str, Estimate]

#: Columns of the long table that hold text. ``claim`` and ``statistic`` are ids, ``source`` is
#: :data:`MEASURED` or :data:`PUBLISHED`; ``holds`` is what :func:`judge` says, empty where nothing is judged.
TEXT_COLUMNS = ("claim", "notebook", "model", "source", "statistic", "unit", "holds")
#: Those that hold numbers; NaN where there is none. ``control`` is the model's value of the statistic's
#: control.
NUMBER_COLUMNS = ("estimate", "low", "high", "control")
COLUMNS = (
    "claim",
    "notebook",
    "model",
    "source",
    "statistic",
    "unit",
    "estimate",
    "low",
    "high",
    "holds",
    "control",
)

MEASURED, PUBLISHED = "measured", "published"
NOT_JUDGED = ""
#: What :func:`verdict` may say, from best to worst.
VERDICTS = ("reproduced", "partly", "not reproduced", "not testable here")

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Statistic:
    """What is counted; ``control`` is the id of the statistic that says what chance gives, or ``None``."""

    id: str
    sentence: str
    unit: str
    control: str | None


@dataclass(frozen=True)
class Claim:
    """A claim of a paper; it holds where ``statistic`` (an id) lies from ``at_least`` to ``at_most``."""

    id: str
    notebook: str
    source: str
    claim: str
    statistic: str
    at_least: float = -np.inf
    at_most: float = np.inf

    @property
    def rule(self) -> str:
        """When it holds, in signs."""
        low = [f"≥ {self.at_least:g}"] if np.isfinite(self.at_least) else []
        high = [f"≤ {self.at_most:g}"] if np.isfinite(self.at_most) else []
        return " and ".join(low + high)


@dataclass(frozen=True)
class ModelResult:
    """One model's value as it is shown, with its interval if it has one, and what it says of the claim."""

    model: str
    value: str
    holds: str


@dataclass(frozen=True)
class ClaimResult:
    """What readers are shown of one claim."""

    claim: Claim
    statistic: Statistic
    published: list[ModelResult]
    measured: list[ModelResult]
    verdict: str


def load_statistics() -> dict[str, Statistic]:
    """The statistics of ``statistics.yaml`` by id, in its order.

    Raises:
        UserError: an unknown or missing key, an id that comes twice, or an unknown control.
    """
    statistics = _load(STATISTICS_FILE, Statistic)
    for statistic in statistics.values():
        if statistic.control is not None and statistic.control not in statistics:
            raise UserError(
                f"{STATISTICS_FILE.name}: '{statistic.id}' has the unknown control '{statistic.control}'"
            )
    return statistics


def load_claims() -> list[Claim]:
    """The claims of ``claims.yaml``, in its order.

    Raises:
        UserError: an unknown or missing key, an id that comes twice, or an unknown statistic.
    """
    claims = _load(CLAIMS_FILE, Claim)
    known = load_statistics()
    for claim in claims.values():
        if claim.statistic not in known:
            raise UserError(
                f"{CLAIMS_FILE.name}: '{claim.id}' is about '{claim.statistic}', "
                f"which is no id in {STATISTICS_FILE.name}"
            )
    return list(claims.values())


def _load(file: Path, kind: type[Entry]) -> dict[str, Entry]:
    """A list of entries, which have the fields of a dataclass as keys, by their ids."""
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    entries: dict[str, Entry] = {}
    for row in yaml.safe_load(file.read_text(encoding="utf-8")):
        name = row.get("id", row)
        if unknown := [key for key in row if key not in fields]:
            raise UserError(
                f"{file.name}: '{name}' has the unknown key '{unknown[0]}'; known are {', '.join(fields)}"
            )
        if missing := [key for key, is_needed in fields.items() if is_needed and key not in row]:
            raise UserError(f"{file.name}: '{name}' lacks the key '{missing[0]}'")
        if name in entries:
            raise UserError(f"{file.name}: '{name}' comes twice")
        entries[name] = kind(**row)
    return entries


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


def claims_table(
    notebook: str, measured: Mapping[str, Statistics], published: Mapping[str, Statistics] | None = None
) -> pd.DataFrame:
    """The long table of ``notebook`` ("01"): its claims, each of every measured and published model.

    A measured model that lacks a claim's statistic has a row without an estimate and is not judged by it; a
    published one has none.

    Raises:
        UserError: a statistic is not in ``statistics.yaml``.
    """
    known = load_statistics()
    sources = {PUBLISHED: published or {}, MEASURED: measured}
    found = [
        (source, model, statistics)
        for source, models in sources.items()
        for model, statistics in models.items()
    ]
    for _, model, statistics in found:
        if unknown := [name for name in statistics if name not in known]:
            raise UserError(f"{model}: '{unknown[0]}' is no id in {STATISTICS_FILE.name}")
    rows = [
        _row(claim, known[claim.statistic], source, model, statistics)
        for claim in load_claims()
        if claim.notebook == notebook
        for source, model, statistics in found
        if source == MEASURED or claim.statistic in statistics
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(
    claim: Claim, statistic: Statistic, source: str, model: str, statistics: Statistics
) -> dict[str, object]:
    nothing = Estimate.bare(np.nan)
    estimate = statistics.get(statistic.id, nothing)
    control = nothing if statistic.control is None else statistics.get(statistic.control, nothing)
    low, high = estimate.interval()
    is_judged = source == MEASURED and statistic.id in statistics
    return {
        "claim": claim.id,
        "notebook": claim.notebook,
        "model": model,
        "source": source,
        "statistic": statistic.id,
        "unit": statistic.unit,
        "estimate": float(estimate.value),
        "low": float(low),
        "high": float(high),
        "holds": judge(float(low), float(high), claim) if is_judged else NOT_JUDGED,
        "control": float(control.value),
    }


def verdicts(table: pd.DataFrame) -> dict[str, str]:
    """The verdict on each claim of a long table, by its id; our numbers alone are judged."""
    return {
        str(claim): verdict([holds for holds in rows["holds"] if holds != NOT_JUDGED])
        for claim, rows in table[table["source"] == MEASURED].groupby("claim", sort=False)
    }


def results(table: pd.DataFrame) -> list[ClaimResult]:
    """A long table as it is shown, claim by claim in its order."""
    claims = {claim.id: claim for claim in load_claims()}
    statistics = load_statistics()
    return [
        ClaimResult(
            claims[name],
            statistics[claims[name].statistic],
            [
                ModelResult(row.model, f"{row.estimate:.2f}", row.holds)
                for row in _of_claim(table, name, PUBLISHED)
            ],
            [
                ModelResult(row.model, _with_interval(row.estimate, row.low, row.high), row.holds)
                for row in _of_claim(table, name, MEASURED)
                if row.holds != NOT_JUDGED
            ],
            found,
        )
        for name, found in verdicts(table).items()
    ]


def _of_claim(table: pd.DataFrame, claim: str, source: str) -> list[tuple]:
    """Named tuples of rows."""
    return list(table[(table["claim"] == claim) & (table["source"] == source)].itertuples())


def _with_interval(estimate: float, low: float, high: float) -> str:
    digits = 2 if max(abs(estimate), abs(low), abs(high)) >= 0.1 else 3
    return f"{estimate:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def to_markdown(table: pd.DataFrame) -> str:
    """A long table for people, in Markdown: one row for each claim, one line for each model in its cells."""
    lines = [
        "| claim | measured by; holds if | published | measured | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results(table):
        cells = (
            f"{result.claim.claim} ({result.claim.source})",
            f"{result.statistic.sentence}; {result.claim.rule}",
            "<br>".join(f"{shown.model} {shown.value}" for shown in result.published),
            "<br>".join(f"{shown.model} {shown.value} {shown.holds}" for shown in result.measured),
            f"**{result.verdict}**",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def write_claims(table: pd.DataFrame, out_dir: Path) -> None:
    """Keeps one notebook's long table in ``claims/``, and all so far in ``figures/claims.csv`` and ``.md``.

    Raises:
        UserError: as :func:`read_claims`, of another notebook's table.
    """
    parts, folder = out_dir / "claims", out_dir / "figures"
    (notebook,) = set(table["notebook"])
    parts.mkdir(parents=True, exist_ok=True)
    with FileLock(parts / "claims.lock"):  # notebooks may run side by side
        write_atomically(parts / f"{notebook}.csv", _to_csv(table))
        whole = pd.concat([read_claims(part) for part in sorted(parts.glob("*.csv"))], ignore_index=True)
        write_atomically(folder / "claims.csv", _to_csv(whole))
        write_atomically(folder / "claims.md", (to_markdown(whole) + "\n").encode())


def _to_csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, float_format="%.9g").encode()


def read_claims(file: Path) -> pd.DataFrame:
    """A long table that :func:`write_claims` wrote.

    Raises:
        UserError: it is none, or of claims that ``claims.yaml`` no longer has.
    """
    types = dict.fromkeys(TEXT_COLUMNS, str) | dict.fromkeys(NUMBER_COLUMNS, float)
    empty = {name: [""] for name in NUMBER_COLUMNS}  # only there: a model may be called "NA"
    try:
        table = pd.read_csv(file, dtype=types, keep_default_na=False, na_values=empty)[list(COLUMNS)]
        if unknown := set(table["claim"]) - {claim.id for claim in load_claims()}:
            raise ValueError(f"unknown claims {unknown}")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file}: cannot be read ({type(error).__name__}); delete it and run 'selfrepair notebooks' again"
        ) from error
    return table
