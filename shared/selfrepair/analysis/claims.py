"""What our numbers, and the released ones, say of the papers' claims: one long table, and how it is shown.

Statistics, claims and the rules of judging are those of :mod:`selfrepair.analysis.rules`. The table has a
row for each claim and model (:data:`COLUMNS`). What readers see is made of it by :func:`results`, which
alone rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from filelock import FileLock

from selfrepair.analysis.estimates import Estimate, Interval
from selfrepair.analysis.rules import (
    MEASURED,
    NO,
    PUBLISHED,
    STATISTICS_FILE,
    VERDICTS,
    YES,
    Claim,
    Statistic,
    judge,
    load_claims,
    load_statistics,
    verdict,
)
from selfrepair.errors import UserError
from selfrepair.markdown import plain
from selfrepair.store.files import unreadable, write_atomically

#: Estimates of one model, each of a single number, by the statistic's id in ``statistics.yaml``.
Statistics = Mapping[str, Estimate]

#: Columns of the long table that hold text. ``claim`` and ``statistic`` are ids, ``source`` is
#: :data:`MEASURED` or :data:`PUBLISHED`; ``holds`` is what :func:`judge` says, empty where nothing is judged.
TEXT_COLUMNS = ("claim", "notebook", "model", "source", "statistic", "unit", "holds")
#: Those that hold numbers; NaN where there is none. ``control`` is what chance gives; ``advantage`` is the
#: distance from it, positive on the claimed side.
NUMBER_COLUMNS = ("estimate", "low", "high", "control", "advantage_low", "advantage_high")
COLUMNS = (*TEXT_COLUMNS[:-1], *NUMBER_COLUMNS, "holds")

NOT_JUDGED = ""
#: What is shown where there is no value, and how many decimals are shown at most.
NO_VALUE, MOST_DIGITS = "–", 6

#: How a table of claims is read, in Markdown.
LEGEND = (
    "A model says *yes* if its 95% interval (bootstrap over prompts) lies in the range of the rule and, "
    "less its control, on the claimed side of 0; *no* if either lies wholly on the other side; else *open*. "
    "Published values have no interval: their yes or no is by the estimate, and by the range alone where "
    "their control was not released. Those of heads are over the top 2% of tokens, and are left out beside "
    "any other share. Verdicts: "
    + "; ".join(f"*{name}*: {meaning}" for name, meaning in VERDICTS.items())
    + ". Beside a verdict stands how many models say yes, and how many no if any does, of those that have "
    "what the claim is about."
)


@dataclass(frozen=True)
class ModelResult:
    """One model's value as it is shown, with its interval and control if it has them, and what it says."""

    model: str
    value: str
    holds: str


@dataclass(frozen=True)
class ClaimResult:
    """What readers are shown of one claim; verdicts are on our numbers and on the published ones.

    ``controls_in_range`` counts the measured models whose control alone lies in the range of a claim that has
    two ends; 0 for others.
    """

    claim: Claim
    statistic: Statistic
    control: str
    published: list[ModelResult]
    measured: list[ModelResult]
    verdict: str
    published_verdict: str
    controls_in_range: int

    @property
    def verdict_in_full(self) -> str:
        """On our numbers: ``partly, 2 yes, 3 no, of 6``, or where none says no: ``partly, 2 of 6``."""
        said = _in_full(self.verdict, self.measured)
        if self.controls_in_range:
            said += f"; the control alone lies in the range in {self.controls_in_range}"
        return said

    @property
    def published_verdict_in_full(self) -> str:
        """On the published ones; empty without any."""
        return _in_full(self.published_verdict, self.published)


def _in_full(verdict: str, models: Sequence[ModelResult]) -> str:
    if not models:
        return verdict
    yes, no = (sum(model.holds == said for model in models) for said in (YES, NO))
    return f"{verdict}, {yes} yes, {no} no, of {len(models)}" if no else f"{verdict}, {yes} of {len(models)}"


def claims_table(
    notebook: str, measured: Mapping[str, Statistics], published: Mapping[str, Statistics] | None = None
) -> pd.DataFrame:
    """The long table of ``notebook`` ("01"): its claims, each of every measured and published model.

    A measured model that lacks a claim's statistic has a row without an estimate and is not judged by it; a
    published one has none.

    Raises:
        UserError: a statistic is not in ``statistics.yaml``, or was measured without its control.
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
    for model, statistics in measured.items():
        for name in statistics:
            if (control := known[name].control_id) is not None and control not in statistics:
                raise UserError(f"{model}: '{name}' was measured without its control '{control}'")
    rows = [
        _row(claim, known[claim.statistic], source, model, statistics)
        for claim in load_claims()
        if claim.notebook == notebook
        for source, model, statistics in found
        if source == MEASURED or claim.statistic in statistics
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    # As they are kept: what is shown of a table is then the same before and after.
    return table.assign(**{name: [float(f"{value:.9g}") for value in table[name]] for name in NUMBER_COLUMNS})


def _row(
    claim: Claim, statistic: Statistic, source: str, model: str, statistics: Statistics
) -> dict[str, object]:
    nothing = Estimate.bare(np.nan)
    estimate = statistics.get(statistic.id, nothing)
    control = (
        statistics.get(statistic.control_id, nothing)
        if statistic.control_id is not None
        else Estimate.bare(float(cast(float, statistic.control)))
    )
    advantage = (estimate - control) * claim.side
    found, beyond = _ends(estimate), _ends(advantage)
    is_judged = statistic.id in statistics
    has_control = np.isfinite(control.value) or source == MEASURED
    return {
        "claim": claim.id,
        "notebook": claim.notebook,
        "model": model,
        "source": source,
        "statistic": statistic.id,
        "unit": statistic.unit,
        "estimate": float(estimate.value),
        "low": float(estimate.interval().low),
        "high": float(estimate.interval().high),
        "control": float(control.value),
        "advantage_low": float(advantage.interval().low),
        "advantage_high": float(advantage.interval().high),
        "holds": judge(claim, found, beyond if has_control else None) if is_judged else NOT_JUDGED,
    }


def _ends(estimate: Estimate) -> Interval:
    """The interval; of a number without samples, that number twice."""
    low, high = estimate.interval()
    value = float(estimate.value)
    return Interval(value, value) if not estimate.samples.shape[-1] else Interval(float(low), float(high))


def verdicts(table: pd.DataFrame, source: str = MEASURED) -> dict[str, str]:
    """The verdict of one source's numbers on each claim of a long table, by its id."""
    of_source = table[(table["source"] == source) & (table["holds"] != NOT_JUDGED)]
    return {
        str(claim): verdict(list(of_source.loc[of_source["claim"] == claim, "holds"]))
        for claim in dict.fromkeys(table["claim"])
    }


def results(table: pd.DataFrame) -> list[ClaimResult]:
    """A long table as it is shown, claim by claim in its order."""
    claims = {claim.id: claim for claim in load_claims()}
    statistics = load_statistics()
    on_published = verdicts(table, PUBLISHED)
    shown = []
    for name, found in verdicts(table).items():
        claim, of_claim = claims[name], table[(table["claim"] == name) & (table["holds"] != NOT_JUDGED)]
        statistic = statistics[claim.statistic]
        by_source = {source: rows for source, rows in of_claim.groupby("source")}
        published, measured = (
            _of_models(by_source.get(source), statistic) for source in (PUBLISHED, MEASURED)
        )
        shown.append(
            ClaimResult(
                claim,
                statistic,
                f"{statistic.control:g}, {statistic.control_is}"
                if statistic.control_id is None
                else statistics[statistic.control_id].sentence,
                published,
                measured,
                found,
                on_published[name] if PUBLISHED in by_source else "",
                _controls_in_range(by_source.get(MEASURED), claim, statistic),
            )
        )
    return shown


def _controls_in_range(rows: pd.DataFrame | None, claim: Claim, statistic: Statistic) -> int:
    if rows is None or statistic.control_id is None or not np.isfinite([claim.at_least, claim.at_most]).all():
        return 0
    return int(rows["control"].between(claim.at_least, claim.at_most).sum())


def _of_models(rows: pd.DataFrame | None, statistic: Statistic) -> list[ModelResult]:
    return [
        ModelResult(row.model, _value(row, statistic), row.holds)
        for row in ([] if rows is None else rows.itertuples())
    ]


def _value(row: Any, statistic: Statistic) -> str:
    """Value, interval and measured control, to the same two or three significant digits.

    To more where a yes or no could not be seen otherwise: the value and its control would read alike. A dash
    where there is no value.
    """
    if not np.isfinite(row.estimate):
        return NO_VALUE
    numbers = [row.estimate, *(end for end in (row.low, row.high) if np.isfinite(end))]
    has_control = statistic.control_id is not None and np.isfinite(row.control)
    digits = _digits(numbers)
    while (
        has_control
        and row.holds in (YES, NO)
        and digits < MOST_DIGITS
        and f"{row.estimate:.{digits}f}" == f"{row.control:.{digits}f}"
        and row.estimate != row.control
    ):
        digits += 1
    value, *ends = (f"{number:.{digits}f}" for number in numbers)
    interval = f" [{', '.join(ends)}]" if ends else ""
    return value + interval + (f" (control {row.control:.{digits}f})" if has_control else "")


def _digits(numbers: Sequence[float]) -> int:
    """Decimals that show two or three significant digits of the largest."""
    largest = max(map(abs, numbers))
    return next((digits for digits, least in enumerate((100, 10, 0.1, 0.01)) if largest >= least), 4)


def to_markdown(table: pd.DataFrame) -> str:
    """A long table for people, in Markdown: a row for each claim, a line for each model; how to read it."""
    lines = [
        "| claim | measured by; holds if; control | published | measured | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results(table):
        claim, statistic = result.claim, result.statistic
        cells = (
            f"{claim.claim} ({claim.source})",
            f"{statistic.sentence}; {claim.rule}; control: {result.control}. "
            f"Rule written {claim.written} looking, {claim.date}",
            _lines(result.published)
            + (f"<br>*{result.published_verdict_in_full}*" if result.published else ""),
            _lines(result.measured),
            f"**{result.verdict_in_full}**",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", LEGEND])


def _lines(of_models: Sequence[ModelResult]) -> str:
    return "<br>".join(f"{plain(shown.model)} {shown.value} {shown.holds}" for shown in of_models)


def write_claims(table: pd.DataFrame, out_dir: Path) -> None:
    """Keeps one notebook's long table in ``claims/``, and all so far in ``figures/claims.csv`` and ``.md``.

    Raises:
        UserError: as :func:`read_claims`, of another notebook's table.
    """
    parts = out_dir / "claims"
    (notebook,) = set(table["notebook"])
    parts.mkdir(parents=True, exist_ok=True)
    with FileLock(parts / "claims.lock"):  # notebooks may run side by side
        write_atomically(parts / f"{notebook}.csv", _to_csv(table))
        join_claims(sorted(parts.glob("*.csv")), out_dir)


def join_claims(parts: Sequence[Path], out_dir: Path) -> None:
    """Writes notebooks' long tables, one at least, as one: ``figures/claims.csv``, and ``.md`` for people.

    Raises:
        UserError: as :func:`read_claims`.
    """
    whole = pd.concat([read_claims(part) for part in parts], ignore_index=True)
    write_atomically(out_dir / "figures" / "claims.csv", _to_csv(whole))
    write_atomically(out_dir / "figures" / "claims.md", (to_markdown(whole) + "\n").encode())


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
        raise unreadable(file, error) from error
    return table
