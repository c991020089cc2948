"""A shard computed again against the kept one: what differs is named, with how much of it."""

import numpy as np
import pytest
import xarray as xr

from selfrepair.run.recomputed import MAY_DIFFER, _compare

KEPT = xr.Dataset(
    {
        "effect": ("prompt", np.array([1.0, 2.0, 4.0, np.nan, np.inf, -np.inf], dtype=np.float32)),
        "other": ("prompt", np.arange(6.0)),
        "first": ("prompt", np.arange(6)),
    }
)


def compared(name, *places, kept=KEPT):
    """With these ``(place, value)`` of one variable in the shard that is made again."""
    again = KEPT.copy(deep=True)
    for place, value in places:
        again[name][place] = value
    return _compare("it", again, kept, 1e-4)


def test_the_same_agrees_though_a_store_says_which_shard_made_it():
    kept = KEPT.assign_coords(made_in_shard=("prompt", np.zeros(6)))
    finding = compared("effect", kept=kept)
    assert finding.agrees and finding.detail == "computed again, largest relative difference 0.0e+00"


def test_the_variable_that_differs_most_is_named_relative_to_its_largest_value():
    small = compared("effect", (0, 1.0001))
    assert small.agrees and small.detail.endswith("largest relative difference 2.5e-05 (effect)")
    large = compared("effect", (0, 1.1))
    assert not large.agrees and large.detail.endswith("largest relative difference 2.5e-02 (effect)")


def test_of_whole_numbers_the_share_that_differs_is_said():
    finding = compared("first", (2, 7))
    assert finding.agrees is False and 1 / 6 > MAY_DIFFER
    assert finding.detail == "computed again, largest relative difference 0.0e+00, 16.7% of first differ"


@pytest.mark.parametrize(("place", "value"), [(0, np.nan), (3, np.inf), (3, 1.0), (4, -np.inf), (5, np.nan)])
def test_what_is_not_finite_agrees_with_its_like_alone(place, value):
    finding = compared("effect", (place, value))
    assert finding.agrees is False and finding.detail == "effect is not finite where it should be"


def test_variables_of_one_of_the_two_and_other_shapes_are_found():
    more = compared("effect", kept=KEPT.assign(more=("prompt", np.zeros(6))))
    fewer = compared("effect", kept=KEPT.drop_vars("other"))
    assert more.agrees is fewer.agrees is False
    assert more.detail == "more: only in one of the two" and fewer.detail == "other: only in one of the two"
    shape = compared("effect", kept=KEPT.assign(other=("x", np.zeros(5))))
    assert shape.agrees is False and shape.detail == "other is of another shape"
