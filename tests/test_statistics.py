import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrepair.errors import UserError
from selfrepair.statistics import bootstrap_weights, clipped_share, select_top

RNG = np.random.default_rng(0)


@given(st.integers(1, 6), st.integers(1, 30), st.floats(0.001, 1), st.integers(0, 9))
def test_selection_takes_the_largest_and_of_equals_the_first(prompts, positions, fraction, seed):
    effect = np.random.default_rng(seed).integers(-3, 3, (prompts, positions)).astype(float)
    chosen = select_top(effect, fraction)
    assert chosen.shape == effect.shape
    assert chosen.sum() == max(1, int(np.ceil(fraction * effect.size - 1e-9)))
    in_order = sorted(range(effect.size), key=lambda token: -effect.flat[token])  # of equals the first
    assert set(np.flatnonzero(chosen)) == set(in_order[: chosen.sum()])


def test_whole_fraction_is_all_tokens():
    assert select_top(RNG.normal(size=(3, 4)), 1).all()
    for fraction in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(UserError, match="fraction"):
            select_top(np.ones((2, 2)), fraction)


def test_clipped_share_by_hand():
    part, effect = np.array([1.0, 3.0, -1.0, 1.0, -1.0]), np.array([2.0, 2.0, 2.0, 0.0, -2.0])
    assert clipped_share(part, effect).tolist() == [0.5, 1.0, 0.0, 0.0, 0.5]


def test_bootstrap_is_seeded():
    assert np.array_equal(bootstrap_weights(7, 5, 1), bootstrap_weights(7, 5, 1))
    assert not np.array_equal(bootstrap_weights(7, 5, 1), bootstrap_weights(7, 5, 2))
    assert (bootstrap_weights(7, 50).sum(1) == 7).all()
