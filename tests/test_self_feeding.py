"""Heads fed what heads write, against full passes; slopes and the table of what was fed."""

import csv
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import ALL_FAMILIES, load_family
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import (
    HEADS,
    close,
    effect,
    fed_at_each,
    feeding,
    measured,
    prompts,
    tokens_of,
    written,
    z_with_input,
)

from selfrepair.analysis.self_feeding import (
    in_context,
    published_self_feeding,
    published_statistics,
    reactions,
    self_feeding_table,
    slope_statistics,
    slopes,
    slopes_everywhere,
    slopes_rescaled,
    smallest_slopes,
)
from selfrepair.engine import forward
from selfrepair.engine.forward import Replay, attention_z, z_reached
from selfrepair.engine.one_position import OnePosition
from selfrepair.errors import NotMeasurable
from selfrepair.measure import self_feeding as measure
from selfrepair.measure.self_feeding import SCALES, VECTORS
from selfrepair.paths import PUBLISHED


class Spy:
    """Keeps the random directions that heads are fed, by layer, head and position."""

    def __init__(self, monkeypatch):
        self.drawn, real = {}, measure._random_like

        def keep(output, seed, prompts):
            self.drawn[tuple(seed[1:])] = real(output, seed, prompts)
            return self.drawn[tuple(seed[1:])]

        monkeypatch.setattr(measure, "_random_like", keep)

    def of_head(self, layer, head, output):
        """As ``output [prompt, position, d_model]``, but of random directions; 0 where none were drawn."""
        random = torch.zeros_like(output)
        for (of_layer, of_head, position), drawn in self.drawn.items():
            if (of_layer, of_head) == (layer, head):
                random[:, position] = drawn.double()
        return random


class Reference:
    """Heads fed one position at a time, by full passes of a plain float64 model."""

    def __init__(self, hf, tokens, positions):
        self.hf, self.tokens, self.positions = hf, tokens, positions
        self.clean = reference.forward(hf, tokens)
        heads = [(layer, head) for layer in range(3) for head in range(HEADS)]
        self.outputs = {key: written(hf, self.clean["z"][key[0]], *key) for key in heads}
        self.before = {key: self.effect(self.clean["z"][key[0]], key) for key in heads}
        self.order = sorted(heads, key=lambda key: self.before[key].mean().item(), reverse=True)

    def effect(self, z, key):
        return effect(self.hf, self.clean, self.tokens, z, *key)

    def after(self, key, vector):
        """Direct effects when ``vector`` is added at one position per run, and σ clean over σ then."""
        z, final = fed_at_each(self.hf, self.tokens, key[0], vector, self.positions)
        sigma = reference.sigma(self.hf, self.clean["residual"][3]) / reference.sigma(self.hf, final)
        return self.effect(z, key)[:, self.positions], sigma[:, self.positions]

    def everywhere(self, key, vector):
        z = z_with_input(self.hf, self.tokens, key[0], lambda residual: residual + vector)
        return self.effect(z, key)[:, self.positions]


@torch.no_grad()
def check(model, hf, monkeypatch, tolerance):
    spy, here = Spy(monkeypatch), prompts()
    monkeypatch.setattr(measure, "POSITIONS", 4)
    fed = measured("self_feeding", model, here, seed=7)
    assert fed.attrs["vectors"] == list(VECTORS) and fed["scale"].values.tolist() == list(SCALES)
    assert fed["position"].values.tolist() == [1, 4, 6, 9]
    slowly = Reference(hf, tokens_of(here), [1, 4, 6, 9])
    heads = list(zip(fed["layer"].values.tolist(), fed["head"].values.tolist(), strict=True))
    assert heads == sorted({*slowly.order[:5], *(key for key in slowly.outputs if key[0] == 2)})
    assert fed["rank"].values.tolist() == [slowly.order.index(head) + 1 for head in heads]
    for i in (0, len(heads) // 2, len(heads) - 1):
        key, after, ratio = heads[i], fed["after"][i], fed["sigma_ratio"][i]
        own = slowly.outputs[key]
        random = spy.of_head(*key, own)
        close(fed["before"][i], slowly.before[key][:, slowly.positions], tolerance)
        for scale in (0, 2):
            close(after[0, scale], slowly.after(key, SCALES[scale] * own)[0], tolerance)
            close(after[2, scale], slowly.after(key, SCALES[scale] * random)[0], tolerance)
        for v, vector in ((0, own), (1, other_of(slowly, key, after[1, -1])), (2, random)):
            effects, sigma = slowly.after(key, SCALES[-1] * vector)
            close(after[v, -1], effects, tolerance)
            close(ratio[v], sigma, tolerance)
        close(fed["after_everywhere"][i], slowly.everywhere(key, SCALES[-1] * own), tolerance)
        drawn, norm = random[:, slowly.positions], own[:, slowly.positions].norm(dim=-1)
        torch.testing.assert_close(drawn.norm(dim=-1), norm, rtol=1e-4, atol=1e-6)
        assert torch.cosine_similarity(drawn, own[:, slowly.positions], dim=-1).abs().mean() < 0.4
    first, second = (spy.of_head(*key, own)[:, slowly.positions] for key in heads[:2])
    for other in (second, first.roll(1, 0), first.roll(1, 1)):  # another head, prompt, position
        assert torch.cosine_similarity(first, other, dim=-1).abs().mean() < 0.4


def other_of(slowly, key, found):
    """The output of the one other head that was fed, going by the second of the positions."""
    fitting = []
    for other, output in slowly.outputs.items():
        if other != key:
            z, _ = fed_at_each(slowly.hf, slowly.tokens, key[0], SCALES[-1] * output, [4])
            wanted = slowly.effect(z, key)[:, 4]
            if np.abs(found[:, 1].values - wanted.numpy()).max() <= 1e-4 * wanted.abs().max():
                fitting.append(output)
    (output,) = fitting
    return output


@pytest.mark.parametrize("name", sorted(set(ALL_FAMILIES) - {"gpt-neo"}))  # which attends in float32
def test_equals_full_passes_one_position_at_a_time_to_1e_9(family, name, tmp_path, monkeypatch):
    model = load_family(name, tmp_path, torch.float64)
    reference.in_float64(model.hf)
    check(model, family(name)[1], monkeypatch, 1e-9)


@pytest.mark.slow("self-feeding is exact in float32 by both paths")
@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "llama-gqa", "gpt-neo"))
def test_equals_them_in_float32_by_both_paths(family, name, path, monkeypatch):
    model, hf = family(name)
    check(path(model), hf, monkeypatch, 1e-4)


def test_fed_nothing_a_head_writes_what_it_wrote(family, monkeypatch):
    monkeypatch.setattr(measure, "SCALES", (0, 0, 0, 0, 0))
    fed = measured("self_feeding", family("neox-parallel")[0], prompts())
    close(fed["after"][:, 1, 2], fed["before"], 1e-5)
    close(fed["after_everywhere"], fed["before"], 1e-5)
    np.testing.assert_allclose(fed["sigma_ratio"], 1, rtol=1e-5)


def test_positions_are_the_middles_of_equal_stretches():
    assert measure.spread_positions(127) == [3, 11, 19, 27, 35, 43, 51, 59, 67, 75, 83, 91, 99, 107, 115, 123]
    assert measure.spread_positions(5) == [0, 1, 2, 3, 4]
    for n in range(1, 300):
        found = measure.spread_positions(n)
        assert len(found) == len(set(found)) == min(n, 16) and 0 <= found[0] and found[-1] < n
        assert abs(np.mean(found) - (n - 1) / 2) <= 0.5 and np.ptp(np.diff(found)) <= 1 if n > 1 else True


def test_only_spread_positions_are_read(family, monkeypatch):
    model, _ = family("llama-gqa")
    here = prompts(4)
    every = measured("self_feeding", model, here)
    monkeypatch.setattr(measure, "POSITIONS", 3)
    some = measured("self_feeding", model, here)
    assert some["position"].values.tolist() == [1, 5, 9]
    for name in every.data_vars:
        np.testing.assert_allclose(some[name], every[name].sel(position=[1, 5, 9]), rtol=1e-4, atol=1e-5)


def test_self_feeding_does_not_depend_on_batches_but_on_the_seed(family, monkeypatch):
    model, _ = family("opt")
    here = prompts(4, 8)
    wanted = measured("self_feeding", model, here, seed=1)
    batches, rows = [], []
    real, rows_of = measure.Reading, OnePosition.rows_of
    monkeypatch.setattr(
        measure,
        "Reading",
        lambda model, tokens, cache: batches.append(len(tokens)) or real(model, tokens, cache),
    )
    monkeypatch.setattr(
        OnePosition, "rows_of", lambda self, prompt: rows.append(len(prompt)) or rows_of(self, prompt)
    )
    monkeypatch.setattr(OnePosition, "rows_at_once", lambda _: 50)
    monkeypatch.setattr(measure, "prompts_that_fit", lambda *_: 2)
    monkeypatch.setattr(forward, "rows_that_fit", lambda *_: 3)
    found = measured("self_feeding", model, here, seed=1)
    assert batches == [2, 2] and max(rows) == 50
    for name in wanted.data_vars:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    other = measured("self_feeding", model, here, seed=2)
    np.testing.assert_allclose(other["after"][:, 0], wanted["after"][:, 0], rtol=1e-4, atol=1e-5)
    moved = np.abs(other["after"] - wanted["after"]).mean(("fed", "prompt", "position"))
    assert (moved[2] > 1e-2).all()


def test_random_head_is_another_one_and_every_other_one_can_be_drawn():
    heads = [(layer, head) for layer in range(2) for head in range(3)]
    drawn = {measure._another_head((1, 1), heads, seed) for seed in range(100)}
    assert drawn == set(heads) - {(1, 1)}


def test_a_model_of_one_head_cannot_be_fed_anothers_output():
    one = SimpleNamespace(name="tiny", n_layers=1, n_heads=1)
    with pytest.raises(NotMeasurable, match="tiny: has one head"):
        measure.MEASUREMENT.compute(one, {}, {}, 0)


def test_only_the_first_prompts_are_fed_and_say_which_heads_are(family, monkeypatch):
    model, hf = family("gpt2")
    here = prompts(6)
    monkeypatch.setattr(measure, "SELF_FEEDING_PROMPTS", 2)
    fed = measured("self_feeding", model, here)
    assert fed["prompt"].values.tolist() == [0, 1]
    tokens = tokens_of(here)[:2]
    clean = reference.forward(hf, tokens)
    means = {
        (layer, head): effect(hf, clean, tokens, clean["z"][layer], layer, head).mean().item()
        for layer in range(3)
        for head in range(HEADS)
    }
    order = sorted(means, key=means.get, reverse=True)
    heads = list(zip(fed["layer"].values.tolist(), fed["head"].values.tolist(), strict=True))
    assert fed["rank"].values.tolist() == [order.index(head) + 1 for head in heads]


def test_what_comes_after_the_attention_does_not_run(family):
    model, _ = family("neox-sequential")
    replay = Replay(model, 12)
    ran = []
    modules = (*model.mlp_output_projections, *model.blocks)
    handles = [module.register_forward_hook(lambda *_: ran.append(1)) for module in modules]
    residual = torch.randn(2, 12, 32)
    z = attention_z(model, replay, 1, residual)
    for handle in handles:
        handle.remove()
    assert z.shape == (2, 12, 4, 8) and not ran
    assert not any(projection._forward_pre_hooks for projection in model.output_projections)
    with pytest.raises(RuntimeError, match="did not run"):
        z_reached(model, 2, lambda: None)
    replay.block(1, residual)  # still runs whole


@settings(max_examples=25, deadline=None)
@given(slope=st.floats(-3, 3), seed=st.integers(0, 99), n_prompts=st.integers(2, 9))
def test_a_straight_line_has_its_slope_in_every_sample(slope, seed, n_prompts):
    found = slopes(feeding({(0, 0): (slope, 1, 0)}, n_prompts=n_prompts), 20, seed)
    assert found.drawn.shape == (1, 3, 5, 21)
    np.testing.assert_allclose(found.drawn[0, 0, -1], slope, atol=1e-9)
    np.testing.assert_allclose(found.drawn[0, 1], 1, atol=1e-9)
    np.testing.assert_allclose(found.drawn[0, 2, -1], 0, atol=1e-9)


def test_slopes_are_least_squares_over_the_prompts_drawn():
    fed = feeding({(0, 0): (2, 1, 1), (3, 1): (0.5, 1, 0)}, noise=1.0)
    before, after = fed["before"].values, fed["after"].values
    found = slopes(fed, 30, seed=4).drawn
    drawn = np.random.Generator(np.random.PCG64(4)).multinomial(6, np.full(6, 1 / 6), size=30)
    for sample, times in enumerate([np.ones(6, dtype=int), *drawn]):
        index = np.repeat(np.arange(6), times)
        for i, v, s in ((0, 0, 4), (1, 2, 1)):
            wanted = np.polyfit(before[i, index].ravel(), after[i, v, s][index].ravel(), 1)[0]
            assert abs(found[i, v, s, sample] - wanted) < 1e-9


def test_table_has_the_published_columns_and_intervals():
    fed = feeding({(2, 1): (1.5, 1, 0.9), (3, 0): (0.2, 1, 1)}, noise=0.5)
    table = self_feeding_table("some", fed)
    published = published_self_feeding()
    ours = ["slope_low", "slope_high", "slope_rescaled", "slope_everywhere"]
    assert list(table.columns) == [*published.columns, *ours]
    assert set(published["added_vector"]) == set(VECTORS) and set(published["scale"]) == set(SCALES)
    assert len(table) == 2 * 3 * 5 and set(table["model"]) == {"some"}
    row = table.set_index(["layer", "head", "added_vector", "scale"]).loc[(3, 0, "own_output", 8)]
    before, after = fed["before"].values[1], fed["after"].values[1, 0, -1]
    assert row["n_tokens"] == 30 and row["rank_by_mean_direct_effect"] == 2
    assert row["mean_direct_effect_before"] == pytest.approx(before.mean())
    assert row["mean_direct_effect_after"] == pytest.approx(after.mean())
    assert row["median_before"] == pytest.approx(np.median(before))
    assert row["median_after"] == pytest.approx(np.median(after))
    samples = slopes(fed).drawn[1, 0, -1, 1:]
    assert row["slope_after_on_before"] == pytest.approx(np.polyfit(before.ravel(), after.ravel(), 1)[0])
    ends = [row["slope_low"], row["slope_high"]]
    assert ends == pytest.approx(list(np.quantile(samples, [0.025, 0.975])))


def test_comparisons_are_in_the_rows_that_they_are_of():
    fed = feeding({(2, 1): (1.5, 1, 0.9), (3, 0): (0.2, 1, 1)})
    np.testing.assert_allclose(slopes_everywhere(fed, 5).drawn, 0.5)
    np.testing.assert_allclose(
        slopes_rescaled(fed, 5).drawn[:, :, 3], np.array([[1.5, 1, 0.9], [0.2, 1, 1]]) / 1.1
    )
    table = self_feeding_table("some", fed).set_index(["layer", "head", "added_vector", "scale"])
    assert table.loc[(3, 0, "own_output", 8), "slope_rescaled"] == pytest.approx(0.2 / 1.1)
    assert (
        table["slope_rescaled"].count() == 2 * 3
        and (table["slope_rescaled"].dropna().index.get_level_values(3) == 8).all()
    )
    assert table.loc[(3, 0, "own_output", 8), "slope_everywhere"] == pytest.approx(0.5)
    assert table["slope_everywhere"].count() == 2


def test_heads_are_counted_by_how_they_react():
    """Rows of another scale do not count; models stay in their order; released tables are counted alike."""
    heads = {(0, 0): (1.2, 1, 0.9), (1, 0): (0.7, 0.8, 0.6), (2, 1): (0.3, 1, 0.9), (3, 1): (-0.4, 0.2, 0.5)}
    tables = [
        self_feeding_table("z", feeding(heads)),
        self_feeding_table("a", feeding({(1, 1): (0.5, 1, 1)})),
    ]
    found = reactions(pd.concat(tables))
    assert found.index.tolist() == ["z", "a"]
    z, a = found.to_dict("records")
    assert (z["heads"], z["above 1"], z["below both controls"]) == (4, 1, 2)
    assert [z["smallest"], z["largest"]] == pytest.approx([-0.4, 1.2])
    assert z["mean slope, random direction"] == pytest.approx(np.mean([0.9, 0.6, 0.9, 0.5]))
    assert (a["heads"], a["above 1"], a["below both controls"]) == (1, 0, 1)
    published = published_self_feeding()
    released = reactions(published)
    assert released["heads"].tolist() == [4] * 5
    at_8 = published[(published["scale"] == 8) & (published["added_vector"] == "own_output")]
    assert released["largest"].max() == at_8["slope_after_on_before"].max()


def test_the_smallest_slope_says_where_it_is_and_on_how_few_tokens_it_hangs():
    fed = feeding({(2, 1): (0.9, 1, 1), (3, 0): (-0.2, 1, 1)}, noise=0.2)
    (row,) = smallest_slopes({"some": fed}).to_dict("records")
    own = slopes(fed)[1, 0, -1]
    assert (row["layer"], row["head"], row["slope"]) == (3, 0, own.value)
    assert (row["low"], row["high"]) == tuple(own.interval())
    before = fed["before"].values[1].ravel().tolist()
    squares = sorted((x - np.mean(before)) ** 2 for x in before)
    assert row["weight"] == pytest.approx(sum(squares[-10:]) / sum(squares))
    assert row["few tokens"] == (sum(squares[-10:]) > sum(squares) / 2)
    assert not smallest_slopes({"some": fed}, n_tokens=1)["few tokens"].item()
    fed["before"][1, 0, 0] = 1e4
    (row,) = smallest_slopes({"some": fed}, n_tokens=1).to_dict("records")
    assert row["weight"] == pytest.approx(1, abs=0.05) and row["few tokens"]


def test_changes_stand_at_the_tokens_that_are_predicted():
    fed = feeding({(2, 1): (0.9, 1, 1), (3, 0): (0.2, 1, 1)}, noise=0.2)
    changes = in_context(fed, 1, prompt=4, n_tokens=12)
    assert np.flatnonzero(np.isfinite(changes)).tolist() == [2, 4, 6, 8, 10]
    wanted = fed["after"].values[1, 0, -1, 4] - fed["before"].values[1, 4]
    np.testing.assert_allclose(changes[[2, 4, 6, 8, 10]], wanted)


def line_fed(own, direction, n_prompts=6):
    """``own`` and ``direction``: for each head, slopes on the prompts of even and of odd number."""
    fed = feeding({(0, i): (1, 1, 1) for i in range(len(own))}, n_prompts=n_prompts)
    for v, by_head in ((0, own), (2, direction)):
        for i, pair in enumerate(by_head):
            slope = np.array([pair[k % 2] for k in range(n_prompts)])[:, None]
            fed["after"][i, v, -1] = slope * fed["before"][i].values + 0.3
    return fed


def test_heads_are_chosen_on_even_prompts_and_their_slopes_are_of_odd_ones():
    fed = line_fed([(2, 0.7), (1, 3), (-1, 0.4)], [(0.5, 0.6), (0.9, 0.8), (0.7, 0)])
    found = slope_statistics(fed, 50)
    for name, wanted in {
        "largest-own-slope": 0.7,
        "smallest-own-slope": 0.4,
        "largest-random-slope": 0.8,
        "smallest-random-slope": 0.6,
    }.items():
        np.testing.assert_allclose(found[name].drawn, wanted, err_msg=name)
    assert (found["largest-own-slope"] - found["largest-random-slope"]).value == pytest.approx(-0.1)


def test_no_extreme_comes_out_of_noise():
    """Slopes that are all 1 but for noise: the largest of them where it is sought is not 1, ours is."""
    sought, told = [], []
    for seed in range(20):
        fed = feeding({(0, i): (1, 1, 1) for i in range(8)}, n_prompts=16)
        rng = np.random.default_rng(seed)
        fed["after"][:, 0, -1] = fed["before"] + 2 * rng.normal(size=fed["before"].shape)
        sought.append(slopes(fed, 0).value[:, 0, -1].max())
        told.append(slope_statistics(fed, 0)["largest-own-slope"].value)
    assert np.mean(sought) > 1.2 and abs(np.mean(told) - 1) < 0.2


def test_distance_counts_both_sides_of_1_and_no_sample_changes_sides():
    fed = feeding({(0, 0): (1.5, 1, 0.8), (0, 1): (0.5, 1, 1.2), (1, 0): (1, 1, 1)})
    found = slope_statistics(fed, 20)
    np.testing.assert_allclose(found["own-output-distance"].drawn, 1 / 3)
    np.testing.assert_allclose(found["random-direction-distance"].drawn, 0.4 / 3)
    noisy = feeding({(0, i): (1, 1, 1) for i in range(9)}, noise=1.0)
    distance = slope_statistics(noisy, 400)["own-output-distance"]
    slope = slopes(noisy, 400)[:, 0, -1]
    assert distance.value == pytest.approx(np.abs(slope.value - 1).mean())
    assert abs(np.mean(distance.samples) - distance.value) < 0.05
    assert (
        np.abs(slope.samples - 1).mean() > distance.value + 0.05
    )  # what samples with sides of their own give


def test_published_statistics_come_from_the_released_table():
    with (PUBLISHED / "published_self_feeding_heads.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["scale"] == "8"]
    found = published_statistics()
    assert list(found) == list(dict.fromkeys(row["model"] for row in rows))
    for model, statistics in found.items():

        def slope(vector, model=model):
            wanted = (model, vector)
            return [
                float(r["slope_after_on_before"]) for r in rows if (r["model"], r["added_vector"]) == wanted
            ]

        assert all(estimate.drawn.shape == (1,) for estimate in statistics.values())
        for vector, which in (("own_output", "own"), ("random_direction", "random")):
            assert statistics[f"largest-{which}-slope"].value == max(slope(vector))
            assert statistics[f"smallest-{which}-slope"].value == min(slope(vector))
        for vector, name in (("own_output", "own-output"), ("random_direction", "random-direction")):
            distance = statistics[f"{name}-distance"].value
            assert distance == pytest.approx(sum(abs(value - 1) for value in slope(vector)) / 4)
    assert found["gpt2-large"]["largest-own-slope"].value == pytest.approx(1.78146)
