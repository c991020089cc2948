"""Claims and statistics as they are registered, judged, kept and shown."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import yaml

from selfrepair.analysis import claims
from selfrepair.analysis.claims import (
    COLUMNS,
    VERDICTS,
    Claim,
    claims_table,
    judge,
    load_claims,
    load_statistics,
    read_claims,
    results,
    to_markdown,
    verdict,
    verdicts,
    write_claims,
)
from selfrepair.analysis.estimates import Estimate
from selfrepair.errors import UserError

STATISTICS = [
    {"id": "repair", "sentence": "mean repair | all heads", "unit": "logits", "control": None},
    {"id": "share", "sentence": "share of repair", "unit": "share", "control": "chance"},
    {"id": "chance", "sentence": "share of harm", "unit": "share", "control": None},
]
CLAIMS = [
    {
        "id": "exists",
        "notebook": "01",
        "source": "R&N",
        "claim": "It exists.",
        "statistic": "repair",
        "at_least": 0,
    },
    {
        "id": "some",
        "notebook": "01",
        "source": "R&N",
        "claim": "Some.",
        "statistic": "share",
        "at_least": 0.2,
        "at_most": 0.4,
    },
    {
        "id": "small",
        "notebook": "02",
        "source": "R&N",
        "claim": "Small.",
        "statistic": "repair",
        "at_most": 0.1,
    },
]


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Puts entries in the place of the shipped files."""

    def register(claim_rows=CLAIMS, statistic_rows=STATISTICS):
        for name, rows in (("CLAIMS_FILE", claim_rows), ("STATISTICS_FILE", statistic_rows)):
            file = tmp_path / name.replace("_FILE", ".yaml").lower()
            file.write_text(yaml.safe_dump(rows, allow_unicode=True), encoding="utf-8")
            monkeypatch.setattr(claims, name, file)

    register()
    return register


def between(value, low, high):
    """An estimate with that interval: its samples lie at the ends alone."""
    return Estimate(np.array([value, *[low] * 50, *[high] * 50], dtype=np.float64))


MODELS = {
    "m|1": {
        "repair": between(0.05, 0.03, 0.0712),
        "share": between(0.3, 0.25, 0.35),
        "chance": between(0.5, 0.4, 0.6),
    },
    "NA": {"repair": between(-1.234, -2.5, -0.25), "share": between(0.3, 0.1, 0.35)},
    "without": {},
}
RELEASED = {
    "gpt2": {"repair": Estimate.bare(0.0256)},
    "opt": {"share": Estimate.bare(0.5), "chance": Estimate.bare(0.125)},
}


# --- what is registered ---------------------------------------------------------------------------


def test_shipped_claims_and_statistics_belong_together():
    known, found = load_statistics(), load_claims()
    used = {claim.statistic for claim in found}
    used |= {known[name].control for name in used}
    assert used - {None} == set(known), "each statistic is in a claim or is a control"
    assert len({statistic.sentence for statistic in known.values()}) == len(known)
    for claim in found:
        assert (
            claim.notebook and claim.source and claim.claim and claim.at_least < claim.at_most and claim.rule
        )
    assert known["erasing-share"].control == "supporting-share"


@pytest.mark.parametrize(
    ("claim_changes", "statistic_changes", "said"),
    [
        (
            {"statistic": "repiar"},
            {},
            "claims.yaml: 'small' is about 'repiar', which is no id in statistics.yaml",
        ),
        (
            {"at_leest": 0},
            {},
            "claims.yaml: 'small' has the unknown key 'at_leest'; known are id, notebook, source",
        ),
        ({"source": None}, {}, "claims.yaml: 'small' lacks the key 'source'"),
        ({"id": "exists"}, {}, "claims.yaml: 'exists' comes twice"),
        ({}, {"control": "luck"}, "statistics.yaml: 'chance' has the unknown control 'luck'"),
        (
            {},
            {"units": "logits"},
            "statistics.yaml: 'chance' has the unknown key 'units'; known are id, sentence, unit, control",
        ),
        ({}, {"unit": None}, "statistics.yaml: 'chance' lacks the key 'unit'"),
        ({}, {"id": "repair"}, "statistics.yaml: 'repair' comes twice"),
    ],
)
def test_a_fault_in_a_registry_is_one_line(registered, claim_changes, statistic_changes, said):
    def changed(rows, changes):
        """The last row; ``None`` takes a key away."""
        last = rows[-1] | changes
        return [
            *rows[:-1],
            {key: value for key, value in last.items() if value is not None or key not in changes},
        ]

    registered(changed(CLAIMS, claim_changes), changed(STATISTICS, statistic_changes))
    with pytest.raises(UserError) as error:
        load_claims()
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_statistic_that_is_not_registered_is_refused(registered):
    stray = {"repair": Estimate.bare(0.0), "repiar": Estimate.bare(0.0)}
    for measured, published in (({"m": stray}, None), ({"m": {}}, {"p": stray})):
        with pytest.raises(UserError, match=r"^[mp]: 'repiar' is no id in statistics.yaml$"):
            claims_table("01", measured, published)


# --- what is judged -------------------------------------------------------------------------------


def test_rules():
    claim = Claim("x", "", "", "", "", at_least=0, at_most=1)
    intervals = {(0.1, 0.9): "yes", (-0.1, 0.5): "open", (0.5, 1.5): "open", (1.1, 2): "no", (-2, -1): "no"}
    intervals |= {(0, 1): "yes", (math.nan, math.nan): "open"}
    assert {interval: judge(*interval, claim) for interval in intervals} == intervals
    assert verdict(["yes", "yes"]) == "reproduced"
    assert verdict(["yes", "no"]) == verdict(["yes", "open"]) == "partly"
    assert verdict(["no", "open"]) == "not reproduced"
    assert verdict([]) == "not testable here"
    assert VERDICTS == ("reproduced", "partly", "not reproduced", "not testable here")


def test_rules_in_signs():
    ends = [{"at_least": 0.5}, {"at_most": 0}, {"at_least": 0.2, "at_most": 0.4}]
    assert [Claim("", "", "", "", "", **end).rule for end in ends] == ["≥ 0.5", "≤ 0", "≥ 0.2 and ≤ 0.4"]


def test_the_long_table_by_hand(registered):
    nan = math.nan
    wanted = [
        ("exists", "01", "gpt2", "published", "repair", "logits", 0.0256, nan, nan, "", nan),
        ("exists", "01", "m|1", "measured", "repair", "logits", 0.05, 0.03, 0.0712, "yes", nan),
        ("exists", "01", "NA", "measured", "repair", "logits", -1.234, -2.5, -0.25, "no", nan),
        ("exists", "01", "without", "measured", "repair", "logits", nan, nan, nan, "", nan),
        ("some", "01", "opt", "published", "share", "share", 0.5, nan, nan, "", 0.125),
        ("some", "01", "m|1", "measured", "share", "share", 0.3, 0.25, 0.35, "yes", 0.5),
        ("some", "01", "NA", "measured", "share", "share", 0.3, 0.1, 0.35, "open", nan),
        ("some", "01", "without", "measured", "share", "share", nan, nan, nan, "", nan),
    ]
    table = claims_table("01", MODELS, RELEASED)
    pd.testing.assert_frame_equal(table, pd.DataFrame(wanted, columns=list(COLUMNS)))
    assert verdicts(table) == {"exists": "partly", "some": "partly"}
    assert verdicts(claims_table("02", MODELS, RELEASED)) == {"small": "reproduced"}


def test_published_numbers_and_models_without_the_statistic_are_not_judged(registered):
    released = {"gpt2": {"repair": Estimate.bare(-5.0)}}
    assert verdicts(claims_table("01", {"without": {}}, released)) == dict.fromkeys(
        ("exists", "some"), "not testable here"
    )
    both = {"m": {"repair": between(1, 1, 2)}, "without": {}}
    assert verdicts(claims_table("01", both, released))["exists"] == "reproduced"


# --- what is shown --------------------------------------------------------------------------------


def test_a_table_for_people(registered):
    lines = to_markdown(claims_table("01", MODELS, RELEASED)).splitlines()
    assert lines == [
        "| claim | measured by; holds if | published | measured | verdict |",
        "| --- | --- | --- | --- | --- |",
        "| It exists. (R&N) | mean repair \\| all heads; ≥ 0 | gpt2 0.03 "
        "| m\\|1 0.050 [0.030, 0.071] yes<br>NA -1.23 [-2.50, -0.25] no | **partly** |",
        "| Some. (R&N) | share of repair; ≥ 0.2 and ≤ 0.4 | opt 0.50 "
        "| m\\|1 0.30 [0.25, 0.35] yes<br>NA 0.30 [0.10, 0.35] open | **partly** |",
    ]
    untested = to_markdown(claims_table("02", {"without": {}})).splitlines()[2:]
    assert untested == ["| Small. (R&N) | mean repair \\| all heads; ≤ 0.1 |  |  | **not testable here** |"]


def test_results_name_what_is_shown(registered):
    exists, some = results(claims_table("01", MODELS, RELEASED))
    assert (exists.claim.id, exists.statistic.unit, exists.verdict) == ("exists", "logits", "partly")
    assert [(shown.model, shown.value, shown.holds) for shown in some.measured] == [
        ("m|1", "0.30 [0.25, 0.35]", "yes"),
        ("NA", "0.30 [0.10, 0.35]", "open"),
    ]
    assert [(shown.model, shown.value, shown.holds) for shown in some.published] == [("opt", "0.50", "")]


# --- what is kept ---------------------------------------------------------------------------------


def test_tables_are_kept_by_notebook_and_together(registered, tmp_path):
    out = tmp_path / "out"
    first, second = (claims_table(notebook, MODELS, RELEASED) for notebook in ("01", "02"))
    write_claims(second, out)
    write_claims(first, out)
    for notebook, table in (("01", first), ("02", second)):
        pd.testing.assert_frame_equal(read_claims(out / "claims" / f"{notebook}.csv"), table)
    whole = pd.concat([first, second], ignore_index=True)
    pd.testing.assert_frame_equal(read_claims(out / "figures" / "claims.csv"), whole)
    assert (out / "figures" / "claims.md").read_text() == to_markdown(whole) + "\n"
    assert {file.name for file in (out / "claims").iterdir()} - {"claims.lock"} == {"01.csv", "02.csv"}
    before = (out / "figures" / "claims.csv").read_bytes()
    write_claims(first, out)
    assert (out / "figures" / "claims.csv").read_bytes() == before
    write_claims(claims_table("01", {"other": MODELS["NA"]}), out)
    assert set(read_claims(out / "figures" / "claims.csv").query("notebook == '01'")["model"]) == {"other"}


def test_values_are_kept_to_nine_digits(registered, tmp_path):
    value = 1234.56789012
    write_claims(claims_table("01", {"m": {"repair": between(value, 1e-7 / 3, value)}}), tmp_path)
    row = read_claims(tmp_path / "figures" / "claims.csv").iloc[0]
    assert (row["estimate"], row["low"]) == pytest.approx((value, 1e-7 / 3), rel=1e-8)


def test_notebooks_that_end_together_lose_nothing(registered, tmp_path):
    rows = [CLAIMS[0] | {"id": f"claim-{i}", "notebook": f"{i:02}"} for i in range(12)]
    registered(rows)
    tables = [claims_table(row["notebook"], MODELS) for row in rows]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda table: write_claims(table, tmp_path), tables))
    assert list(verdicts(read_claims(tmp_path / "figures" / "claims.csv"))) == [row["id"] for row in rows]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[1]", b"a,b\n1,2\n", b'"', b"of another version"]
)
def test_what_is_no_table_of_claims_is_one_line(registered, tmp_path, content):
    write_claims(claims_table("01", MODELS), tmp_path)
    file = tmp_path / "claims" / "01.csv"
    good = file.read_bytes()
    file.write_bytes(good.replace(b"exists", b"was-once") if content == b"of another version" else content)
    for use in (lambda: read_claims(file), lambda: write_claims(claims_table("02", MODELS), tmp_path)):
        with pytest.raises(UserError, match=r"cannot be read \(\w+\); delete it and run") as error:
            use()
        assert str(file) in str(error.value) and "\n" not in str(error.value)
