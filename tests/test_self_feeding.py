"""Heads fed what heads write, against full passes; slopes and the table of what was fed."""

import csv

import numpy as np
import pytest
import reference
import torch
from families import ALL_FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import HEADS, close, effect, feeding, measured, prompts, tokens_of, written, z_with_input

from selfrepair.analysis.self_feeding import (
    published_self_feeding,
    published_statistics,
    self_feeding_table,
    slopes,
)
from selfrepair.engine import forward
from selfrepair.engine.forward import Replay, attention_z, z_reached
from selfrepair.measure import self_feeding as measure
from selfrepair.measure.self_feeding import SCALES, VECTORS
from selfrepair.paths import PUBLISHED


def equal(found, wanted, tolerance=1e-4):
    return np.abs(found.values - wanted.numpy()).max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_self_feeding_equals_full_passes(family, name, monkeypatch):
    model, hf = family(name)
    drawn = {}
    real = measure._random_like

    def spy(output, seed, indices):
        drawn[tuple(seed[1:])] = real(output, seed, indices)
        return drawn[tuple(seed[1:])]

    monkeypatch.setattr(measure, "_random_like", spy)
    here = prompts()
    tokens = tokens_of(here)
    fed = measured("self_feeding", model, here, seed=7)
    assert fed.attrs["vectors"] == list(VECTORS) and fed["scale"].values.tolist() == list(SCALES)
    heads = list(zip(fed["layer"].values.tolist(), fed["head"].values.tolist(), strict=True))
    before, after_ = fed["before"], fed["after"]
    with torch.no_grad():
        clean = reference.forward(hf, tokens)
        outputs = {
            (layer, head): written(hf, clean["z"][layer], layer, head)
            for layer in range(3)
            for head in range(HEADS)
        }
        means = {key: effect(hf, clean, tokens, clean["z"][key[0]], *key).mean().item() for key in outputs}
        order = sorted(means, key=means.get, reverse=True)
        assert heads == sorted({*order[:5], *(key for key in outputs if key[0] == 2)})
        assert fed["rank"].values.tolist() == [order.index(head) + 1 for head in heads]
        for i in (0, len(heads) // 2, len(heads) - 1):
            layer, head = heads[i]

            def after(vector, scale, layer=layer, head=head):
                z = z_with_input(hf, tokens, layer, lambda residual: residual + scale * vector)
                return effect(hf, clean, tokens, z, layer, head)

            close(before[i], effect(hf, clean, tokens, clean["z"][layer], layer, head))
            for s, scale in enumerate(SCALES):
                close(after_[i, 0, s], after(outputs[layer, head], scale))
                close(after_[i, 2, s], after(drawn[layer, head].double(), scale))
            others = [key for key in outputs if key != (layer, head)]
            fitting = [key for key in others if equal(after_[i, 1, -1], after(outputs[key], SCALES[-1]))]
            assert len(fitting) == 1
            close(after_[i, 1, 0], after(outputs[fitting[0]], SCALES[0]))
            random = drawn[layer, head].double()
            torch.testing.assert_close(
                random.norm(dim=-1), outputs[layer, head].norm(dim=-1), rtol=1e-4, atol=1e-6
            )
            assert torch.cosine_similarity(random, outputs[layer, head], dim=-1).abs().mean() < 0.4
    first, second = (drawn[head] for head in heads[:2])
    for other in (
        second,
        first.roll(1, 0),
        first.roll(1, 1),
    ):  # another head, prompt, position: another direction
        assert torch.cosine_similarity(first, other, dim=-1).abs().mean() < 0.4


def test_self_feeding_does_not_depend_on_batches_but_on_the_seed(family, monkeypatch):
    model, _ = family("opt")
    here = prompts(4, 8)
    wanted = measured("self_feeding", model, here, seed=1)
    batches = []
    real = measure.Reading
    monkeypatch.setattr(
        measure, "Reading", lambda model, tokens: batches.append(len(tokens)) or real(model, tokens)
    )
    monkeypatch.setattr(measure, "prompts_that_fit", lambda *_: 2)
    monkeypatch.setattr(forward, "rows_that_fit", lambda *_: 3)
    found = measured("self_feeding", model, here, seed=1)
    assert batches == [2, 2]
    np.testing.assert_allclose(found["after"], wanted["after"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["before"], wanted["before"], rtol=1e-4, atol=1e-5)
    other = measured("self_feeding", model, here, seed=2)
    np.testing.assert_allclose(other["after"][:, 0], wanted["after"][:, 0], rtol=1e-4, atol=1e-5)
    moved = np.abs(other["after"] - wanted["after"]).mean(("fed", "prompt", "position"))
    assert (moved[2] > 1e-2).all()


def test_random_head_is_another_one_and_every_other_one_can_be_drawn():
    heads = [(layer, head) for layer in range(2) for head in range(3)]
    drawn = {measure._another_head((1, 1), heads, seed) for seed in range(100)}
    assert drawn == set(heads) - {(1, 1)}


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
    assert list(table.columns) == [*published.columns, "slope_low", "slope_high"]
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

        largest, smallest, direction = (
            statistics[name] for name in ("largest-own-slope", "smallest-own-slope", "random-direction-slope")
        )
        assert largest.drawn.shape == smallest.drawn.shape == direction.drawn.shape == (1,)
        assert largest.value == max(slope("own_output")) and smallest.value == min(slope("own_output"))
        assert direction.value == pytest.approx(sum(slope("random_direction")) / 4)
    assert found["gpt2-large"]["largest-own-slope"].value == pytest.approx(1.78146)
