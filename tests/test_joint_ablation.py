"""A head and a later one ablated together, against plain models in float64; which heads are taken."""

import numpy as np
import pytest
import reference
import torch
import xarray as xr
from families import ALL_FAMILIES
from readings import HEADS, close, measured, prompts, tokens_of
from reference import parts
from test_head_growth import masks

from selfrepair.engine.ablations import ABLATIONS
from selfrepair.errors import NotMeasurable
from selfrepair.measure import joint_ablation as measure
from selfrepair.measure.joint_ablation import Trio, choose_trios


@torch.no_grad()
def logits_without(hf, tokens, heads, kind):
    """Logits of a full pass in which all of ``heads`` are ablated by what they have in the clean run."""
    clean = reference.forward(hf, tokens)
    handles = []
    for layer, head in heads:
        width = clean["z"][layer].shape[-1] // HEADS
        part = slice(head * width, (head + 1) * width)
        new = reference.replaced(kind, clean["z"][layer][..., part], reference.value_bias(hf, layer)[part])

        def put_in(_, args, part=part, new=new):
            z = args[0].clone()
            z[..., part] = new.reshape(z[..., part].shape)
            return (z,)

        handles.append(parts(hf)[1][layer].register_forward_pre_hook(put_in))
    try:
        return hf(input_ids=tokens, use_cache=False).logits[:, :-1]
    finally:
        for handle in handles:
            handle.remove()


def equals_plain_passes(family, monkeypatch, name, kind, fraction=0.2):
    monkeypatch.setattr(measure, "MOST_HEADS", 3)
    model, hf = family(name)
    here = prompts(6, 9)
    tokens = tokens_of(here)
    found = measured("joint_ablation", model, here, ablation=kind, fraction=fraction)
    clean = reference.forward(hf, tokens)
    odd = torch.arange(6) % 2 == 1
    runs = ("clean", "head", "backup", "both", "middling", "both with middling")
    assert found.attrs["runs"] == list(runs) and found.sizes["trio"] == 3
    assert (found["count"].sum("prompt") > 0).sum() > 1
    for number in range(found.sizes["trio"]):
        head, backup, middling = (tuple(found[who].values[number]) for who in ("head", "backup", "middling"))
        assert head[0] < min(backup[0], middling[0]) and backup != middling
        chosen = masks(hf, clean, tokens, *head, fraction)[0] & odd[:, None]
        assert np.array_equal(found["count"][number], chosen.sum(1))
        together = [[], [head], [backup], [head, backup], [middling], [head, middling]]
        for run, heads in enumerate(together):
            logits = logits_without(hf, tokens, heads, kind)
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            full = torch.cat([logits, logits[:, :1]], 1)  # the last position is dropped again
            logit = reference.centred_correct_logit(full, tokens)
            for name, values in (("loss", loss), ("logit", logit)):
                wanted = (values * chosen).sum(1)
                assert abs(found[name][run, number].values - wanted.numpy()).max() < 1e-3, (name, heads)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_losses_and_logits_of_every_family(family, monkeypatch, name):
    """Grouped queries and parallel blocks among them."""
    equals_plain_passes(family, monkeypatch, name, "resample")


@pytest.mark.parametrize("kind", [kind for kind in ABLATIONS if kind in ("mean", "zero")])
def test_by_other_ablations(family, monkeypatch, kind):
    equals_plain_passes(family, monkeypatch, "neox-parallel", kind)


def test_batches_and_rows_do_not_matter(family, monkeypatch):
    model, _ = family("opt")
    wanted = measured("joint_ablation", model, prompts(8, 9))
    monkeypatch.setattr(measure, "rows_that_fit", lambda *_: 2)
    found = measured("joint_ablation", model, prompts(8, 9))
    for name in ("loss", "logit"):
        close(found[name], wanted[name].values, 1e-5)


def test_alone_a_head_changes_the_logit_as_measured_with_all_heads(family):
    model, hf = family("llama-gqa")
    here = prompts(6, 9)
    tokens = tokens_of(here)
    clean = reference.forward(hf, tokens)
    found, heads = (measured(name, model, here) for name in ("joint_ablation", "heads"))
    change = (found["logit"][1] - found["logit"][0]).values
    for number, (layer, head) in enumerate(found["head"].values):
        chosen = masks(hf, clean, tokens, int(layer), int(head), 0.25)[0].numpy()
        chosen &= (np.arange(6) % 2 == 1)[:, None]
        wanted = np.where(chosen, heads["logit_change"][layer, head], 0).sum(1)
        np.testing.assert_allclose(change[number], wanted, atol=1e-3)


def grown(growth, clean_effect, count=2):
    """Growth ``[layer, head]`` when head 0 of layer 0 is ablated: on even prompts; on odd ones nothing."""
    n_layers, n_heads = np.shape(growth)
    values = np.zeros((2, n_layers, n_heads, n_layers, n_heads, 4))
    effects = np.zeros(values.shape[1:])
    values[0, 0, 0, ..., 0::2] = count * np.array(growth)[..., None] / 2
    values[0, 0, 0, ..., 1::2] = -1000 * values[0, 0, 0, ..., 0::2]
    effects[0, 0, ..., 0::2] = count * np.array(clean_effect)[..., None] / 2
    counts = np.zeros((2, n_layers, n_heads, 4))
    counts[0, 0, 0] = count / 2
    places = ("layer", "head", "prompt")
    ablated = ("ablated_layer", "ablated_head")
    return xr.Dataset(
        {
            "growth": (("selection", *ablated, *places), values),
            "clean_effect": ((*ablated, *places), effects),
            "count": (("selection", *ablated, "prompt"), counts),
        },
        {"prompt": np.arange(4)},
    )


def test_the_backup_grows_most_and_the_other_is_middling_and_as_strong():
    """By even prompts alone; the first layer's own heads are not later ones."""
    growth = [[9, 9, 9], [0.5, 0.1, 0.2], [-0.7, 0.4, 0.3]]
    effect = [[0, 0, 0], [1, 1, 0.9], [1, 0.2, 0.7]]
    # Without the backup, by growth: 0.4, then 0.3, 0.2, 0.1, then −0.7; the middle three.
    assert choose_trios(grown(growth, effect)) == [Trio((0, 0), (1, 0), (1, 1))]
    effect[1][1] = -1
    assert choose_trios(grown(growth, effect)) == [Trio((0, 0), (1, 0), (1, 2))]


def test_the_strongest_backups_come_first():
    one = grown([[0, 0], [0.1, 0.2], [0.3, 0.1]], np.zeros((3, 2)))
    for name in ("growth", "count"):
        one[name][:, 0, 1] = 4 * one[name][:, 0, 0] if name == "growth" else one[name][:, 0, 0]
    assert [trio.head for trio in choose_trios(one)] == [(0, 1), (0, 0)]


def test_a_head_with_one_head_after_it_has_no_other_to_compare():
    assert choose_trios(grown([[0], [0.1]], np.zeros((2, 1)))) == []
    with pytest.raises(NotMeasurable, match="no head has two heads after it"):
        shallow = grown([[0], [0.1]], np.zeros((2, 1)))
        model = type("Shallow", (), {"name": "shallow"})
        measure.MEASUREMENT.compute(model, {}, {"head_growth": shallow}, 0)
