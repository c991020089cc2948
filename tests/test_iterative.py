"""What notebook 05 shows as a whole: shards that are merged, its claims' statistics, and its figures."""

import matplotlib
import numpy as np
import pytest
from families import load_family
from readings import changes_of, feeding, prompts, some_alignment, some_cosines

from selfrepair.analysis.claims import load_claims
from selfrepair.analysis.cosines import cosine_by_distance, head_cosines
from selfrepair.analysis.iterative import iterative_statistics
from selfrepair.analysis.self_feeding import published_self_feeding, self_feeding_table, slopes
from selfrepair.measure import pairs, self_feeding
from selfrepair.measure.self_feeding import SCALES
from selfrepair.measure.task import Task
from selfrepair.plots import iterative as plots
from selfrepair.store.stores import open_store

matplotlib.use("agg")


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
    for coordinate in ("layer", "head", "rank", "scale") if name == "self_feeding" else ():
        np.testing.assert_array_equal(several[coordinate], one[coordinate])


# Claims


def test_statistics_are_those_of_the_claims_and_of_the_later_half():
    heads = {
        (0, 0): (5, 1, 9),
        (1, 1): (-5, 1, 9),
        (2, 0): (1.3, 1, 0.9),
        (3, 0): (0.6, 1, 1.0),
        (3, 1): (0.4, 1, 0.5),
    }
    aligned = some_alignment(4)
    found = iterative_statistics(feeding(heads), some_cosines(4), aligned, 25)
    assert set(found) == {claim.statistic for claim in load_claims() if claim.notebook == "05"}
    assert all(estimate.drawn.shape == (26,) for estimate in found.values())
    np.testing.assert_allclose(found["largest-own-slope"].drawn, 1.3)
    np.testing.assert_allclose(found["smallest-own-slope"].drawn, 0.4)
    np.testing.assert_allclose(found["random-direction-slope"].drawn, 0.8)
    assert found["gradient-alignment"].value == pytest.approx(aligned["gradient"].values.mean())
    fed = feeding({(1, 0): (5, 1, 1), (2, 1): (2, 1, 1)}, n_layers=3)
    assert "neighbour-cosine-gap" not in iterative_statistics(fed, some_cosines(3), some_alignment(3), 5)


def test_largest_slope_is_sought_anew_in_every_sample():
    fed = feeding({(2, 0): (1.0, 1, 1), (3, 0): (1.0, 1, 1)}, noise=1.0)
    found = iterative_statistics(fed, some_cosines(4), some_alignment(4), 40)
    own = slopes(fed, 40).drawn[:, 0, -1]
    np.testing.assert_allclose(found["largest-own-slope"].drawn, np.maximum(*own))
    assert len({int(i) for i in own.argmax(0)}) == 2


# Figures: what is plotted


def test_slopes_are_plotted_where_they_are():
    fed = feeding({(2, 0): (1.3, 1, 0.9), (3, 0): (0.6, 1, 1.0), (3, 1): (0.4, 1, 0.5)}, noise=0.3)
    table = self_feeding_table("some", fed)
    figure = plots.slope_by_head(table, published_self_feeding())
    assert [axis.get_title() for axis in figure.axes] == ["measured\nsome", "published\n5 models"]
    own, _, direction = (line for line in figure.axes[0].lines if line.get_marker() == "o")
    found = slopes(fed, 1).value
    largest = found[:, :, -1]
    np.testing.assert_allclose(own.get_ydata(), sorted(largest[:, 0]))
    np.testing.assert_allclose(direction.get_ydata(), largest[np.argsort(largest[:, 0]), 2])
    figure = plots.slope_by_scale(table, published_self_feeding())
    assert len(figure.axes) == 6
    lines = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == len(SCALES)]
    assert len(lines) == 9
    assert any(np.allclose(line, found[0, 0]) for line in lines)


def test_other_figures_hold_their_numbers():
    fed = feeding({(2, 0): (1.3, 1, 0.9), (3, 0): (0.6, 1, 1.0)})
    figure = plots.effect_after_against_before({"some": fed})
    tokens = np.column_stack([fed["before"].values[0].ravel(), fed["after"].values[0, 0, -1].ravel()])
    np.testing.assert_allclose(figure.axes[0].collections[0].get_offsets(), tokens)
    assert figure.axes[1].get_title() == "some L3H0\nsmallest slope: 0.60"
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
    wanted = np.column_stack([ablated.sum(-1)[0], earlier.sum(-1)[0]]) / 12
    np.testing.assert_allclose(points.get_xydata(), wanted)
