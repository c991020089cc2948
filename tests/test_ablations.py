"""Kinds of ablation: what each puts in the place of heads and components; another takes a class, no more."""

import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
from families import random_tokens, save_family
from tasks import heads_task
from transformers import AutoModelForCausalLM

from selfrepair.engine import ablations
from selfrepair.engine.ablations import Constants, find_ablation
from selfrepair.engine.sites import COMPONENTS, HEADS
from selfrepair.errors import UserError
from selfrepair.models.loading import load_model
from selfrepair.store.stores import open_store

SITES = {"heads": HEADS, "components": COMPONENTS}


class Median:
    """By the median activation over all prompts and positions, of each number by itself."""

    name = "median"
    is_fitted = True
    fits_unseen = False
    has_donors = False

    def prepare(self, model, batches, site):
        by_batch = [[one.flatten(0, 1) for one in site.activations(model, tokens)] for tokens in batches]
        return Constants([torch.cat(place).median(0).values for place in zip(*by_batch, strict=True)])


def test_another_kind_is_a_class_and_its_place_in_the_list(tmp_path, monkeypatch):
    """The measurement of heads takes it, from its name in the settings to the numbers in the store."""
    monkeypatch.setitem(ablations.KINDS, "median", Median())
    folder = save_family("gpt2", tmp_path / "tiny-gpt2")
    np.save(tmp_path / "ids.npy", random_tokens(8).numpy())
    model = load_model(str(folder), "cpu")
    task = heads_task(folder, tmp_path / "ids.npy", tmp_path / "out", ablation="median")
    found = open_store(task.merge([model]))
    assert found.attrs["ablation"] == "median" and set(task.needed) == {"tokens", "constants"}

    tokens = torch.from_numpy(found["token"].values)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    median = lambda z: z.flatten(0, 1).median(0).values  # noqa: E731
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        wanted = reference.ablate(hf, tokens, layer, head, median)
        del wanted["layernorm_formula"]
        scale = wanted["logit_change"].abs().max()
        for name, values in wanted.items():
            got = found[name] if name == "sigma_clean" else found[name].sel(layer=layer, head=head)
            error = np.abs(got.values - values.numpy()).max()
            assert error <= 1e-4 * max(scale, values.abs().max()), (name, layer, head)


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_what_takes_the_place(family, site, kind):
    model, _ = family("neox-sequential")
    tokens = random_tokens()
    replacement = find_ablation(kind).prepare(model, tokens.split(4), site)
    donors = torch.tensor([3, 0, 0, 5, 1])
    nothing = site.nothing(model)
    activations = site.activations(model, tokens)
    assert len(activations) == len(nothing) == model.n_layers * (1 if site is HEADS else 2)
    for place, clean in enumerate(activations):
        by_partner = reference.replaced(kind, clean.double(), nothing[place]).float()
        by_donor = clean[donors] if kind == "resample" else by_partner[:1].expand(5, *clean.shape[1:])
        torch.testing.assert_close(replacement(place, clean), by_partner, rtol=0, atol=1e-6)
        torch.testing.assert_close(replacement(place, clean, donors), by_donor, rtol=0, atol=1e-6)


def test_what_a_component_writes_adds_up(family):
    """Embeddings and all components give the final residual stream."""
    model, _ = family("neox-parallel")
    tokens = random_tokens()
    written = sum(COMPONENTS.activations(model, tokens))
    seen = reference.forward(model.hf, tokens)["residual"]
    torch.testing.assert_close(seen[0] + written, seen[model.n_layers], rtol=1e-5, atol=1e-4)
    assert all(value.eq(0).all() for value in COMPONENTS.nothing(model))
    assert HEADS.nothing(model) is model.value_biases and model.value_biases[0].abs().max() > 0


def test_unknown_kinds_are_refused():
    with pytest.raises(UserError, match="unknown ablation 'none'; known are resample, mean, zero, optimal"):
        find_ablation("none")


def test_the_kinds_are_known_without_pytorch():
    """A command line that names a wrong one is answered at once."""
    code = "import sys, selfrepair.engine.ablations as a; from selfrepair.engine import find_ablation; "
    code += "assert a.ABLATIONS and 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
