import pytest

from selfrepair.analysis.words import number, span


@pytest.mark.parametrize(
    ("value", "digits", "said"),
    [(-0.118, 2, "−0.12"), (-0.004, 2, "0.00"), (0.365, 1, "0.4"), (12.5, 0, "12"), (1e-9, 2, "0.00")],
)
def test_numbers_as_text_has_them(value, digits, said):
    assert number(value, digits) == said


def test_a_span_is_from_the_least_to_the_largest():
    assert span([0.171, -0.04, 0.1]) == "−0.04 to 0.17"
    assert span(iter([0.114, 0.111])) == "0.11"


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [float("inf")]])
def test_what_is_no_number_is_not_said(values):
    with pytest.raises(ValueError):
        span(values)
