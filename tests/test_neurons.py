"""Neurons against full hooked forward passes of plain Hugging Face models: what is measured, and its tables
and figures."""

import dataclasses
import functools
import itertools
import re

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import ALL_FAMILIES, PARALLEL, load_family, random_tokens
from matplotlib.patches import Rectangle

from selfrepair.analysis.claims import claims_table
from selfrepair.analysis.neuron_examples import neurons_in_context, passages
from selfrepair.analysis.neuron_repair import IN_WORDS, repairs_of, totals_of
from selfrepair.analysis.neuron_sets import chance_overlap
from selfrepair.analysis.neurons import ModelNeurons, by_selection, claimed, over_models, statistics_table
from selfrepair.analysis.passages import AFTER, BEFORE
from selfrepair.analysis.rules import load_claims, load_statistics
from selfrepair.analysis.words import signed
from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.head_ablation import ablate_heads
from selfrepair.engine.sites import HEADS
from selfrepair.errors import NotMeasurable, UserError
from selfrepair.measure import heads, neuron_effects, neurons, pairs
from selfrepair.measure.neuron_summary import SELECTIONS, HeadTokens
from selfrepair.measure.neurons import repairing_neurons
from selfrepair.measure.task import Task
from selfrepair.measure.tokens import of_prompts
from selfrepair.plots import neurons as figures
from selfrepair.plots import top_neurons as top_figures
from selfrepair.store.stores import open_store
from selfrepair.text.corpora import Prompts

N_LAYERS, N_HEADS = 3, 4


def later(name, layer):
    """The MLPs that run after the heads of a layer."""
    return range(layer + (name in PARALLEL), N_LAYERS)


def slow_run(hf, tokens, patch=None):
    """What the reference sees on one full pass, and what goes into each MLP's output projection."""
    activations = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, i=i: activations.__setitem__(i, args[0].view(*tokens.shape, -1).clone())
        )
        for i, module in enumerate(reference.mlp_projections(hf))
    ]
    try:
        return reference.forward(hf, tokens, patch), activations
    finally:
        for handle in handles:
            handle.remove()


def slow_effects(hf, tokens, activations, mlp, sigma):
    """Direct effect of every neuron [prompt, position-1, neuron], one neuron at a time through norm and
    unembedding."""
    W = reference.out_matrix(reference.mlp_projections(hf)[mlp])
    return torch.stack(
        [
            reference.read_frozen(hf, activations[mlp][..., n, None] * W[n], sigma, tokens)
            for n in range(len(W))
        ],
        -1,
    )


def everywhere(tokens):
    return np.ones((len(tokens), tokens.shape[1] - 1), dtype=bool)


def prepared(model, tokens, kind):
    return find_ablation(kind).prepare(model, [tokens], HEADS)


def effects_of(model, tokens, kind, selected):
    return neuron_effects.neuron_effects(model, tokens, prepared(model, tokens, kind), selected)


def dense(effects, shape):
    """Clean effects and changes as [prompt, position-1, neuron] by (head, MLP); NaN where nothing was
    given."""
    found = {}
    for e in effects:
        clean, change = found.setdefault(
            (e.of[:2], e.of.mlp),
            tuple(torch.full((*shape, e.clean.shape[1]), torch.nan).double() for _ in "ab"),
        )
        assert clean[e.prompt, e.position].isnan().all()  # each token once
        clean[e.prompt, e.position], change[e.prompt, e.position] = e.clean.double(), e.change.double()
    return found


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_neuron_equals_a_full_forward_pass(family, name, kind):
    model, hf = family(name)
    tokens = random_tokens()
    heads = [(layer, (layer + 1) % N_HEADS) for layer in range(N_LAYERS) if later(name, layer)]
    found = dense(
        effects_of(model, tokens, kind, {head: everywhere(tokens) for head in heads}),
        everywhere(tokens).shape,
    )
    assert set(found) == {(head, mlp) for head in heads for mlp in later(name, head[0])}
    clean, clean_activations = slow_run(hf, tokens)
    sigma = reference.sigma(hf, clean["residual"][N_LAYERS])
    for layer, head in heads:
        width = clean["z"][layer].shape[-1] // N_HEADS
        part = slice(head * width, (head + 1) * width)
        z = clean["z"][layer][..., part]
        new = reference.replaced(kind, z, reference.value_bias(hf, layer)[part])
        _, ablated_activations = slow_run(hf, tokens, (layer, head, new))
        for mlp in later(name, layer):
            before = slow_effects(hf, tokens, clean_activations, mlp, sigma)
            change = slow_effects(hf, tokens, ablated_activations, mlp, sigma) - before
            assert change.abs().max() > 1e-2
            got_before, got_change = found[(layer, head), mlp]
            assert (got_before - before).abs().max() < 1e-4 * before.abs().max()
            assert (got_change - change).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "neox-sequential", "opt"))
def test_neurons_and_bias_sum_to_the_mlps_direct_effect(family, name, dtype, tolerance):
    model, hf = family(name, dtype)
    tokens = random_tokens()
    found = dense(effects_of(model, tokens, "zero", {(0, 0): everywhere(tokens)}), everywhere(tokens).shape)
    clean = reference.forward(hf, tokens)
    sigma = reference.sigma(hf, clean["residual"][N_LAYERS])
    for mlp in later(name, 0):
        written = clean["residual"][mlp + 1] - clean["residual"][mlp] - clean["attention"][mlp]
        wanted = reference.read_frozen(hf, written, sigma, tokens)
        bias = reference.read_frozen(
            hf, reference.mlp_projections(hf)[mlp].bias.expand_as(written), sigma, tokens
        )
        assert bias.abs().max() > 1e-2
        total = found[(0, 0), mlp][0].sum(-1) + bias
        assert (total - wanted).abs().max() < tolerance * max(1, wanted.abs().max())


@pytest.mark.parametrize("name", ("llama", "llama-gqa"))
def test_gated_neurons_sum_to_the_mlps_direct_effect(family, name):
    """transformers' own RMSNorm is float32 whatever the dtype, so that 1e-9 is out of reach; there is no
    bias."""
    model, hf = family(name)
    tokens = random_tokens()
    found = dense(effects_of(model, tokens, "zero", {(0, 0): everywhere(tokens)}), everywhere(tokens).shape)
    clean = reference.forward(hf, tokens)
    sigma = reference.sigma(hf, clean["residual"][N_LAYERS])
    for mlp in later(name, 0):
        written = clean["residual"][mlp + 1] - clean["residual"][mlp] - clean["attention"][mlp]
        wanted = reference.read_frozen(hf, written, sigma, tokens)
        assert (found[(0, 0), mlp][0].sum(-1) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_changes_sum_to_the_sweeps_repair_by_mlps(family, name, kind, dtype, tolerance):
    model, _ = family(name, dtype)
    tokens = random_tokens()
    swept = ablate_heads(model, tokens, prepared(model, tokens, kind))
    rng = np.random.default_rng(0)
    masks = {
        (layer, 2): rng.random(everywhere(tokens).shape) < 0.3
        for layer in range(N_LAYERS)
        if later(name, layer)
    }
    found = dense(effects_of(model, tokens, kind, masks), everywhere(tokens).shape)
    for (layer, head), mask in masks.items():
        total = sum(found[(layer, head), mlp][1].sum(-1) for mlp in later(name, layer))
        assert (total.isfinite().numpy() == mask).all()  # the selected tokens and no others
        wanted = swept.self_repair_mlps[layer, head]
        assert (total[mask] - wanted[mask]).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel"))
def test_chunks_bound_what_is_held_and_change_nothing(family, name, monkeypatch):
    model, _ = family(name)
    tokens = random_tokens()
    masks = {
        (1, 0): everywhere(tokens),
        (1, 3): np.random.default_rng(1).random(everywhere(tokens).shape) < 0.2,
    }
    whole = dense(effects_of(model, tokens, "resample", masks), everywhere(tokens).shape)
    monkeypatch.setattr(neuron_effects, "TOKENS_AT_ONCE", 4)
    monkeypatch.setattr(neuron_effects, "pairs_at_once", lambda *_: 1)
    chunks = list(effects_of(model, tokens, "resample", masks))
    assert max(len(chunk.clean) for chunk in chunks) == 4
    for at, pair in dense(chunks, everywhere(tokens).shape).items():
        for a, b in zip(pair, whole[at], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def on_all_tokens(tokens):
    ones = np.ones(everywhere(tokens).shape)
    return HeadTokens(ones, ones, ones, np.ones((*ones.shape, len(SELECTIONS)), dtype=bool))


def test_nothing_kept_grows_with_tokens_times_neurons(family):
    model, _ = family("gpt2")
    tokens = random_tokens()
    heads = {(1, h): on_all_tokens(tokens) for h in range(N_HEADS)}
    kept = repairing_neurons(model, tokens, prepared(model, tokens, "zero"), heads)
    assert set(kept) == {(1, h, mlp) for h in range(N_HEADS) for mlp in (1, 2)}
    n_tokens = tokens.numel() - len(tokens)
    for of_combination in kept.values():
        for dims, values in of_combination.values():
            assert values.shape[0] == (n_tokens if dims[0] == "row" else 2 if dims[0] == "side" else 128)
            assert values.size <= max(20 * n_tokens, 2 * 128)


def test_tokens_on_which_nothing_can_change_are_marked(family):
    """Prompts that begin alike: until they part, resampling gives each head its own output back, but for
    rounding."""
    model, _ = family("neox-sequential")
    tokens = random_tokens()
    tokens[:, :4] = tokens[0, :4]
    found = repairing_neurons(
        model, tokens, prepared(model, tokens, "resample"), {(2, 1): on_all_tokens(tokens)}
    )
    (kept,) = found.values()
    moved, position, n_for_half = (kept[name][1] for name in ("moved", "position", "n_for_half"))
    assert (moved == (position >= 4)).all()
    assert ((n_for_half > 0) == moved[:, None]).all()


SETTINGS = {"n_prompts": 8, "ablation": "resample", "dtype": "float32", "fraction": 0.5, "head": None}


def computed(model, inputs, **changes):
    """The measurement's one shard, as its store would hold it."""
    made = neurons.MEASUREMENT.compute(model, SETTINGS | changes, inputs, 0)
    return made.assign_attrs(model=model.name)


def loaded(model, inputs, **changes):
    return ModelNeurons.of(computed(model, inputs, **changes), inputs["tokens"], model.tokenizer.decode)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(model, what its neurons' measurement needs, what analysis makes of it) of a small random model."""

    @functools.cache
    def measure(name):
        model = load_family(name, tmp_path_factory.mktemp(name))
        tokens = of_prompts(Prompts(random_tokens(8).numpy(), "random"))
        inputs = {
            "tokens": tokens,
            "heads": heads.MEASUREMENT.compute(model, SETTINGS, {"tokens": tokens}, 0),
        }
        return model, inputs, loaded(model, inputs)

    return measure


@pytest.mark.slow("shards of neurons are one computation")
@pytest.mark.parametrize(("fraction", "n_prompts", "n_with_tokens"), [(0.5, 8, 4), (0.001, 32, 8)])
def test_shards_merge_to_one_computation(monkeypatch, tmp_path, fraction, n_prompts, n_with_tokens):
    """One token for each head and selection leaves most shards without tokens of some, and some without any."""
    model = load_family("llama", tmp_path)
    np.save(tmp_path / "tokens.npy", random_tokens(n_prompts).numpy())
    text = {
        "text": None,
        "dataset": None,
        "tokens": str(tmp_path / "tokens.npy"),
        "prompt_len": 12,
        "seed": 0,
    }
    wanted = SETTINGS | text | {"fraction": fraction, "n_prompts": n_prompts}
    task = Task("neurons", str(tmp_path / "llama"), wanted, tmp_path / "measured")
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "SHARD_PAIRS", 1)
        assert len(task.shards) == n_prompts // 2
        merged = open_store(task.merge([model]))
    assert len(task.shards) == 1
    whole = task.computed_again(model, 0)
    assert merged.sizes["shard"] == n_prompts // 2 and whole.sizes["shard"] == 1
    assert len(np.unique(merged["made_in_shard"])) == n_with_tokens
    assert merged.attrs | whole.attrs == merged.attrs
    for name, values in whole.data_vars.items():
        assert (merged[name].dims, merged[name].dtype) == (values.dims, values.dtype)
    found, wanted = ({**repairs_of(data), "totals": totals_of(data)} for data in (merged, whole))
    for selection, heads_wanted in wanted.items():
        assert found[selection].keys() == heads_wanted.keys()
        for head, of_mlps in heads_wanted.items():
            assert found[selection][head].keys() == of_mlps.keys()
            for mlp, repair in of_mlps.items():
                for name, values in vars(repair).items():
                    got = getattr(found[selection][head][mlp], name)
                    np.testing.assert_allclose(got, values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ("llama", "neox-parallel"))
def test_heads_are_the_strongest_with_an_mlp_after_them(measured, name):
    _, inputs, found = measured(name)
    effect = inputs["heads"]["direct_effect"].values
    strength = np.array(
        [[np.sort(head.ravel())[::-1][:44].mean() for head in layer] for layer in effect]
    )  # half of 88
    assert found.chosen == (1, strength[1].argmax())
    last = 1 if name == "neox-parallel" else 2
    assert found.strongest == [(layer, strength[layer].argmax()) for layer in range(2, last + 1)]
    assert found.later_mlps == list(later(name, 1))
    for head, of_mlps in found.repairs["direct effect"].items():
        total = sum(repair.mlp_repair for repair in of_mlps.values())
        prompt, position = (getattr(of_mlps[2], axis) for axis in ("prompt", "position"))
        wanted = inputs["heads"]["self_repair_mlps"].values[head][prompt, position]
        np.testing.assert_allclose(total, wanted, atol=1e-4 * np.abs(wanted).max())
        np.testing.assert_array_equal(of_mlps[2].mlps_repair, wanted)
        assert (of_mlps[2].direct_effect == effect[head][prompt, position]).all()
        assert effect[head][prompt, position].min() >= np.median(effect[head])


@pytest.mark.parametrize("name", ("llama", "neox-parallel"))
def test_tokens_are_selected_by_effect_and_by_what_the_mlps_repair(measured, name):
    """As in the authors' figure code: by the head's direct effect, or by the sum over all MLPs."""
    _, inputs, found = measured(name)
    swept = {key: values.values.astype(np.float64) for key, values in inputs["heads"].data_vars.items()}
    ranked = {
        "direct effect": swept["direct_effect"],
        "repair": swept["self_repair_mlps"],
        "breakage": -swept["self_repair_mlps"],
    }
    repair = swept["logit_change"] - swept["ablated_direct_effect"] + swept["direct_effect"]
    for selection, by in ranked.items():
        for head, of_mlps in found.repairs[selection].items():
            wanted = sorted(by[head].ravel())[::-1][:44]
            for of_mlp in of_mlps.values():
                at = of_mlp.prompt, of_mlp.position
                assert len(set(zip(*at, strict=True))) == 44
                np.testing.assert_allclose(sorted(by[head][at])[::-1], wanted)
                np.testing.assert_allclose(of_mlp.self_repair, repair[head][at], atol=1e-5)


def head_statistics(repair, mirror, n):
    """Of one head and MLP, from single tokens, pair by pair; without the overlaps' bootstrap."""
    alone, broken, first, either = [], [], [], []
    for t in range(n):
        alone.append(
            repair.direct_effect[t] > 0 and repair.largest[t, 0, 0] / repair.direct_effect[t] >= 0.05
        )
        broken.append(
            mirror.direct_effect[t] > 0 and mirror.largest[t, 1, 0] / mirror.direct_effect[t] >= 0.05
        )
        first.append(repair.largest_clean[t, 0, 0] < 0)
        either += [repair.largest_clean[t, 0, 0] < 0, repair.largest_clean[t, 1, 0] > 0]
    overlaps = []
    for sets in (repair.repairers, repair.strongest):
        sets = [set(of.tolist()) for of in sets]
        two = [(a, b) for a, b in itertools.combinations(range(n), 2) if repair.prompt[a] != repair.prompt[b]]
        overlaps.append(np.mean([len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in two]))
    return {
        "neurons-for-half": np.mean(repair.n_for_half[:, 0]) / 48,
        "tokens-repaired-by-one-neuron": np.mean(alone),
        "tokens-broken-by-one-neuron": np.mean(broken),
        "repairing-neurons-overlap": overlaps[0],
        "strongest-neurons-overlap": overlaps[1],
        "erasing-share": sum(repair.by_erasing[:, 0]) / sum(repair.total[:, 0]),
        "erasers-part-of-change": sum(repair.changed_by_erasing[:, 0]) / repair.total.sum(),
        "first-repairer-erases": np.mean(first),
        "first-changer-erases": np.mean(either),
        "erasers-weaken": sum(repair.by_erasing[:, 0]) / sum(repair.changed_by_erasing[:, 0]),
        "supporters-weaken": sum(mirror.by_erasing[:, 1]) / sum(mirror.changed_by_erasing[:, 1]),
    }


def test_statistics_are_means_over_the_strongest_heads(measured):
    _, _, found = measured("llama")
    found = dataclasses.replace(found, strongest=[found.chosen, (1, 0), *found.strongest])
    by = by_selection({"llama": found})
    for (selected, statistics), names in zip(
        by.items(), (("direct effect", "direct effect"), ("repair", "breakage")), strict=True
    ):
        statistics = statistics["llama"]
        assert all(of.drawn.shape == (1001,) and np.isfinite(of.drawn).all() for of in statistics.values())
        of_heads = [
            head_statistics(*(found.repairs[name][head][2] for name in names), 44) for head in found.strongest
        ]
        wanted = {name: np.mean([of[name] for of in of_heads]) for name in of_heads[0]}
        assert statistics.keys() == wanted.keys() | {"neurons-for-half-gaussian"}, selected
        for name, value in wanted.items():
            assert statistics[name].value == pytest.approx(value), name


def slow_statistics(clean, change, effect, mirrored, prompt):
    """From all neurons of every token [token, neuron], and of the tokens of the mirror image."""
    tokens, d_mlp = range(len(clean)), clean.shape[1]
    half, alone, first, either, erasing, moved, ups = ([] for _ in range(7))
    sets = {"repairing-neurons-overlap": [], "strongest-neurons-overlap": []}
    for t in tokens:
        order = sorted(range(d_mlp), key=lambda n: -change[t, n])
        up = [change[t, n] for n in order if change[t, n] > 0]
        half.append(next(k for k in range(1, d_mlp) if sum(up[:k]) >= sum(up) / 2) / d_mlp)
        alone.append(effect[t] > 0 and up[0] >= 0.05 * effect[t])
        first.append(clean[t, order[0]] < 0)
        either += [clean[t, order[0]] < 0, clean[t, order[-1]] < 0]
        erasing.append(sum(change[t, n] for n in order if change[t, n] > 0 > clean[t, n]))
        moved.append(sum(abs(change[t, n]) for n in order if clean[t, n] < 0))
        ups.append(sum(up))
        sets["repairing-neurons-overlap"].append(set(order[:20]))
        strongest = sorted(range(d_mlp), key=lambda n: -abs(clean[t, n]))
        sets["strongest-neurons-overlap"].append(set(strongest[:20]))
    two = [(a, b) for a, b in itertools.combinations(tokens, 2) if prompt[a] != prompt[b]]
    overlaps = {
        name: np.mean([len(of[a] & of[b]) / len(of[a] | of[b]) for a, b in two]) for name, of in sets.items()
    }
    other_clean, other_change, other_effect = mirrored
    down = np.minimum(other_change, 0)
    return overlaps | {
        "neurons-for-half": np.mean(half),
        "tokens-repaired-by-one-neuron": np.mean(alone),
        "tokens-broken-by-one-neuron": np.mean((other_effect > 0) & (down.min(1) <= -0.05 * other_effect)),
        "erasing-share": sum(erasing) / sum(ups),
        "erasers-part-of-change": sum(moved) / np.abs(change).sum(),
        "first-repairer-erases": np.mean(first),
        "first-changer-erases": np.mean(either),
        "erasers-weaken": sum(erasing) / sum(moved),
        "supporters-weaken": down[other_clean > 0].sum() / -np.abs(other_change[other_clean > 0]).sum(),
    }


def test_statistics_equal_full_passes_in_float64(family):
    """From the selection of heads and tokens on: nothing of the library but what is compared."""
    model, hf = family("gpt2", torch.float64)
    prompts = of_prompts(Prompts(random_tokens(8).numpy(), "random"))
    swept = heads.MEASUREMENT.compute(model, SETTINGS, {"tokens": prompts}, 0)
    found = loaded(model, {"tokens": prompts, "heads": swept}, fraction=0.25)
    tokens = random_tokens(8)
    slow = {head: reference.ablate(hf, tokens, 2, head, "resample") for head in range(N_HEADS)}
    strongest = max(slow, key=lambda head: slow[head]["direct_effect"].flatten().sort().values[-22:].sum())
    assert found.strongest == [(2, strongest)]
    clean, before = slow_run(hf, tokens)
    width = clean["z"][2].shape[-1] // N_HEADS
    part = slice(strongest * width, (strongest + 1) * width)
    new = reference.replaced("resample", clean["z"][2][..., part], None)
    _, after = slow_run(hf, tokens, (2, strongest, new))
    sigma = reference.sigma(hf, clean["residual"][N_LAYERS])
    effects, ablated = (
        slow_effects(hf, tokens, of, 2, sigma).detach().flatten(0, 1).numpy() for of in (before, after)
    )
    change = ablated - effects
    effect, mlps = (slow[strongest][name].flatten().numpy() for name in ("direct_effect", "self_repair_mlps"))
    prompt = np.repeat(np.arange(8), 11)
    tokens_of = {
        name: np.argsort(-by)[:22] for name, by in (("effect", effect), ("up", mlps), ("down", -mlps))
    }
    for selected, here, there in (
        ("largest direct effect", "effect", "effect"),
        ("largest MLP repair", "up", "down"),
    ):
        here, there = tokens_of[here], tokens_of[there]
        mirrored = effects[there], change[there], effect[there]
        wanted = slow_statistics(effects[here], change[here], effect[here], mirrored, prompt[here])
        got = found.statistics(selected)
        assert got.keys() == wanted.keys() | {"neurons-for-half-gaussian"}
        for name, value in wanted.items():
            assert got[name].value == pytest.approx(value, abs=1e-9), (selected, name)


def test_claims_are_about_the_tokens_that_the_paper_selects(measured):
    _, _, found = measured("llama")
    by = by_selection({"llama": found})
    made = claimed(by)["llama"]
    by_effect, by_repair = (of["llama"] for of in by.values())
    for name, estimate in made.items():
        assert estimate is (by_repair if name.startswith("first-") else by_effect)[name]
    known = load_statistics()
    own = [claim for claim in load_claims() if claim.notebook == "04"]
    assert len(own) == 6
    for claim in own:
        assert {claim.statistic, known[claim.statistic].control} < set(made)
    assert len(claims_table("04", claimed(by))) == 6
    table = statistics_table(by).set_index(["statistic", "tokens by"])["llama"]
    assert len(table) == 2 * len(made)
    for selected, statistics in by.items():
        for name, estimate in statistics["llama"].items():
            assert table[name, selected] == estimate.value


def test_a_model_without_later_heads_has_no_statistics(measured):
    _, _, found = measured("neox-parallel")
    by = by_selection({"neox": found})
    assert found.strongest == []  # three layers: the later half is the last one alone
    assert claimed(by) == {"neox": {}}
    assert all(models == {"neox": {}} for models in by.values())
    assert set(claims_table("04", claimed(by))["holds"]) == {""}
    assert statistics_table(by).empty and len(top_figures.against_controls(by).axes) == 6


def mean_jaccard(pairs):
    """Of sets of neurons of tokens in different prompts, by loops."""
    overlaps = []
    for one, other in pairs:
        for prompt, chosen in zip(one.prompt, one.neurons.tolist(), strict=True):
            for another, others in zip(other.prompt, other.neurons.tolist(), strict=True):
                if another != prompt:
                    common = len(set(chosen) & set(others))
                    overlaps.append(common / len(set(chosen) | set(others)))
    return sum(overlaps) / len(overlaps)


def test_tables(measured):
    model, inputs, found = measured("llama")
    layer, head = found.chosen
    alone = found.single_neurons()
    assert alone[["heads", "MLP", "change"]].values.tolist() == [
        [s, m, c] for m in (1, 2) for s in (f"L1H{head}", "all heads of L1") for c in ("repairs", "breaks")
    ]
    once = np.ones((1, 8))
    repair, everyone = found.scopes().values()
    assert alone.iloc[4]["≥ 0.1"] == repair.repaired_alone(once).value[1, 0]
    assert alone.iloc[5]["≥ 0.1"] == repair.repaired_alone(once, 1).value[1, 0]
    assert len(everyone.prompt) == N_HEADS * 44 and set(everyone.head) == set(range(N_HEADS))
    overlaps = found.overlaps()
    assert overlaps[["MLP", "tokens of"]].values.tolist() == [
        [mlp, of] for mlp in (1, 2) for of in (f"L1H{head}", "one head of L1", "two heads of L1")
    ]
    assert overlaps["chance"].unique().tolist() == [chance_overlap(48, 20)]
    for kind, column in (("repairers", "overlap"), ("strongest", "strongest")):
        heads = [found.repairs["direct effect"][1, h][2].sets(kind) for h in range(N_HEADS)]
        own, one = mean_jaccard([(heads[head], heads[head])]), mean_jaccard([(of, of) for of in heads])
        two = mean_jaccard(list(zip(heads, [*heads[1:], heads[0]], strict=True)))
        assert overlaps[column].tolist()[3:] == pytest.approx([own, one, two]) and own != one != two
        low, high = (overlaps[f"{column} {end}"] for end in ("low", "high"))
        assert ((low <= overlaps[column]) & (overlaps[column] <= high)).all()

    parts = found.mlp_parts()
    assert parts["of"].tolist() == ["all later MLPs", "last MLP"] * 2
    for row, of, part in ((0, repair, repair.mlps_repair), (3, everyone, everyone.mlp_repair)):
        assert parts.iloc[row]["part"] == pytest.approx(part.mean())
        assert parts.iloc[row]["repaired"] == (of.self_repair > 0).mean()
        repaired = [
            (p, all_of_it) for p, all_of_it in zip(part, of.self_repair, strict=True) if all_of_it > 0
        ]
        between = [0 < p < all_of_it for p, all_of_it in repaired]
        assert parts.iloc[row]["between"] == np.mean(between) and 0 < np.mean(between) < 1

    halves = found.halves(few=0.2)
    assert halves["change"].tolist() == ["repairs", "breaks"] and list(halves)[2:] == ["median", "below 0.2"]
    for side, row in enumerate(halves.itertuples(index=False)):
        half = [count / 48 for count in everyone.n_for_half[:, side].tolist() if count > 0]
        assert row[2] == np.median(half) and row[3] == np.mean([share < 0.2 for share in half])

    first = found.first_neurons()
    assert first["change"].tolist() == ["repairs", "breaks"] * 2
    (_, broken) = found.scopes("breakage").values()
    supports = [broken.largest_clean[t, 1, 0] < 0 for t in range(N_HEADS * 44)]
    assert first.iloc[3]["erases"] == pytest.approx(np.mean(supports))
    part = [
        sum(few[1]) / -mlps for few, mlps in zip(broken.largest, broken.mlps_repair, strict=True) if mlps < 0
    ]
    assert first.iloc[3]["few of MLPs"] == pytest.approx(np.median(part))
    for row, selection, side in ((0, "direct effect", 0), (1, "direct effect", 1), (3, "breakage", 1)):
        (_, of) = found.scopes(selection).values()
        shares = [
            sum(max(change, 0) for change in few) / total
            for few, total in zip(of.largest[:, side].tolist(), of.total[:, side].tolist(), strict=True)
            if total > 0
        ]
        assert first.iloc[row]["few of total"] == pytest.approx(np.median(shares))
    summed = found.total_scopes()["all heads of L1"]
    for name in ("change_by_neuron", "clean_by_neuron", "share_by_rank"):
        wanted = sum(getattr(found.totals[1, number][2], name) for number in range(N_HEADS))
        np.testing.assert_allclose(getattr(summed, name), wanted)

    often = found.frequencies()
    counts = [sum(n in of[:10] for of in repair.repairers.tolist()) for n in range(48)]
    assert often["neurons"].tolist() == ["repairers", "strongest", "random"] * 2
    assert often.iloc[0]["first"] == max(counts) / 44
    chosen_by_chance = np.random.default_rng(1).random((2000, 44, 48)).argsort(-1)[..., :10].reshape(2000, -1)
    largest = [np.bincount(neurons, minlength=48).max() / 44 for neurons in chosen_by_chance]
    assert often.iloc[2]["first"] == pytest.approx(np.mean(largest), abs=0.02)
    assert often.iloc[0]["ten"] == pytest.approx(sum(sorted(counts)[-10:]) / 440)
    assert often.iloc[0]["ever"] == np.mean([count > 0 for count in counts])

    mask = np.zeros((8, 11), dtype=bool)
    mask[repair.prompt, repair.position] = True
    tokens = torch.from_numpy(inputs["tokens"]["token"].values)
    effects = dense(effects_of(model, tokens, "resample", {(layer, head): mask}), mask.shape)
    clean, change = (
        torch.stack([effects[(layer, head), mlp][i][mask].mean(0) for mlp in (1, 2)]) for i in (0, 1)
    )
    top = found.top_neurons(n=3, n_tokens=100)
    for kind, values in (("top erasers", clean), ("top repairers", -change)):
        wanted = [divmod(int(i), 48) for i in values.flatten().argsort()[:3]]
        rows = top[top["among"] == kind]
        assert [(mlp - 1, neuron) for mlp, neuron in zip(rows["MLP"], rows["neuron"], strict=True)] == wanted
        np.testing.assert_allclose(rows["clean direct effect"], [clean[at] for at in wanted], rtol=1e-4)
        np.testing.assert_allclose(rows["change"], [change[at] for at in wanted], rtol=1e-3, atol=1e-5)
    first = top.iloc[0]
    here = effects[(layer, head), int(first["MLP"])][0]
    erased = [(p, k) for p, k in np.argwhere(mask) if here[p, k].argsort()[:20].eq(first["neuron"]).any()]
    decoded = [model.tokenizer.decode([tokens[p, k + 1]]) for p, k in erased]
    assert first["erases"] == f"{len(erased)} of 44"
    listed = [int(count) for count in re.findall(r" ×(\d+)", first["tokens erased most often"])]
    assert listed == sorted(pd.Series(decoded).value_counts(), reverse=True)
    assert first["tokens erased most often"].startswith(tuple(repr(text) for text in decoded))

    both = over_models([found, found], ModelNeurons.single_neurons)
    assert len(both) == 2 * len(alone) and both.index.is_unique


def test_passages_have_the_repair_of_every_token_around_the_strongest(measured):
    """A token's value is that of the position before it, where it is predicted."""
    model, inputs, found = measured("llama")
    repair, _ = found.scopes().values()
    tokens = inputs["tokens"]["token"].values
    mlps = inputs["heads"]["self_repair_mlps"].values[found.chosen]
    shown = passages(found, inputs["heads"], n=3)
    best = sorted((-repair.direct_effect[repair.prompt == p].max(), p) for p in range(8))[:3]
    for passage, (effect, prompt) in zip(shown, best, strict=True):
        assert f"direct effect {signed(-effect)}" in passage.heading
        assert passage.tokens == [model.tokenizer.decode([token]) for token in tokens[prompt]]
        np.testing.assert_allclose(passage.values[1:], mlps[prompt])
        assert np.isnan(passage.values[0])
        row = np.flatnonzero((repair.prompt == prompt) & (repair.position == passage.marked - 1))
        assert repair.direct_effect[row] == pytest.approx(-effect)
        changes = [f"{repair.repairers[row[0], i]} ({signed(repair.largest[row[0], 0, i])})" for i in (0, 1)]
        assert passage.heading.endswith(
            f"all MLPs {signed(passage.values[passage.marked])}, "
            f"last MLP {signed(repair.mlp_repair[row[0]])}, neurons {', '.join(changes)}"
        )


def test_neurons_in_context_by_hand():
    clean, change = np.random.default_rng(0).normal(size=(2, 99, 5))
    clean[70], change[70] = (0.1, -0.3, -0.2, 0, 0), (0.1, 0.0, 0.2, -0.5, 0)
    clean[69], change[71, 2] = 7, 8
    text = [str(i) for i in range(100)]
    shown = neurons_in_context(text, 70, clean, change)
    assert [one.heading for one in shown] == [
        f"neuron {neuron}, which {verb} most at '71': {name}"
        for verb, neuron in (("erases", 1), ("repairs", 2))
        for name in ("clean direct effect", "change")
    ]
    for one, (neuron, of) in zip(shown, ((1, clean), (1, change), (2, clean), (2, change)), strict=True):
        assert one.tokens == text[71 - BEFORE : 72 + AFTER] and one.tokens[one.marked] == "71"
        np.testing.assert_array_equal(one.values, of[70 - BEFORE : 71 + AFTER, neuron])


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ([2, 0], "no MLP comes after"),
        ([0, 4], "give"),
        ([-1, 0], "give"),
        ([-1, -1], "give"),
        ([7, 0], "from 0 to 1"),
        ([1], "layer, head"),
    ],
)
def test_bad_heads_are_refused(measured, head, said):
    model, inputs, _ = measured("neox-parallel")
    with pytest.raises(UserError, match=said):
        computed(model, inputs, head=head)


def test_a_model_without_a_later_mlp_is_not_measurable(measured):
    """One parallel block; a sequential one's MLP comes after its heads."""
    model, inputs, _ = measured("neox-parallel")
    one = dataclasses.replace(model, blocks=model.blocks[:1])
    with pytest.raises(NotMeasurable, match="no MLP comes after any of its heads"):
        neurons.HeadChoice.of(one, inputs["heads"], 0.1, None)
    sequential, inputs, _ = measured("llama")
    first = dataclasses.replace(sequential, blocks=sequential.blocks[:1])
    assert neurons.HeadChoice.of(first, inputs["heads"], 0.1, None).chosen[0] == 0


def test_a_chosen_head_is_taken(measured):
    model, inputs, _ = measured("llama")
    found = loaded(model, inputs, fraction=0.1, head=[2, 1])
    assert (
        found.chosen == (2, 1)
        and found.later_mlps == [2]
        and list(found.scopes()) == ["L2H1", "all heads of L2"]
    )


def shown_lines(axis, style="-"):
    return [line for line in axis.lines if line.get_linestyle() == style]


def test_figures_show_the_numbers(measured):
    models = [measured(name)[2] for name in ("llama", "neox-parallel")]
    scopes = [repair for model in models for repair in model.scopes().values()]
    once = np.ones((1, 8))
    figure = figures.single_neurons(models)
    for axis, repair in zip(np.array(figure.axes).reshape(2, 2).T.flat, scopes, strict=True):
        for style, side in (("-", 0), ("--", 1)):
            lines = np.stack([line.get_ydata() for line in shown_lines(axis, style)])
            np.testing.assert_array_equal(lines, repair.repaired_alone(once, side).value)
    figure = figures.cumulative_change(models)
    ends = [line.get_ydata()[-1] for line in figure.axes[0].lines]
    assert sum(ends) == pytest.approx(1)  # all repairing and all breaking neurons make up the whole change
    totals = next(iter(models[0].total_scopes().values()))
    for side, sign in ((0, 1), (1, -1)):
        colours = figure.axes[0].collections[side].get_array()
        assert colours[0] == pytest.approx(
            sign * totals.clean_by_rank[side, 0] / totals.tokens_by_rank[side, 0]
        )
        assert totals.first_clean(side) == pytest.approx(colours[0])
    figure = figures.neurons_for_half(models)
    for line, side in zip(figure.axes[0].lines[:2], (0, 1), strict=True):
        assert line.get_xdata().max() == pytest.approx(100 * scopes[0].n_for_half[:, side].max() / 48)
    table = pd.concat([model.overlaps() for model in models])
    shown = {round(float(x), 9) for line in figures.overlaps(table).axes[0].lines for x in line.get_xdata()}
    kinds = [f"{kind}{end}" for kind in ("overlap", "strongest") for end in ("", " low", " high")]
    assert shown == {round(float(x), 9) for x in table[[*kinds, "chance"]].values.flat}


def test_figures_after_the_authors_code_show_the_numbers(measured):
    models = [measured(name)[2] for name in ("llama", "neox-parallel")]
    axis = top_figures.parts_of_self_repair(models).axes[0]
    means = [line.get_xdata()[0] for line in axis.lines]
    row = models[0].mlp_parts().iloc[2]
    np.testing.assert_allclose(means, [100 * row["clipped"], 100 * row["floor"]])
    bars = [bar.get_height() for bar in axis.patches[:20]]
    assert sum(bars) == pytest.approx(1) and bars[0] > 0

    few = top_figures.few_neurons(models).axes
    heights = [bar.get_height() for bar in few[0].patches if isinstance(bar, Rectangle)]
    (_, repair) = models[0].scopes("repair").values()
    share = np.minimum(repair.largest[:, 0].sum(1) / repair.mlps_repair, 3)[repair.mlps_repair > 0]
    np.testing.assert_allclose(heights, np.histogram(share, 30, (0, 3))[0] / len(share))

    first = top_figures.first_neuron(models).axes
    for axis, selection, side in ((first[0], "direct effect", 0), (first[4], "breakage", 1)):
        repair = next(iter(models[0].scopes(selection).values()))
        clean = repair.largest_clean[:, side, 0]
        points = np.stack([clean, repair.largest[:, side, 0]], 1)
        np.testing.assert_allclose(axis.collections[0].get_offsets(), points)
        (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
        assert ((left < points[:, 0]) & (points[:, 0] < right)).all()
        assert ((low < points[:, 1]) & (points[:, 1] < high)).all()
        assert f"{100 * (clean < 0).mean():.0f}%" in axis.texts[0].get_text()

    axis = top_figures.frequencies(models).axes[0]
    repair = next(iter(models[0].scopes().values()))
    counts = sorted((sum(n in of[:10] for of in repair.repairers.tolist()) for n in range(48)), reverse=True)
    np.testing.assert_allclose(axis.lines[0].get_ydata(), 100 * np.array(counts) / 44)

    found = by_selection({"llama": models[0], "neox": models[1]})
    known = load_statistics()
    axes = top_figures.against_controls(found).axes
    claims = [claim for claim in load_claims() if claim.notebook == "04"]
    for axis, claim in zip(axes, claims, strict=False):
        names = [claim.statistic, known[claim.statistic].control]
        points = [line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 1]
        assert points == [of["llama"][name].value for of in found.values() for name in names]
        assert axis.get_title().startswith(f"{IN_WORDS[claim.statistic]}:\n")
        assert [label.get_text() for label in axes[0].get_yticklabels()] == ["llama"]
    assert {*found["largest MLP repair"]["llama"]} == {*IN_WORDS}
    assert len(set(IN_WORDS.values())) == len(IN_WORDS)
