"""Other pairings of prompts: each head's numbers against plain passes with the donors that are noted."""

import numpy as np
import pytest
import reference
import torch
from families import random_tokens, save_family
from tasks import wanted_settings
from transformers import AutoModelForCausalLM

from selfrepair.measure import donor_draws
from selfrepair.measure.donor_draws import KEPT, pairing
from selfrepair.measure.task import Task
from selfrepair.models.loading import load_model
from selfrepair.store.stores import open_store

N = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_family("gpt2", tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture
def measured(folder, tmp_path):
    tokens = tmp_path / "ids.npy"
    np.save(tokens, random_tokens(N).numpy())

    def measure(**changes):
        settings = wanted_settings(tokens, ablation="resample", donor_draws=2, **changes)
        task = Task("donor_draws", str(folder), settings, tmp_path / "out")
        return open_store(task.merge([load_model(str(folder), "cpu")]))

    return measure


def test_every_draw_is_a_plain_pass_with_its_donors(measured, folder):
    found = measured()
    assert found["draw"].values.tolist() == [1, 2] and set(found.data_vars) == {*KEPT, "donor"}
    tokens = random_tokens(N)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for draw in (1, 2):
        here = found.sel(draw=draw)
        donor = here["donor"].values
        assert sorted(donor) == list(range(N)) and (donor[donor] == np.arange(N)).all()
        assert (donor != np.arange(N)).all()
        for layer, head in ((0, 1), (2, 3)):
            width = hf.config.hidden_size // hf.config.num_attention_heads
            z = reference.forward(hf, tokens)["z"][layer][..., head * width : (head + 1) * width]
            of_donors = lambda clean, own=z, chosen=donor: own[chosen]  # noqa: E731
            wanted = reference.ablate(hf, tokens, layer, head, of_donors)
            for name in KEPT:
                np.testing.assert_allclose(here[name][layer, head], wanted[name], atol=1e-4, err_msg=name)
    assert not np.array_equal(found["donor"][0], found["donor"][1])


def test_at_most_so_many_prompts_the_first_ones(measured, monkeypatch):
    monkeypatch.setattr(donor_draws, "MOST_PROMPTS", 4)
    found = measured()
    assert found["prompt"].values.tolist() == [0, 1, 2, 3] and found["donor"].max() == 3


def test_draws_are_seeded():
    draws = [pairing(64, seed, draw).tolist() for seed in (0, 1) for draw in (1, 2)]
    assert draws == [pairing(64, seed, draw).tolist() for seed in (0, 1) for draw in (1, 2)]
    assert len({tuple(draw) for draw in draws}) == 4


def test_nothing_without_draws():
    assert not donor_draws.MEASUREMENT.applies_to({"donor_draws": 0})
    assert donor_draws.MEASUREMENT.applies_to({"donor_draws": 1})
