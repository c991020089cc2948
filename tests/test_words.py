import re

import numpy as np
import pandas as pd
import pytest

from selfrepair.analysis.words import number, signed, significant, span, table_html


@pytest.mark.parametrize(
    ("value", "digits", "said"),
    [(-0.118, 2, "−0.12"), (-0.004, 2, "0.00"), (0.365, 1, "0.4"), (12.5, 0, "12"), (1e-9, 2, "0.00")],
)
def test_numbers_as_text_has_them(value, digits, said):
    assert number(value, digits) == said


def test_signs_are_said():
    assert [signed(value) for value in (0.126, -0.126, -0.001)] == ["+0.13", "−0.13", "+0.00"]


def test_a_span_is_from_the_least_to_the_largest():
    assert span([0.171, -0.04, 0.1]) == "−0.04 to 0.17"
    assert span(iter([0.114, 0.111])) == "0.11"


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [float("inf")]])
def test_what_is_no_number_is_not_said(values):
    with pytest.raises(ValueError):
        span(values)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0349, "0.035"), (-1.02, "−1.0"), (9.97, "10"), (99.7, "100"), (1234.0, "1234"), (0.0, "0.0")],
)
def test_significant_digits(value, said):
    assert significant(value) == said


def test_tables_have_significant_digits_and_a_dash_where_there_is_nothing():
    table = pd.DataFrame({"model": ["a", "b"], "tokens": [2608, 7], "share": [-0.0349, np.nan]})
    cells = re.findall("<t[hd]>(.*?)</t[hd]>", table_html(table))
    assert cells == ["model", "tokens", "share", "a", "2608", "−0.035", "b", "7", "–"]
    assert table_html(table.set_index("model").rename_axis(columns="what")) == table_html(table)
