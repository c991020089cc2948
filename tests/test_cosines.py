"""Cosines between what heads write, and attend to, against plain models; means of them by distance."""

import copy

import numpy as np
import pytest
import reference
import torch
from families import ALL_FAMILIES
from readings import HEADS, close, cosines_of, measured, prompts, some_cosines, tokens_of, written
from transformers import AutoModelForCausalLM

from selfrepair.analysis.cosines import cosine_by_distance, head_cosines, neighbours_minus_distant
from selfrepair.measure import cosines as measure


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


def test_matrix_is_the_mean_over_the_prompts_of_all_shards():
    cosines = some_cosines(4, n_prompts=6)
    np.testing.assert_allclose(head_cosines(cosines), sum(cosines["heads_sum"].values) / 6)
