"""What notebook 05 shows as a whole: shards that are merged, its claims' statistics, and its figures."""

import matplotlib
import numpy as np
import pytest
from families import load_family
from readings import changes_of, feeding, prompts, some_alignment, some_cosines

from selfrepair.analysis.claims import claims_table
from selfrepair.analysis.cosines import cosine_by_distance, head_cosines
from selfrepair.analysis.iterative import alignment_table, iterative_statistics
from selfrepair.analysis.rules import load_claims, load_statistics
from selfrepair.analysis.self_feeding import (
    EVERYWHERE,
    ONE_POSITION,
    OWN_OUTPUT,
    RELEASED,
    published_self_feeding,
    self_feeding_table,
    slopes,
    slopes_by_way,
)
from selfrepair.measure import pairs, self_feeding
from selfrepair.measure.self_feeding import SCALES, VECTORS
from selfrepair.measure.task import Task
from selfrepair.plots import iterative as plots
from selfrepair.plots import self_feeding as self_feeding_plots
from selfrepair.store.stores import open_store

matplotlib.use("agg")


@pytest.mark.slow("shards of what notebook 05 measures are one computation")
@pytest.mark.parametrize("name", ["self_feeding", "earlier_input", "cosines", "alignment"])
def test_shards_merged_equal_one_computation(name, tmp_path, monkeypatch):
    model = load_family("neox-parallel", tmp_path)
    np.save(tmp_path / "ids.npy", prompts(10).tokens)
    settings = {
        "tokens": str(tmp_path / "ids.npy"),
        "text": None,
        "dataset": None,
        "n_prompts": 10,
        "prompt_len": 12,
    }
    settings |= {"dtype": "float32", "seed": 3, "ablation": "mean", "fraction": 0.2}

    def made(folder):
        task = Task(name, str(tmp_path / "neox-parallel"), settings, tmp_path / folder)
        return len(task.shards), open_store(task.merge([model]))

    monkeypatch.setattr(self_feeding, "POSITIONS", 2)
    monkeypatch.setattr(self_feeding, "SHARD_PROMPTS", 10)
    n_shards, one = made("one")
    assert n_shards == 1
    monkeypatch.setattr(self_feeding, "SHARD_PROMPTS", 4)
    monkeypatch.setattr(pairs, "SHARD_PAIRS", 2)
    n_shards, several = made("several")
    assert n_shards == 3
    assert set(one.data_vars) == set(several.data_vars)
    assert several["prompt"].values.tolist() == one["prompt"].values.tolist() == list(range(10))
    for variable in one.data_vars:
        wanted, found = (
            of[variable].sum("shard") if "shard" in of[variable].dims else of[variable]
            for of in (one, several)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=variable)
    for coordinate in ("layer", "head", "rank", "scale", "position") if name == "self_feeding" else ():
        np.testing.assert_array_equal(several[coordinate], one[coordinate])


# Claims


def test_statistics_are_those_of_the_claims_and_their_controls():
    heads = {(0, 0): (5, 1, 9), (2, 0): (1.3, 1, 0.9), (3, 1): (0.4, 1, 0.5)}
    aligned = some_alignment(4)
    found = iterative_statistics(feeding(heads), some_cosines(4), aligned, 25)
    known = load_statistics()
    claimed = {claim.statistic for claim in load_claims() if claim.notebook == "05"}
    assert set(found) == claimed | {known[name].control_id for name in claimed} - {None}
    assert all(estimate.drawn.shape == (26,) for estimate in found.values())
    np.testing.assert_allclose(found["largest-own-slope"].drawn, 5)  # of whatever layer
    np.testing.assert_allclose(found["smallest-own-slope"].drawn, 0.4)
    assert found["gradient-alignment"].value == pytest.approx(aligned["gradient"].values.mean())
    fed = feeding({(1, 0): (5, 1, 1), (2, 1): (2, 1, 1)}, n_layers=3)
    assert "neighbour-cosine-gap" not in iterative_statistics(fed, some_cosines(3), some_alignment(3), 5)


def test_the_table_of_alignment_says_where_the_loss_rises():
    aligned = some_alignment(3)
    aligned["loss"][:] = np.array([9.0, 5.0, 6.0, 4.0])[:, None]
    falling = aligned.assign(loss=aligned["loss"][::-1] * 0 + np.array([4.0, 3, 2, 1])[:, None])
    found = alignment_table({"rising": aligned, "falling": falling})
    assert found["rises"].tolist() == ["1", ""]
    assert found["loss before"].tolist() == [9, 4] and found["loss after"].tolist() == [4, 1]
    gradient = 1000 * aligned["gradient"].values
    row = found.loc["rising"]
    assert row["descent"] == pytest.approx(gradient.mean()) and row["low"] < row["descent"] < row["high"]
    assert row["largest block"] == pytest.approx(max(gradient.mean(1)))


def test_a_claim_needs_more_than_its_range():
    """Heads that fall below 0.9 as random directions make them fall, too, repress nothing of their own."""
    fed = feeding({(2, 0): (0.5, 1, 0.4), (3, 0): (0.6, 1, 0.7)})
    found = {"some": iterative_statistics(fed, some_cosines(4), some_alignment(4), 25)}
    table = claims_table("05", found).set_index("claim")
    assert table.loc["self-repressing", "holds"] == "no"
    fed = feeding({(2, 0): (0.3, 1, 0.4), (3, 0): (0.6, 1, 0.7)})
    found = {"some": iterative_statistics(fed, some_cosines(4), some_alignment(4), 25)}
    assert claims_table("05", found).set_index("claim").loc["self-repressing", "holds"] == "yes"


# Figures: what is plotted


HEADS = {(2, 0): (1.3, 1, 0.9), (3, 0): (0.6, 1, 1.0), (3, 1): (0.4, 1, 0.5)}


def test_slopes_are_plotted_where_they_are():
    fed = feeding(HEADS, noise=0.3)
    table, found = self_feeding_table("some", fed), slopes(fed, 1).value
    figure = self_feeding_plots.slope_by_head(table, published_self_feeding())
    assert [axis.get_title() for axis in figure.axes] == ["measured\nsome", "published\n5 models"]
    (everywhere,) = (line for line in figure.axes[0].lines if line.get_marker() == "D")
    own, _, direction = (line for line in figure.axes[0].lines if line.get_marker() == "o")
    largest = found[:, :, -1]
    np.testing.assert_allclose(own.get_ydata(), sorted(largest[:, 0]))
    np.testing.assert_allclose(direction.get_ydata(), largest[np.argsort(largest[:, 0]), 2])
    np.testing.assert_allclose(everywhere.get_ydata(), 0.5)
    assert not [line for line in figure.axes[1].lines if line.get_marker() == "D"]
    figure = self_feeding_plots.slope_by_scale(table, published_self_feeding())
    assert len(figure.axes) == 6
    lines = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == len(SCALES)]
    assert len(lines) == 3 + 2  # a line for each head, one for each control
    for wanted in (*found[:, 0], found[:, 1].mean(0), found[:, 2].mean(0)):
        assert any(np.allclose(line, wanted) for line in lines)


def test_slopes_of_every_way_by_hand():
    """Read with the fed run's norm they are those of the same vector, over 1.1."""
    ways = slopes_by_way("some", feeding(HEADS)).set_index(["vector", "way"])["estimate"]
    means = np.mean(list(HEADS.values()), axis=0)
    wanted = {(vector, ONE_POSITION): mean for vector, mean in zip(VECTORS, means, strict=True)}
    wanted |= {(vector, RELEASED): mean / 1.1 for vector, mean in zip(VECTORS, means, strict=True)}
    assert ways.to_dict() == pytest.approx(wanted | {(OWN_OUTPUT, EVERYWHERE): 0.5})


def test_ways_are_plotted_where_they_are():
    ways = slopes_by_way("some", feeding(HEADS))
    assert (ways["low"] <= ways["estimate"]).all() and len(ways) == 3 * 2 + 1
    figure = self_feeding_plots.slope_by_way(ways, published_self_feeding())
    own, another, direction = (
        {line.get_marker(): line.get_xdata() for line in axis.lines if list(line.get_ydata()) == [0]}
        for axis in figure.axes
    )
    mean = np.mean([slope[0] for slope in HEADS.values()])
    for marker, wanted in {"o": mean, "s": mean / 1.1, "D": 0.5}.items():
        np.testing.assert_allclose(own[marker], wanted)
    np.testing.assert_allclose(direction["o"], 0.8)
    np.testing.assert_allclose(another["o"], 1)
    assert set(direction) == set(another) == {"o", "s"}
    assert len({axis.get_xlim() for axis in figure.axes}) == 1
    published = [line for line in figure.axes[0].lines if line.get_ydata()[0] >= 1]
    assert len(published) == 5 and {line.get_marker() for line in published} == {"s"}


def test_other_figures_hold_their_numbers():
    fed = feeding({(2, 0): (1.3, 1, 0.9), (3, 0): (0.6, 1, 1.0)})
    figure = self_feeding_plots.effect_after_against_before({"some": fed})
    tokens = np.column_stack([fed["before"].values[0].ravel(), fed["after"].values[0, 0, -1].ravel()])
    np.testing.assert_allclose(figure.axes[0].collections[0].get_offsets(), tokens)
    assert figure.axes[1].get_title() == "some\nL3H0, smallest: 0.60"
    aligned = some_alignment(4)
    figure = plots.alignment_by_layer({"a": aligned, "b": some_alignment(3)})
    for axis, name in zip(figure.axes, ("gradient", "final", "loss"), strict=True):
        np.testing.assert_allclose(axis.lines[0].get_ydata(), aligned[name].values.mean(1))
    cosines = some_cosines(4)
    image = plots.cosine_matrices({"a": cosines}).axes[0].images[0]
    assert np.array_equal(image.get_array(), head_cosines(cosines))
    line = plots.cosines_by_distance({"a": cosines}).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), cosine_by_distance(cosines, 1).value)
    rng = np.random.default_rng(0)
    earlier, ablated = rng.normal(size=(2, 1, 3, 6))
    changes = changes_of([1], earlier, ablated, np.full((1, 6), 2.0))
    axis = plots.earlier_against_ablated({"a": changes}).axes[0]
    points = next(line for line in axis.lines if line.get_marker() == "o")
    wanted = np.column_stack([earlier.sum(-1)[0], ablated.sum(-1)[0]]) / 12
    np.testing.assert_allclose(points.get_xydata(), wanted)
