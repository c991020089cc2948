"""Estimates against plain loops over their draws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrepair.analysis.estimates import Estimate, draws, mean_over_prompts, selected_means
from selfrepair.statistics import bootstrap_weights, later_half

RNG = np.random.default_rng(0)


def made(*shape, n_draws=8, seed=0):
    return Estimate(np.random.default_rng(seed).normal(size=(*shape, n_draws)))


def percentile(samples, q):
    """Between the two neighbours in order, as far from one to the other as the place is."""
    ordered = sorted(sample for sample in samples if not math.isnan(sample))
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


# --- values and intervals -------------------------------------------------------------------------


def test_the_first_draw_is_the_value_and_no_sample():
    estimate = Estimate(np.array([[5.0, 1, 2, 3], [6.0, 4, 5, 6]]))
    assert estimate.value.tolist() == [5, 6] and estimate.samples.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert estimate.shape == (2,) and len(estimate) == 2
    assert Estimate(np.array([1e9, 1, 2, 3])).interval(0.5) == pytest.approx((1.5, 2.5))


@given(st.integers(1, 40), st.floats(0.05, 0.99), st.integers(0, 99))
def test_interval_lies_at_the_percentiles_of_defined_samples(n_samples, level, seed):
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(3, 1 + n_samples))
    drawn[:, 2:][rng.uniform(size=(3, n_samples - 1)) < 0.2] = np.nan  # one sample at least stays
    low, high = Estimate(drawn).interval(level)
    for row, a, b in zip(drawn, low, high, strict=True):
        assert a == pytest.approx(percentile(row[1:], (1 - level) / 2))
        assert b == pytest.approx(percentile(row[1:], (1 + level) / 2))


@pytest.mark.filterwarnings("error")
def test_without_defined_samples_an_interval_is_undefined():
    for estimate in (Estimate.bare(2.0), Estimate(np.array([2.0, np.nan, np.nan]))):
        assert estimate.value == 2 and all(np.isnan(end) for end in estimate.interval())
    low, high = Estimate.bare(np.ones((2, 3))).interval()
    assert low.shape == high.shape == (2, 3) and np.isnan([low, high]).all()
    low, _ = Estimate(np.array([[1.0, np.nan], [1.0, 2.0]])).interval()
    np.testing.assert_array_equal(low, [np.nan, 2])


# --- arithmetic -----------------------------------------------------------------------------------

OPERATIONS = {
    "add": (lambda a, b: a + b, lambda x, y: x + y),
    "sub": (lambda a, b: a - b, lambda x, y: x - y),
    "mul": (lambda a, b: a * b, lambda x, y: x * y),
    "truediv": (lambda a, b: a / b, lambda x, y: x / y),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_arithmetic_keeps_draws_together(name):
    on_estimates, on_numbers = OPERATIONS[name]
    a, b = made(3, seed=1), made(3, seed=2)
    array = RNG.normal(size=3)
    for other, number in (
        (b, lambda i, k: b.drawn[i, k]),
        (2.5, lambda i, k: 2.5),
        (array, lambda i, k: array[i]),
        (Estimate.bare(array), lambda i, k: array[i]),
    ):
        found = on_estimates(a, other).drawn
        assert found.shape == a.drawn.shape
        for i in range(3):
            for k in range(8):
                assert found[i, k] == on_numbers(a.drawn[i, k], number(i, k))


@pytest.mark.filterwarnings("error")
def test_a_ratio_is_undefined_where_its_divisor_is_zero():
    found = Estimate(np.array([1.0, 2, -3])) / Estimate(np.array([2.0, 0, 0]))
    np.testing.assert_array_equal(found.drawn, [0.5, np.nan, np.nan])
    assert np.isnan((found / 0).drawn).all()


def test_an_array_on_the_left_is_refused():
    with pytest.raises(TypeError):
        np.ones(3) - made(3)


def test_means_and_sums_are_over_parts_and_never_over_draws():
    estimate = made(2, 3, 4)
    whole = estimate.drawn
    for axis, plain in (
        (0, (0,)),
        (1, (1,)),
        (-1, (2,)),
        ((0, 1), (0, 1)),
        ((0, -1), (0, 2)),
        ((0, 1, 2), (0, 1, 2)),
    ):
        kept = [i for i in range(3) if i not in plain]
        for found, divisor in (
            (estimate.sum(axis), 1),
            (estimate.mean(axis), math.prod(whole.shape[i] for i in plain)),
        ):
            assert found.shape == tuple(whole.shape[i] for i in kept)
            wanted = np.zeros(found.drawn.shape)
            for index in np.ndindex(whole.shape):
                wanted[(*(index[i] for i in kept), index[3])] += whole[index] / divisor
            np.testing.assert_allclose(found.drawn, wanted)
    for reduce in (estimate.mean, estimate.sum):
        with pytest.raises(np.exceptions.AxisError):
            reduce(3)


def test_parts_keep_all_draws():
    estimate = made(4, 3)
    mask = np.array([True, False, True, True])
    for index in (
        1,
        slice(1, 3),
        (2, 0),
        (slice(None), 1),
        mask,
        [3, 0],
        (np.array([0, 1]), np.array([2, 2])),
    ):
        found = estimate[index]
        for k in range(8):
            np.testing.assert_array_equal(found.drawn[..., k], estimate.drawn[..., k][index])
    assert [part.shape for part in estimate] == [(3,)] * 4


def test_a_single_value_has_no_parts():
    for access in (lambda e: e[0], len, list):
        with pytest.raises(TypeError):
            access(made())


def test_stacked_and_mapped_estimates():
    parts = [made(3, seed=i) for i in range(2)]
    stacked = Estimate.stack(parts)
    assert stacked.shape == (2, 3) and all(
        (stacked[i].drawn == part.drawn).all() for i, part in enumerate(parts)
    )
    larger = parts[0].map(np.maximum, parts[1])
    assert larger.drawn.tolist() == [
        [max(x, y) for x, y in zip(*rows, strict=True)]
        for rows in zip(parts[0].drawn, parts[1].drawn, strict=True)
    ]


# --- one form of table ----------------------------------------------------------------------------


def test_a_table_has_a_row_for_each_part():
    estimate = made(2, 3, n_draws=50)
    table = estimate.table({"layer": [4, 5], "head": "abc"}, model="m", n=7)
    assert list(table) == ["model", "n", "layer", "head", "estimate", "low", "high"]
    assert list(table.index) == list(range(6)) and set(table["model"]) == {"m"} and set(table["n"]) == {7}
    for row in table.itertuples():
        drawn = estimate.drawn[row.layer - 4, "abc".index(row.head)]
        assert row.estimate == drawn[0]
        assert row.low == pytest.approx(percentile(drawn[1:], 0.025))
        assert row.high == pytest.approx(percentile(drawn[1:], 0.975))


def test_a_table_of_a_single_value_is_one_row():
    assert Estimate(np.array([3.0, 1, 1])).table({}, model="m").to_dict("records") == [
        {"model": "m", "estimate": 3, "low": 1, "high": 1}
    ]
    with pytest.raises(ValueError):
        made(3).table({"layer": [0, 1]})


# --- draws of prompts -----------------------------------------------------------------------------


def test_draws_begin_with_every_prompt_once():
    weights = draws(6, 20, 3)
    assert weights.shape == (21, 6) and (weights[0] == 1).all()
    assert np.array_equal(weights[1:], bootstrap_weights(6, 20, 3))


def test_mean_over_prompts_against_plain_loops():
    values = np.random.default_rng(1).normal(size=(2, 5))
    found = mean_over_prompts(values, n_bootstrap=20, seed=3)
    assert found.shape == (2,)
    for k, times in enumerate(draws(5, 20, 3)):
        for row, mean in zip(values, found.drawn[:, k], strict=True):
            assert mean == pytest.approx(sum(x * n for x, n in zip(row, times, strict=True)) / 5)


def test_selected_means_against_plain_loops():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 3, 4, 5))
    chosen = rng.uniform(size=values.shape) < 0.3
    chosen[0, 0] = np.arange(4)[:, None] == 0  # of one prompt alone, which not every draw has
    weights = draws(4, 30)
    found = selected_means(values, chosen, weights)
    assert found.shape == (2, 3)
    for layer, head in np.ndindex(2, 3):
        for k, times in enumerate(weights):
            tokens = [
                values[layer, head, prompt, position]
                for prompt in range(4)
                for _ in range(int(times[prompt]))
                for position in range(5)
                if chosen[layer, head, prompt, position]
            ]
            wanted = sum(tokens) / len(tokens) if tokens else math.nan
            assert found.drawn[layer, head, k] == pytest.approx(wanted, nan_ok=True)
    assert np.isnan(found[0, 0].samples).any() and np.isfinite(found[0, 0].interval()).all()


def test_interval_covers_like_the_standard_error():
    values = RNG.normal(2.0, 1.0, size=(200, 1))
    low, high = selected_means(values, np.ones_like(values, dtype=bool), draws(200, 4000, seed=1)).interval()
    error = values.std() / np.sqrt(200)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_whole_prompts_are_drawn():
    # tokens of a prompt are copies of each other: the interval must be that of 20 values, not of 2,000
    values = np.repeat(RNG.normal(size=20)[:, None], 100, axis=1)
    low, high = selected_means(values, np.ones_like(values, dtype=bool), draws(20, 4000)).interval()
    error = values[:, 0].std() / np.sqrt(20)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_later_half_of_an_odd_number_of_layers():
    assert {n: later_half(n) for n in (1, 2, 3, 4, 5, 6, 7, 12, 24)} == {
        1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 6: 3, 7: 4, 12: 6, 24: 12,
    }  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_undefined_values_are_left_out_of_a_nanmean():
    drawn = np.array([[[1.0, 2], [np.nan, 4]], [[3, np.nan], [5, np.nan]], [[np.nan, 6], [7, np.nan]]])
    estimate = Estimate(drawn)
    wanted = [np.mean([1, 3, 5, 7]), np.mean([2, 4, 6])]
    np.testing.assert_allclose(estimate.nanmean((0, 1)).drawn, wanted)
    np.testing.assert_array_equal(estimate.nanmean(1).drawn, [[1, 3], [4, np.nan], [7, 6]])
