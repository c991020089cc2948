"""Claims and statistics as they are registered, judged, kept and shown."""

import datetime
import html
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import yaml

from selfrepair.analysis import rules
from selfrepair.analysis.claims import (
    COLUMNS,
    LEGEND,
    PUBLISHED,
    claims_table,
    read_claims,
    results,
    to_markdown,
    verdicts,
    write_claims,
)
from selfrepair.analysis.estimates import Estimate, Interval
from selfrepair.analysis.rules import VERDICTS, Claim, judge, load_claims, load_statistics, verdict
from selfrepair.errors import UserError

STATISTICS = [
    {
        "id": "repair",
        "sentence": "mean repair | all heads",
        "unit": "logits",
        "control": 0,
        "control_is": "random signs",
    },
    {"id": "share", "sentence": "share of repair", "unit": "share", "control": "chance"},
    {"id": "chance", "sentence": "share of harm", "unit": "share", "control": None},
]
RULE = {"written": "after", "date": "2026-11-25"}
CLAIMS = [
    {
        "id": "exists",
        "notebook": "01",
        "source": "R&N",
        "claim": "It exists.",
        "statistic": "repair",
        "at_least": 0,
        **RULE,
    },
    {
        "id": "some",
        "notebook": "01",
        "source": "R&N",
        "claim": "Some.",
        "statistic": "share",
        "at_least": 0.2,
        "at_most": 0.4,
        **RULE,
    },
    {
        "id": "small",
        "notebook": "02",
        "source": "R&N",
        "claim": "Small.",
        "statistic": "repair",
        "at_most": 0.1,
        **RULE | {"written": "before"},
    },
]


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Puts entries in the place of the shipped files."""

    def register(claim_rows=CLAIMS, statistic_rows=STATISTICS):
        for name, rows in (("CLAIMS_FILE", claim_rows), ("STATISTICS_FILE", statistic_rows)):
            file = tmp_path / name.replace("_FILE", ".yaml").lower()
            file.write_text(yaml.safe_dump(rows, allow_unicode=True), encoding="utf-8")
            monkeypatch.setattr(rules, name, file)

    register()
    return register


def between(value, low, high):
    """An estimate with that interval: its samples lie at the ends alone."""
    return Estimate(np.array([value, *[low] * 50, *[high] * 50], dtype=np.float64))


MODELS = {
    "m|1": {
        "repair": between(0.05, 0.03, 0.0712),
        "share": between(0.3, 0.25, 0.35),
        "chance": Estimate.bare(0.125),
    },
    "NA": {
        "repair": between(-1.234, -2.5, -0.25),
        "share": between(0.3, 0.25, 0.35),
        "chance": between(0.3, 0.2, 0.375),
    },
    "without": {},
}
RELEASED = {
    "gpt2": {"repair": Estimate.bare(0.0256)},
    "opt": {"share": Estimate.bare(0.375), "chance": Estimate.bare(0.5)},
    "neo": {"share": Estimate.bare(0.25)},
}


# --- what is registered ---------------------------------------------------------------------------


def test_shipped_claims_and_statistics_belong_together():
    known, found = load_statistics(), load_claims()
    used = {claim.statistic for claim in found}
    used |= {known[name].control_id for name in used}
    assert used - {None} == set(known), "each statistic is in a claim or is a control"
    assert len({statistic.sentence for statistic in known.values()}) == len(known)
    for claim in found:
        assert (
            claim.notebook and claim.source and claim.claim and claim.at_least < claim.at_most and claim.rule
        )
        assert datetime.date.fromisoformat(claim.date) <= datetime.date.today()


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
        ({}, {"control": 0.5}, "statistics.yaml: 'chance' needs 'control_is' if its control is a number"),
        ({}, {"control_is": "luck"}, "statistics.yaml: 'chance' needs 'control_is' if its control is a num"),
        ({"statistic": "chance"}, {}, "claims.yaml: 'small' is about 'chance', which has no control"),
        ({"written": "then"}, {}, "claims.yaml: 'small': 'written' must be before or after, not 'then'"),
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


def test_what_is_measured_without_its_control_is_refused(registered):
    alone = {"share": Estimate.bare(0.3)}
    with pytest.raises(UserError, match=r"^m: 'share' was measured without its control 'chance'$"):
        claims_table("01", {"m": alone})
    assert set(claims_table("01", {}, {"released": alone})["holds"]) == {"yes"}


# --- what is judged -------------------------------------------------------------------------------


def claim(**ends):
    return Claim("x", "", "", "", "", "after", "2026-11-25", **ends)


def test_a_model_says_yes_where_its_interval_lies_in_the_range():
    intervals = {(0.1, 0.9): "yes", (-0.1, 0.5): "open", (0.5, 1.5): "open", (1.1, 2): "no", (-2, -1): "no"}
    intervals |= {(0, 1): "yes", (math.nan, math.nan): "open"}
    found = {ends: judge(claim(at_least=0, at_most=1), Interval(*ends), None) for ends in intervals}
    assert found == intervals


@pytest.mark.parametrize(
    ("ends", "advantage", "said"),
    [
        ((0.1, 0.9), (0.01, 0.5), "yes"),
        ((0.1, 0.9), (-0.01, 0.5), "open"),
        ((0.1, 0.9), (-0.5, -0.01), "no"),
        ((0.1, 0.9), (0, 0), "no"),
        ((-0.1, 0.9), (0.01, 0.5), "open"),
        ((-0.1, 0.9), (-0.5, -0.01), "no"),
        ((-0.3, -0.1), (0.01, 0.5), "no"),
        ((0.1, 0.9), (math.nan, math.nan), "open"),
    ],
)
def test_and_lies_beyond_its_control(ends, advantage, said):
    assert judge(claim(at_least=0, at_most=1), Interval(*ends), Interval(*advantage)) == said


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (["yes", "yes"], "reproduced"),
        (["yes", "no"], "partly"),
        (["yes", "open", "open"], "partly"),
        (["open", "open"], "undecided"),
        (["no", "open"], "undecided"),
        (["no", "no", "open"], "not reproduced"),
        (["no"], "not reproduced"),
        ([], "not testable here"),
    ],
)
def test_verdicts(said, found):
    assert verdict(said) == found
    assert found in VERDICTS and f"*{found}*: {VERDICTS[found]}" in LEGEND


def test_rules_in_signs():
    ends = [{"at_least": 0.5}, {"at_most": 0}, {"at_least": 0.2, "at_most": 0.4}]
    assert [claim(**end).rule for end in ends] == ["≥ 0.5", "≤ 0", "≥ 0.2 and ≤ 0.4"]
    assert [claim(**end).side for end in ends] == [1, -1, 1]


def test_the_control_is_on_the_other_side_of_a_claim_of_little(registered):
    registered([CLAIMS[2] | {"statistic": "share", "at_most": 0.5}])
    below, above = Estimate.bare(0.1), Estimate.bare(0.4)
    models = {"less": {"share": below, "chance": above}, "more": {"share": above, "chance": below}}
    assert list(claims_table("02", models)["holds"]) == ["yes", "no"]


def test_the_long_table_by_hand(registered):
    nan = math.nan
    exists, some = ("exists", "01"), ("some", "01")
    repair, share = ("repair", "logits"), ("share", "share")
    wanted = [
        (*exists, "gpt2", "published", *repair, 0.0256, nan, nan, 0, nan, nan, "yes"),
        (*exists, "m|1", "measured", *repair, 0.05, 0.03, 0.0712, 0, 0.03, 0.0712, "yes"),
        (*exists, "NA", "measured", *repair, -1.234, -2.5, -0.25, 0, -2.5, -0.25, "no"),
        (*exists, "without", "measured", *repair, nan, nan, nan, 0, nan, nan, ""),
        (*some, "opt", "published", *share, 0.375, nan, nan, 0.5, nan, nan, "no"),
        (*some, "neo", "published", *share, 0.25, nan, nan, nan, nan, nan, "yes"),
        (*some, "m|1", "measured", *share, 0.3, 0.25, 0.35, 0.125, 0.125, 0.225, "yes"),
        (*some, "NA", "measured", *share, 0.3, 0.25, 0.35, 0.3, -0.025, 0.05, "open"),
        (*some, "without", "measured", *share, nan, nan, nan, nan, nan, nan, ""),
    ]
    table = claims_table("01", MODELS, RELEASED)
    pd.testing.assert_frame_equal(table, pd.DataFrame(wanted, columns=list(COLUMNS)), check_dtype=False)
    assert verdicts(table) == {"exists": "partly", "some": "partly"}
    assert verdicts(table, PUBLISHED) == {"exists": "reproduced", "some": "partly"}
    assert verdicts(claims_table("02", MODELS, RELEASED)) == {"small": "partly"}


def test_models_without_the_statistic_are_not_judged(registered):
    released = {"gpt2": {"repair": Estimate.bare(-5.0)}}
    table = claims_table("01", {"without": {}}, released)
    assert verdicts(table) == dict.fromkeys(("exists", "some"), "not testable here")
    assert verdicts(table, PUBLISHED) == {"exists": "not reproduced", "some": "not testable here"}
    both = {"m": {"repair": between(1, 1, 2)}, "without": {}}
    assert verdicts(claims_table("01", both, released))["exists"] == "reproduced"


# --- what is shown --------------------------------------------------------------------------------


HOSTILE = "<img src=x onerror=alert(1)>|[here](javascript:alert(2))`$x$`&\n# *big*"


def test_a_models_name_is_shown_as_it_is(registered, tmp_path):
    """No tag, link, formula or new line comes of it, in claims.md or in a notebook."""
    table = claims_table("01", {HOSTILE: MODELS["NA"]})
    write_claims(table, tmp_path)
    plain_table, shown = (
        to_markdown(claims_table("01", {"NA": MODELS["NA"]})),
        (tmp_path / "figures" / "claims.md").read_text(encoding="utf-8"),
    )
    assert shown == to_markdown(table) + "\n"
    names = {line.split(" | ")[3].split(" -1.23")[0] for line in shown.splitlines()[2:3]}
    (name,) = names
    assert not set("<>|[]`$*\n") & set(name) and html.unescape(name) == HOSTILE.replace("\n", " ")
    for sign in "<>|[]`$*\n":
        assert shown.count(sign) == plain_table.count(sign) + (sign == "\n")


def test_a_table_for_people(registered):
    lines = to_markdown(claims_table("01", MODELS, RELEASED)).splitlines()
    assert lines == [
        "| claim | measured by; holds if; control | published | measured | verdict |",
        "| --- | --- | --- | --- | --- |",
        "| It exists. (R&N) | mean repair \\| all heads; ≥ 0; control: 0, random signs. Rule written after looking, "
        "2026-11-25 | gpt2 0.026 yes<br>*reproduced, 1 of 1* "
        "| m&#124;1 0.050 [0.030, 0.071] yes<br>NA -1.23 [-2.50, -0.25] no | **partly, 1 yes, 1 no, of 2** |",
        "| Some. (R&N) | share of repair; ≥ 0.2 and ≤ 0.4; control: share of harm. Rule written after looking, "
        "2026-11-25 | opt 0.38 (control 0.50) no<br>neo 0.25 yes<br>*partly, 1 yes, 1 no, of 2* "
        "| m&#124;1 0.30 [0.25, 0.35] (control 0.12) yes<br>NA 0.30 [0.25, 0.35] (control 0.30) open "
        "| **partly, 1 of 2; the control alone lies in the range in 1** |",
        "",
        LEGEND,
    ]
    untested = to_markdown(claims_table("02", {"without": {}})).splitlines()[2]
    assert untested == (
        "| Small. (R&N) | mean repair \\| all heads; ≤ 0.1; control: 0, random signs. Rule written before looking, "
        "2026-11-25 |  |  | **not testable here** |"
    )


def test_results_name_what_is_shown(registered):
    exists, some = results(claims_table("01", MODELS, RELEASED))
    assert (exists.claim.id, exists.statistic.unit, exists.verdict) == ("exists", "logits", "partly")
    assert (exists.control, some.control) == ("0, random signs", "share of harm")
    assert (exists.published_verdict, some.published_verdict) == ("reproduced", "partly")
    assert [(shown.model, shown.value, shown.holds) for shown in some.measured] == [
        ("m|1", "0.30 [0.25, 0.35] (control 0.12)", "yes"),
        ("NA", "0.30 [0.25, 0.35] (control 0.30)", "open"),
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(123.45, "123"), (-12.34, "-12.3"), (1.234, "1.23"), (0.012345, "0.012"), (0.0012, "0.0012")],
)
def test_values_have_two_or_three_significant_digits(registered, value, shown):
    (result, _) = results(claims_table("01", {"m": {"repair": Estimate.bare(value)}}))
    assert result.measured[0].value == shown


@pytest.mark.parametrize(
    ("values", "in_full"),
    [
        ((1, 2, 3), "reproduced, 3 of 3"),
        ((1, -1, -1), "partly, 1 yes, 2 no, of 3"),
        ((-1, -2, -3), "not reproduced, 0 yes, 3 no, of 3"),
        ((), "not testable here"),
    ],
)
def test_a_verdict_in_full_counts_what_speaks_against_it(registered, values, in_full):
    models = {f"m{i}": {"repair": Estimate.bare(value)} for i, value in enumerate(values)}
    (result, _) = results(claims_table("01", models or {"without": {}}, models))
    assert result.verdict_in_full == in_full
    assert result.published_verdict_in_full == (in_full if values else "")


def test_open_ones_are_not_counted_as_no(registered):
    models = {"m": {"repair": between(1, 1, 2)}, "open": {"repair": between(1, -1, 2)}}
    assert results(claims_table("01", models))[0].verdict_in_full == "partly, 1 of 2"


def shown_beside(value, control):
    models = {"m": {"share": value, "chance": Estimate.bare(control)}}
    (_, result) = results(claims_table("01", models))
    return result.measured[0].value, result.measured[0].holds


def test_digits_are_added_until_a_yes_or_no_can_be_seen(registered):
    narrow = between(0.36042, 0.3604, 0.3605)
    assert shown_beside(narrow, 0.36031) == ("0.3604 [0.3604, 0.3605] (control 0.3603)", "yes")
    assert shown_beside(narrow, 0.3607) == ("0.360 [0.360, 0.360] (control 0.361)", "no")
    assert shown_beside(narrow, 0.36042) == ("0.36 [0.36, 0.36] (control 0.36)", "open")
    assert shown_beside(Estimate.bare(0.3), 0.3) == ("0.30 (control 0.30)", "no")  # nothing to be seen
    assert shown_beside(Estimate.bare(0.3), 0.3 - 1e-8) == ("0.300000 (control 0.300000)", "yes")


def test_no_value_is_a_dash(registered):
    nothing = {"gpt2": {"repair": Estimate.bare(math.nan)}}
    (result, _) = results(claims_table("01", nothing, nothing))
    assert result.measured == result.published
    assert (result.measured[0].value, result.measured[0].holds) == ("–", "open")
    assert "nan" not in to_markdown(claims_table("01", nothing, nothing)).replace("exceed", "")


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


def test_a_table_is_shown_alike_before_and_after_it_was_kept(registered, tmp_path):
    """Though a value lies where rounding turns."""
    value = 0.365 + 1e-13
    table = claims_table("01", {"m": {"repair": between(value, value, value)}})
    write_claims(table, tmp_path)
    kept = read_claims(tmp_path / "claims" / "01.csv")
    assert to_markdown(kept) == to_markdown(table) and kept["estimate"][0] == table["estimate"][0]


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
