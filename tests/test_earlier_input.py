"""Layers fed their predecessor's input, or whose predecessor lacks a head, against full passes."""

import numpy as np
import pytest
import reference
import torch
from families import ALL_FAMILIES
from readings import HEADS, changes_of, close, effect, measured, prompts, tokens_of, z_with_input
from transformers import GPT2Config, GPT2LMHeadModel

from selfrepair.analysis.earlier_input import changes_table, correlation, mean_changes
from selfrepair.errors import NotMeasurable, UserError
from selfrepair.measure import earlier_input as measure
from selfrepair.models.loading import load_model


def top(values, fraction):
    """A mask of the ceil(fraction · n) largest values."""
    kept = sorted(values.flatten().tolist(), reverse=True)[
        : -(-int(fraction * values.numel() * 1000) // 1000)
    ]
    return values >= kept[-1]


@pytest.mark.parametrize(
    ("name", "ablation"),
    [*((name, "resample") for name in ALL_FAMILIES), ("gpt2", "mean"), ("neox-parallel", "zero")],
)
def test_one_layer_earlier_equals_full_passes(family, name, ablation):
    model, hf = family(name)
    here = prompts()
    tokens = tokens_of(here)
    found = measured("earlier_input", model, here, ablation=ablation, fraction=0.25)
    clean = reference.forward(hf, tokens)
    for layer in (1, 2):
        effects = [effect(hf, clean, tokens, clean["z"][layer - 1], layer - 1, head) for head in range(HEADS)]
        strongest = max(range(HEADS), key=lambda head: effects[head][top(effects[head], 0.25)].mean().item())
        chosen = top(effects[strongest], 0.25)
        assert found["ablated_head"][layer - 1] == strongest
        np.testing.assert_array_equal(found["count"][layer - 1], chosen.sum(1).numpy())
        d_head = clean["z"][layer - 1].shape[-1] // HEADS
        part = slice(strongest * d_head, (strongest + 1) * d_head)
        z = clean["z"][layer - 1][..., part]
        new = {"resample": z[[3, 4, 5, 0, 1, 2]], "mean": z.mean((0, 1)).expand_as(z)}.get(ablation)
        if ablation == "zero":
            new = reference.value_bias(hf, layer - 1)[part].expand_as(z)
        without = reference.forward(hf, tokens, (layer - 1, strongest, new))["z"][layer]
        earlier = z_with_input(hf, tokens, layer, lambda _, layer=layer: clean["residual"][layer - 1])
        for sums, changed in ((found["earlier"], earlier), (found["ablated"], without)):

            def change(head, layer=layer, changed=changed):
                own = effect(hf, clean, tokens, clean["z"][layer], layer, head)
                return effect(hf, clean, tokens, changed, layer, head) - own

            close(sums[layer - 1], torch.stack([(change(head) * chosen).sum(1) for head in range(HEADS)]))


def test_one_layer_earlier_does_not_depend_on_batches(family, monkeypatch):
    model, _ = family("llama-gqa")
    wanted = measured("earlier_input", model, prompts(), fraction=0.1)
    batches = []
    real = measure.Reading
    monkeypatch.setattr(
        measure, "Reading", lambda model, tokens: batches.append(len(tokens)) or real(model, tokens)
    )
    monkeypatch.setattr(measure, "pairs_at_once", lambda *_: 1)
    found = measured("earlier_input", model, prompts(), fraction=0.1)
    assert batches == [2, 2, 2]
    np.testing.assert_allclose(found["ablated"], wanted["ablated"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["earlier"], wanted["earlier"], rtol=1e-4, atol=1e-5)


def test_bad_requests(family, tmp_path):
    model, _ = family("gpt2")
    with pytest.raises(UserError, match="unknown ablation 'noise'"):
        measured("earlier_input", model, prompts(), ablation="noise")
    with pytest.raises(UserError, match="fraction"):
        measured("earlier_input", model, prompts(), fraction=0.0)
    single = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_layer=1, n_head=4, n_embd=32, n_positions=32))
    single.save_pretrained(tmp_path / "single")
    model.tokenizer.save_pretrained(tmp_path / "single")
    with pytest.raises(NotMeasurable, match="one layer"):
        measured("earlier_input", load_model(str(tmp_path / "single"), device="cpu"), prompts())


def test_mean_changes_and_their_correlation():
    rng = np.random.default_rng(1)
    counts = np.array([[2.0, 0, 4], [1, 1, 4]])
    earlier, ablated = rng.normal(size=(2, 2, 4, 3))
    means = mean_changes(changes_of([0, 1], earlier, ablated, counts), 50, seed=3)
    np.testing.assert_allclose(means.earlier.value, earlier.sum(-1) / 6)
    drawn = np.random.Generator(np.random.PCG64(3)).multinomial(3, np.full(3, 1 / 3), size=50)
    r = correlation(means).drawn
    assert (drawn[:, 1] == 3).any()
    for sample, times in enumerate([np.ones(3), *drawn]):
        totals = (counts * times).sum(-1)
        if (totals == 0).any():
            assert np.isnan(r[sample])
            continue
        a, b = ((values * times).sum(-1) / totals[:, None] for values in (earlier, ablated))
        np.testing.assert_allclose(means.ablated.drawn[..., sample], b)
        assert r[sample] == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_heads_are_counted_by_both_changes():
    earlier = np.array([[[2.0, 1.0], [-1.0, -3.0], [1.0, 1.0]]])
    ablated = np.array([[[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.5]]])
    changes = changes_of([1], earlier, ablated, np.full((1, 2), 2.0))
    (row,) = changes_table({"some": changes}).to_dict("records")
    assert (row["heads"], row["more both times"], row["less both times"]) == (3, 1, 1)
    assert row["size"] == pytest.approx((1 + 1 + 0.5) / (3 + 4 + 2))
    r = correlation(mean_changes(changes))
    assert [row["correlation"], row["low"], row["high"]] == [r.value, *r.interval()]
    assert row["most"] == "neither"


@pytest.mark.parametrize(
    ("n_more", "n_less", "most"), [(3, 2, "neither"), (4, 2, "more"), (2, 4, "less"), (2, 0, "more")]
)
def test_far_more_heads_are_more_than_one_and_a_half_times_as_many(n_more, n_less, most):
    change = np.array([*range(1, n_more + 1), *range(-n_less, 0)], dtype=float)[None, :, None]
    (row,) = changes_table({"some": changes_of([1], change, change, np.ones((1, 1)))}).to_dict("records")
    assert (row["more both times"], row["less both times"], row["most"]) == (n_more, n_less, most)
