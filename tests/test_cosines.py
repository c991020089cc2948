"""Cosines between what heads write, and attend to, against plain models; means of them by distance."""

import copy
import itertools
import statistics

import numpy as np
import pytest
import reference
import torch
from families import ALL_FAMILIES
from readings import HEADS, close, cosines_of, measured, prompts, some_cosines, tokens_of, written
from transformers import AutoModelForCausalLM

from selfrepair.analysis.cosines import (
    cosine_by_distance,
    head_cosines,
    neighbours_in_random_order,
    neighbours_minus_distant,
)
from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.layer_orders import end_of_orders, layer_orders
from selfrepair.measure import cosines as measure
from selfrepair.statistics import bootstrap_weights


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_cosines_of_head_outputs(family, name, monkeypatch):
    model, hf = family(name)
    here = prompts(4, 9)
    monkeypatch.setattr(measure, "COSINE_BYTES", 4 * 12 * 32 * 3)  # three positions at once
    found = measured("cosines", model, here)
    clean = reference.forward(hf, tokens_of(here))
    outputs = [
        written(hf, clean["z"][layer], layer, head)[:, :-1] for layer in range(3) for head in range(HEADS)
    ]
    cosine = torch.stack(
        [torch.stack([torch.cosine_similarity(a, b, dim=-1).mean(1) for b in outputs]) for a in outputs]
    )
    close(head_cosines(found), cosine.mean(-1), 1e-5)
    for a in range(3):
        for b in range(3):
            pairs = [(i, j) for i in range(4 * a, 4 * a + 4) for j in range(4 * b, 4 * b + 4) if i != j]
            close(found["layers"][a, b], torch.stack([cosine[pair] for pair in pairs]).mean(0), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_cosines_of_attention_patterns(family, name):
    model, hf = family(name)
    here = prompts(4, 9)
    found = measured("attention_cosines", model, here)
    eager = (
        AutoModelForCausalLM.from_config(copy.deepcopy(hf.config), attn_implementation="eager")
        .double()
        .eval()
    )
    eager.load_state_dict(hf.state_dict())
    patterns = eager(input_ids=tokens_of(here), output_attentions=True).attentions
    heads = [pattern[:, head, 1:-1] for pattern in patterns for head in range(HEADS)]
    cosine = torch.stack(
        [torch.stack([torch.cosine_similarity(a, b, dim=-1).mean(1) for b in heads]) for a in heads]
    )
    close(found["heads"], cosine, 1e-5)


def test_cosine_by_distance_and_neighbours():
    layers = np.zeros((5, 5, 2))
    for a in range(5):
        for b in range(5):
            layers[a, b] = [10.0 ** -abs(a - b), 0]
    layers[0, 3] = layers[3, 0] = [0.5, 0]
    cosines = cosines_of(layers, np.eye(10)[None])
    found = cosine_by_distance(cosines, 10)
    np.testing.assert_allclose(found.value, np.array([1, 0.1, 0.01, (0.5 + 0.001) / 2, 0.0001]) / 2)
    gap = neighbours_minus_distant(cosines, 10)
    assert gap.value == pytest.approx((0.1 - (0.5 + 0.001 + 0.0001) / 3) / 2)


def end_by_hand(values):
    """The smallest value that at most one in twenty of all is above; NaN if none is."""
    end = min(v for v in values if sum(w > v + 1e-12 for w in values) <= len(values) / 20)
    return end if max(values) > end + 1e-12 else np.nan


@pytest.mark.parametrize("n_layers", [4, 5, 6])
def test_neighbours_against_layers_in_every_order(n_layers):
    """By loops over all orders, of every sample; of four layers no order is among the highest 5% alone."""
    some = np.random.default_rng(n_layers).normal(size=(n_layers, n_layers, 4))
    some = some + some.transpose(1, 0, 2)
    found = neighbours_in_random_order(cosines_of(some, np.eye(2)[None]), 3)
    places = list(itertools.combinations(range(n_layers), 2))
    for sample, weights in enumerate([np.ones(4), *bootstrap_weights(4, 3)]):
        layers = (some * weights).sum(-1) / 4
        gaps = []
        for order in itertools.permutations(range(n_layers)):
            between = {(a, b): layers[order[a], order[b]] for a, b in places}
            near = statistics.fmean(v for (a, b), v in between.items() if b - a == 1)
            far = statistics.fmean(v for (a, b), v in between.items() if b - a >= 3)
            gaps.append(near - far)
        assert found.drawn[sample] == pytest.approx(end_by_hand(gaps), nan_ok=True)
        if sample == 0:
            gap = neighbours_minus_distant(cosines_of(some, np.eye(2)[None]), 0)
            assert gap.value == pytest.approx(gaps[0])
    assert np.isnan(found.drawn).all() == (n_layers == 4)


def test_orders_of_many_layers_are_drawn():
    assert len({tuple(order) for order in layer_orders(5).tolist()}) == len(layer_orders(5)) == 120
    drawn = layer_orders(12)
    assert drawn.shape == (5000, 12) and (np.sort(drawn, axis=1) == np.arange(12)).all()
    np.testing.assert_array_equal(drawn, layer_orders(12))
    assert abs(drawn.mean(0) - 5.5).max() < 0.3
    weights, parts = np.where(drawn < 6, 1.0, -1.0), np.random.default_rng(1).normal(size=(12, 2))
    wanted = np.quantile(weights @ parts, 0.95, axis=0, method="inverted_cdf")
    np.testing.assert_allclose(end_of_orders(weights, Estimate(parts)).drawn, wanted)


def test_matrix_is_the_mean_over_the_prompts_of_all_shards():
    cosines = some_cosines(4, n_prompts=6)
    np.testing.assert_allclose(head_cosines(cosines), sum(cosines["heads_sum"].values) / 6)
