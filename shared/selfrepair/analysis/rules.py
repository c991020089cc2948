"""The papers' claims, the statistics that they are about, and the rules by which numbers decide them.

``claims.yaml`` beside this file names for each claim its source, our wording, the notebook that measures
it, the statistic, the range that the claim puts it in, and when that rule was written; ``statistics.yaml``
says what each statistic is and what its control is: what chance would give.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import yaml

from selfrepair.errors import UserError

if TYPE_CHECKING:
    from selfrepair.analysis.estimates import Interval

CLAIMS_FILE = Path(__file__).with_name("claims.yaml")
STATISTICS_FILE = Path(__file__).with_name("statistics.yaml")

#: What :func:`judge` says of one model.
YES, NO, OPEN = "yes", "no", "open"
#: What :func:`verdict` may say, from best to worst, and when.
VERDICTS = {
    "reproduced": "every model says yes",
    "partly": "some models say yes, not all",
    "undecided": "none says yes, and no more than half say no",
    "not reproduced": "none says yes, and most say no: their intervals exclude it",
    "not testable here": "no model has what the claim is about",
}
WRITTEN = ("before", "after")
#: Whose numbers an estimate is of.
MEASURED, PUBLISHED = "measured", "published"

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Statistic:
    """What is counted.

    ``control`` is what chance gives: the id of the statistic that measures it, or a number that is true by
    definition, with ``control_is`` in words (``random signs``). ``None`` for what is a control itself.
    """

    id: str
    sentence: str
    unit: str
    control: str | float | None
    control_is: str = ""

    @property
    def control_id(self) -> str | None:
        """Of a control that is measured."""
        return self.control if isinstance(self.control, str) else None


@dataclass(frozen=True)
class Claim:
    """A claim of a paper: ``statistic`` lies from ``at_least`` to ``at_most``, and beyond its control.

    ``written`` says whether the rule was written before or after results were looked at, ``date`` when
    (YYYY-MM-DD).
    """

    id: str
    notebook: str
    source: str
    claim: str
    statistic: str
    written: str
    date: str
    at_least: float = -np.inf
    at_most: float = np.inf

    @property
    def rule(self) -> str:
        """The range, in signs."""
        low = [f"≥ {self.at_least:g}"] if np.isfinite(self.at_least) else []
        high = [f"≤ {self.at_most:g}"] if np.isfinite(self.at_most) else []
        return " and ".join(low + high)

    @property
    def side(self) -> int:
        """1 if the statistic must lie above its control, as where the rule has a lower end; else -1."""
        return 1 if np.isfinite(self.at_least) else -1


def load_statistics() -> dict[str, Statistic]:
    """The statistics of ``statistics.yaml`` by id, in its order.

    Raises:
        UserError: an unknown or missing key, an id that comes twice, an unknown control, or a number as
            control without words.
    """
    statistics = _load(STATISTICS_FILE, Statistic)
    for statistic in statistics.values():
        where = f"{STATISTICS_FILE.name}: '{statistic.id}'"
        if statistic.control_id is not None and statistic.control_id not in statistics:
            raise UserError(f"{where} has the unknown control '{statistic.control}'")
        if isinstance(statistic.control, (int, float)) != bool(statistic.control_is):
            raise UserError(f"{where} needs 'control_is' if its control is a number, and only then")
    return statistics


def load_claims() -> list[Claim]:
    """The claims of ``claims.yaml``, in its order.

    Raises:
        UserError: an unknown or missing key, an id that comes twice, an unknown statistic or one without a
            control, or ``written`` neither before nor after.
    """
    claims = _load(CLAIMS_FILE, Claim)
    known = load_statistics()
    for claim in claims.values():
        where = f"{CLAIMS_FILE.name}: '{claim.id}'"
        if claim.statistic not in known:
            raise UserError(f"{where} is about '{claim.statistic}', which is no id in {STATISTICS_FILE.name}")
        if known[claim.statistic].control is None:
            raise UserError(f"{where} is about '{claim.statistic}', which has no control")
        if claim.written not in WRITTEN:
            raise UserError(f"{where}: 'written' must be {' or '.join(WRITTEN)}, not '{claim.written}'")
    return list(claims.values())


def _load(file: Path, kind: type[Entry]) -> dict[str, Entry]:
    """A list of entries, which have the fields of a dataclass as keys, by their ids."""
    fields = {
        field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cast(Any, kind))
    }
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


def judge(claim: Claim, found: Interval, advantage: Interval | None) -> str:
    """What one model says of a claim: ``yes``, ``no`` or ``open``.

    ``found`` is the statistic's interval, ``advantage`` that of its distance from the control, positive on
    the claimed side; ``None`` where the control is unknown. *Yes* if the first lies in the claim's range and
    the second above 0, *no* if either lies wholly on the other side.
    """
    if found.high < claim.at_least or found.low > claim.at_most:
        return NO
    if advantage is not None and advantage.high <= 0:
        return NO
    is_in_range = claim.at_least <= found.low and found.high <= claim.at_most
    return YES if is_in_range and (advantage is None or advantage.low > 0) else OPEN


def verdict(judgements: Sequence[str]) -> str:
    """One of ``VERDICTS``, by its rule."""
    if not judgements:
        return "not testable here"
    said = Counter(judgements)
    if said[YES]:
        return "reproduced" if said[YES] == len(judgements) else "partly"
    return "not reproduced" if 2 * said[NO] > len(judgements) else "undecided"
