"""Figures of notebook 09 show the numbers: who is ablated, whose growth, and where intervals end."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_who_repairs import Pairs, jointly, uneven

from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.head_growth import STRONGEST, PairGrowth
from selfrepair.analysis.joint_ablation import JointCosts
from selfrepair.plots import who_repairs as plots


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_rows_are_ablated_and_columns_are_later():
    made = uneven()
    top, control, _ = plots.growth_matrices([PairGrowth.of(made, 5)]).axes
    for axis, selection in ((top, 0), (control, 1)):
        pairs, wanted = Pairs(made, selection), np.full((12, 12), np.nan)
        for (layer, head), (later, other) in pairs.all:
            growth = pairs.mean((layer, head), (later, other), Pairs.EVERY)
            wanted[4 * layer + head, 4 * later + other] = growth
        np.testing.assert_allclose(np.ma.filled(axis.images[0].get_array(), np.nan), wanted)
    assert top.images[0].get_clim() == control.images[0].get_clim()


def test_curves_are_of_top_tokens_of_control_tokens_and_of_chance():
    made = uneven()
    one, pairs, control = PairGrowth.of(made, 20), Pairs(made), Pairs(made, 1)
    (axis,) = plots.concentration([one]).axes
    curves = {line.get_label(): line for line in axis.lines}
    chosen, read = pairs.means(Pairs.EVEN), pairs.means(Pairs.ODD)
    positive = read[chosen > 0].sum()
    top = np.cumsum(read[np.argsort(-chosen, kind="stable")]) / positive
    np.testing.assert_allclose(curves["top tokens"].get_ydata(), top)
    np.testing.assert_allclose(curves["top tokens"].get_xdata(), np.arange(1, 49) / 48)
    order = np.argsort(-control.means(Pairs.EVEN), kind="stable")
    wanted = np.cumsum(control.means(Pairs.ODD)[order]) / positive
    np.testing.assert_allclose(curves["control tokens"].get_ydata(), wanted)
    (gaussian,) = (line for line in axis.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(gaussian.get_ydata(), one.if_gaussian(gaussian.get_xdata()).value)
    circle, square = (next(line for line in axis.lines if line.get_marker() == marker) for marker in "os")
    assert circle.get_xydata().tolist() == [[STRONGEST, pytest.approx(top[4])]]
    assert square.get_xydata().tolist() == [[STRONGEST, pytest.approx(one.share_if_gaussian().value)]]
    band = {tuple(point) for point in np.round(axis.collections[0].get_paths()[0].vertices, 9)}
    low, high = one.cumulative().interval()
    for number in range(48):
        for end in (low, high):
            assert (round((number + 1) / 48, 9), round(float(end[number]), 9)) in band


def test_resemblance_stands_with_its_interval_and_its_control():
    rng = np.random.default_rng(0)
    names = [name for labels in plots.ALIKE.values() for name in labels]
    models = {
        model: {name: Estimate(rng.normal(i, 1, size=101)) for i, name in enumerate(names)} for model in "ab"
    }
    for axis, labels in zip(plots.alike(models).axes, plots.ALIKE.values(), strict=True):
        bars = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_linewidth() > 1]
        points = [line for line in axis.lines if len(line.get_xdata()) == 1]
        wanted = [models[model][name] for model in models for name in labels]
        assert [bar.get_xdata() for bar in bars] == [pytest.approx(one.interval()) for one in wanted]
        assert [point.get_xdata()[0] for point in points] == pytest.approx([one.value for one in wanted])
        for bar, point in zip(bars, points, strict=True):
            assert set(bar.get_ydata()) == set(point.get_ydata()) and bar.get_color() == point.get_color()
        heights = [point.get_ydata()[0] for point in points]
        assert heights == sorted(heights) and [round(height) for height in heights] == [
            model for model in (0, 1) for _ in labels
        ]


def test_excess_stands_above_the_sum_of_both():
    rng = np.random.default_rng(1)
    joint = jointly(rng.normal(size=(6, 2)), rng.normal(size=(6, 2)))
    joint["loss"][..., 1::2] = rng.normal(size=(6, 2, 2))  # another one on each prompt
    one = JointCosts.of(joint, 50)
    (axis,) = plots.joint_excess([one]).axes
    loss, count = joint["loss"].values[..., 1::2].sum(-1), joint["count"].values[:, 1::2].sum(-1)
    cost = (loss - loss[0]) / count
    runs = {"backup": (2, 3), "middling": (4, 5)}
    for bars, (other, (alone, both)) in zip(axis.containers, runs.items(), strict=True):
        points, _, (segments,) = bars
        np.testing.assert_allclose(points.get_xdata(), cost[1] + cost[alone])
        np.testing.assert_allclose(points.get_ydata(), cost[both] - cost[1] - cost[alone])
        excess = one.together("loss", other) - one.sum_of_both("loss", other)
        ends = np.array([segment[:, 1] for segment in segments.get_segments()])
        np.testing.assert_allclose(ends, np.stack(excess.interval(), 1))
        assert points.get_color() == plots.OTHERS[other][0]
