"""Growth of later heads when a head is ablated, against plain models in float64; on which tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import xarray as xr
from families import ALL_FAMILIES
from readings import HEADS, close, effect, measured, prompts, tokens_of

from selfrepair.engine.ablations import ABLATIONS
from selfrepair.errors import NotMeasurable
from selfrepair.measure import head_growth as measure
from selfrepair.measure.judged_tokens import CONTROL, SELECTED, TOP, judged_tokens
from selfrepair.measure.measurement import find_measurement

LAYERS = 3


def masks(hf, clean, tokens, layer, head, fraction):
    """Top and control tokens of a head, selected the slow way."""
    own = effect(hf, clean, tokens, clean["z"][layer], layer, head)
    order = own.flatten().argsort(descending=True)
    top = torch.zeros(own.numel(), dtype=bool)
    top[order[: int(np.ceil(fraction * own.numel()))]] = True
    small = torch.zeros(own.numel(), dtype=bool)
    small[own.flatten().abs().argsort()[: int(np.ceil(own.numel() / 2))]] = True
    top, small = top.view_as(own), small.view_as(own)
    return top, small & ~top & top.any(1, keepdim=True)


@torch.no_grad()
def growth_by_plain_passes(hf, tokens, kind, fraction):
    """``growth``, ``clean_effect`` and ``count``, one full pass of the model for each ablated head."""
    clean = reference.forward(hf, tokens)
    places = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    shape = (LAYERS, HEADS, LAYERS, HEADS, len(tokens))
    growth, clean_effect = torch.zeros(2, *shape).double(), torch.zeros(shape).double()
    count = torch.zeros(2, LAYERS, HEADS, len(tokens))
    for layer, head in places:
        tokens_of_head = masks(hf, clean, tokens, layer, head, fraction)
        width = clean["z"][layer].shape[-1] // HEADS
        part = slice(head * width, (head + 1) * width)
        nothing = reference.value_bias(hf, layer)[part]
        new = reference.replaced(kind, clean["z"][layer][..., part], nothing)
        ablated = reference.forward(hf, tokens, (layer, head, new))
        for selection, chosen in enumerate(tokens_of_head):
            count[selection, layer, head] = chosen.sum(1)
        for other, number in places:
            before, after = (
                effect(hf, clean, tokens, run["z"][other], other, number) for run in (clean, ablated)
            )
            clean_effect[layer, head, other, number] = (before * tokens_of_head[0]).sum(1)
            if other > layer:
                for selection, chosen in enumerate(tokens_of_head):
                    growth[selection, layer, head, other, number] = ((after - before) * chosen).sum(1)
    return growth, clean_effect, count


def equals_plain_passes(family, name, kind, here, **settings):
    model, hf = family(name)
    found = measured("head_growth", model, here, ablation=kind, **settings)
    growth, clean_effect, count = growth_by_plain_passes(hf, tokens_of(here), kind, settings["fraction"])
    assert found.attrs["selections"] == [TOP, CONTROL] == list(SELECTED)
    assert np.array_equal(found["count"], count)
    close(found["growth"], growth)
    close(found["clean_effect"], clean_effect)
    assert growth[:, 0].abs().amax((0, 1, 4))[1:].min() > 1e-3  # every later head changes


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_growth_and_clean_effects_of_every_family(family, name):
    """Grouped queries and parallel blocks among them."""
    equals_plain_passes(family, name, "resample", prompts(6, 9), fraction=0.1)


@pytest.mark.parametrize("kind", [kind for kind in ABLATIONS if kind in ("mean", "zero")])
def test_growth_by_other_ablations(family, kind):
    equals_plain_passes(family, "neox-parallel", kind, prompts(4, 8), fraction=0.2)


def test_batches_and_rows_do_not_matter(family, monkeypatch):
    model, _ = family("gpt2")
    here = prompts(6, 9)
    wanted = measured("head_growth", model, here)
    monkeypatch.setattr(measure, "rows_that_fit", lambda *_: 3)
    monkeypatch.setattr(measure, "pairs_at_once", lambda *_: 1)
    found = measured("head_growth", model, here)
    for name in ("growth", "clean_effect", "count"):
        close(found[name], wanted[name].values, 1e-5)


def test_on_all_tokens_later_heads_sum_to_the_repair_by_heads(family):
    model, _ = family("llama-gqa")
    here = prompts(4, 9)
    found = measured("head_growth", model, here, fraction=1.0)
    heads = measured("heads", model, here)
    close(found["growth"][0].sum(("layer", "head")), heads["self_repair_heads"].sum("position").values)
    assert (found["count"][1] == 0).all()  # no token is left that a head is not judged on


def test_only_some_pairs_are_run():
    shards = find_measurement("head_growth").shards
    assert list(shards({"n_prompts": 788})) == [0, 16] and list(shards({"n_prompts": 8})) == [0]


def test_a_model_of_one_layer_has_no_later_heads():
    one = SimpleNamespace(name="shallow", n_layers=1)
    with pytest.raises(NotMeasurable, match="shallow: has one layer"):
        measure.MEASUREMENT.compute(one, {}, {}, 0)


def test_tokens_are_selected_among_those_of_all_prompts():
    """Top tokens by signed direct effect; control tokens by its size, of prompts that hold a top token."""
    direct_effect = np.array([[-9.0, 0.1, 0.2, 0.3], [8.0, 0.05, -0.4, 7.0], [-5.0, 6.0, 0.0, 1.0]])
    swept = xr.Dataset(
        {"direct_effect": (("layer", "head", "prompt", "position"), direct_effect[None, None])}
    )
    top, control = judged_tokens(swept, 0.2, np.array([1, 2]))[:, 0, 0].astype(int).tolist()
    assert top == [[1, 0, 0, 1], [0, 1, 0, 0]]
    assert control == [[0, 1, 1, 0], [0, 0, 1, 0]]
