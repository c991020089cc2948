"""Neurons against full hooked forward passes of plain Hugging Face models, and summaries against loops over
tokens."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrepair.analysis import neuron_repair
from selfrepair.analysis.claims import load_claims
from selfrepair.analysis.neuron_repair import (
    NeuronRepair,
    chance_overlap,
    mean_overlap,
    pair_overlaps,
    repairs_by_head,
)
from selfrepair.analysis.neurons import ModelNeurons
from selfrepair.engine.ablations import ABLATIONS, find_ablation
from selfrepair.engine.head_ablation import ablate_heads
from selfrepair.engine.sites import HEADS
from selfrepair.errors import NotMeasurable, UserError
from selfrepair.measure import heads, neuron_effects, neurons, pairs
from selfrepair.measure.neuron_effects import Combination, NeuronEffects
from selfrepair.measure.neurons import HeadTokens, repairing_neurons, summarize
from selfrepair.measure.task import Task
from selfrepair.measure.tokens import of_prompts
from selfrepair.plots import neurons as figures
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
    W = reference._out_matrix(reference.mlp_projections(hf)[mlp])
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


@pytest.mark.parametrize("kind", ABLATIONS)
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
@pytest.mark.parametrize("kind", ABLATIONS)
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
    monkeypatch.setattr(neuron_effects, "rows_that_fit", lambda *_: 2)
    chunks = list(effects_of(model, tokens, "resample", masks))
    assert max(len(chunk.clean) for chunk in chunks) == 4
    for at, pair in dense(chunks, everywhere(tokens).shape).items():
        for a, b in zip(pair, whole[at], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def on_all_tokens(tokens):
    return HeadTokens(np.ones(everywhere(tokens).shape), everywhere(tokens))


def test_nothing_kept_grows_with_tokens_times_neurons(family):
    model, _ = family("gpt2")
    tokens = random_tokens()
    heads = {(1, h): on_all_tokens(tokens) for h in range(N_HEADS)}
    kept = repairing_neurons(model, tokens, prepared(model, tokens, "zero"), heads)
    assert set(kept) == {(1, h, mlp) for h in range(N_HEADS) for mlp in (1, 2)}
    n_tokens = tokens.numel() - len(tokens)
    for of_combination in kept.values():
        assert of_combination.sizes["row"] == n_tokens and of_combination.sizes["neuron"] == 128
        assert all(array.size <= max(20 * n_tokens, 2 * 128) for array in of_combination.data_vars.values())


def repair_of(clean, change, direct_effect, prompt=None, head=0):
    """Of one chunk of tokens in MLP 2 after a head of layer 1."""
    n = len(clean)
    prompt = torch.arange(n) if prompt is None else torch.as_tensor(prompt)
    of = Combination(1, head, 2)
    effects = NeuronEffects(
        of, prompt, torch.arange(n), torch.as_tensor(clean).double(), torch.as_tensor(change).double()
    )
    kept = neurons._assembled({of: summarize(effects, torch.as_tensor(direct_effect).double())})
    return repairs_by_head(kept)[1, head][2]


def test_by_hand():
    repair = repair_of(
        [[2.0, 1, -1, -1, 1], [1, 1, 1, 1, -1]], [[-5.0, 3, 4, 2, 1], [0, 0, 0, 0, 0]], [10.0, 10]
    )
    assert repair.moved.tolist() == [True, False]
    assert repair.largest[0].tolist() == [4, 3, 2, 1, -5] and repair.repairers[0].tolist() == [2, 1, 3, 4, 0]
    assert repair.n_for_half[0] == 2 and np.isnan(repair.n_for_half[1])  # 4 + 3 of 10
    assert repair.repair.tolist() == [10, 0] and repair.repair_by_erasing.tolist() == [6, 0]
    assert repair.harm.tolist() == [-5, 0] and repair.harm_by_supporting.tolist() == [-5, 0]
    np.testing.assert_allclose(repair.share_by_rank, np.array([[4, 7, 9, 10, 10], [5, 5, 5, 5, 5]]) / 15)
    assert repair.clean_by_rank.tolist() == [[-1, 1, -1, 1, 0], [2, 0, 0, 0, 0]]
    assert repair.tokens_by_rank.tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert repair.clean_by_neuron.tolist() == [3, 2, 0, 0, 0] and repair.change_by_neuron.tolist() == [
        -5,
        3,
        4,
        2,
        1,
    ]
    alone = repair.repaired_alone(np.ones((1, 2))).value
    assert alone[0].tolist() == [0, 0, 0, 0, 0]  # half of the direct effect would be 5
    assert alone[1].tolist() == [0.5, 0.5, 0.5, 0.5, 0]  # at least a tenth, on one of two tokens
    assert (
        repair_of([[1.0, 1]], [[1.0, -2]], [-1.0]).repaired_alone(np.ones((1, 1))).value.max() == 0
    )  # nothing to repair
    assert repair_of([[-1.0, -2]], [[0.5, 0.5]], [1.0]).n_for_half[0] == 1  # half is reached exactly


@settings(max_examples=40, deadline=None)
@given(n_tokens=st.integers(1, 8), n_neurons=st.integers(1, 40), seed=st.integers(0, 999))
def test_summaries_equal_loops(n_tokens, n_neurons, seed):
    rng = np.random.default_rng(seed)
    clean, change = rng.normal(size=(2, n_tokens, n_neurons))
    effect = rng.normal(1, 1, n_tokens)
    halves = [
        repair_of(clean[i::2], change[i::2], effect[i::2], np.arange(n_tokens)[i::2])
        for i in range(2)
        if len(clean[i::2])
    ]
    repair = NeuronRepair.joined(halves)
    assert repair.prompt.tolist() == list(range(n_tokens))
    curve = np.zeros((2, n_neurons))
    for t in range(n_tokens):
        ranked = sorted(range(n_neurons), key=lambda n: -change[t, n])
        assert repair.repairers[t].tolist() == ranked[:20]
        assert repair.erasers[t].tolist() == sorted(range(n_neurons), key=lambda n: clean[t, n])[:20]
        np.testing.assert_allclose(repair.largest[t], [change[t, n] for n in ranked[:10]])
        ups = [change[t, n] for n in ranked if change[t, n] > 0]
        wanted = next((k for k in range(1, len(ups) + 1) if sum(ups[:k]) >= sum(ups) / 2 - 1e-12), np.nan)
        np.testing.assert_equal(repair.n_for_half[t], wanted)
        assert repair.repair_by_erasing[t] == pytest.approx(
            sum(change[t, n] for n in ranked if change[t, n] > 0 > clean[t, n])
        )
        assert repair.harm_by_supporting[t] == pytest.approx(
            sum(change[t, n] for n in ranked if change[t, n] < 0 < clean[t, n])
        )
        for k in range(n_neurons):
            curve[0, k] += sum(max(0, change[t, n]) for n in ranked[: k + 1]) / np.abs(change[t]).sum()
            curve[1, k] += sum(max(0, -change[t, n]) for n in ranked[::-1][: k + 1]) / np.abs(change[t]).sum()
    np.testing.assert_allclose(repair.share_by_rank, curve)
    np.testing.assert_allclose(repair.change_by_neuron, change.sum(0))
    alone = repair.repaired_alone(np.ones((1, n_tokens))).value
    for (i, threshold), n in itertools.product(
        enumerate((0.5, 0.1, 0.05, 0.025, 0.01)), range(min(10, n_neurons))
    ):
        hits = [effect[t] > 0 and sorted(change[t])[-1 - n] / effect[t] >= threshold for t in range(n_tokens)]
        assert alone[i, n] == pytest.approx(np.mean(hits))


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
    assert (kept["moved"] == (kept["position"] >= 4)).all()
    assert (np.isfinite(kept["n_for_half"]) == kept["moved"]).all()


@pytest.mark.parametrize(("n", "size"), [(5, 2), (6, 3), (7, 3), (4, 4), (9, 1)])
def test_chance_overlap_is_that_of_all_pairs_of_sets(n, size):
    sets = [set(chosen) for chosen in itertools.combinations(range(n), size)]
    wanted = np.mean([len(a & b) / len(a | b) for a in sets for b in sets])
    assert chance_overlap(n, size) == pytest.approx(wanted, abs=1e-12)


def test_random_sets_overlap_by_chance():
    rng = np.random.default_rng(0)
    change = rng.normal(size=(300, 60))
    repair = repair_of(-change, change, np.ones(300))
    assert mean_overlap(pair_overlaps(repair, repair, 300), np.ones((1, 300))).value == pytest.approx(
        chance_overlap(60, 20), abs=0.002
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), at_once=st.sampled_from((1, 700, 10**6)))
def test_overlaps_equal_loops_over_pairs(seed, at_once):
    rng = np.random.default_rng(seed)
    parts = []
    for head in range(2):
        prompt = rng.integers(0, 4, 7)
        change = rng.normal(size=(7, 30))
        change[rng.integers(7)] = 0  # not moved: in no pair
        parts.append(repair_of(-change, change, np.ones(7), prompt, head))
    weights = np.concatenate([np.ones((1, 4)), rng.integers(0, 3, (3, 4))])
    original, neuron_repair.COMPARED_AT_ONCE = neuron_repair.COMPARED_AT_ONCE, at_once
    try:
        found = [mean_overlap(pair_overlaps(parts[0], other, 4), weights).drawn for other in parts]
    finally:
        neuron_repair.COMPARED_AT_ONCE = original
    for got, other in zip(found, parts, strict=True):
        for sample, counts in enumerate(weights):
            drawn = [p for p in range(4) for _ in range(int(counts[p]))]  # whole prompts, as often as drawn
            tokens = [
                [t for p in drawn for t in np.flatnonzero((r.prompt == p) & r.moved)]
                for r in (parts[0], other)
            ]
            wanted = []
            for a, b in itertools.product(*tokens):
                if parts[0].prompt[a] != other.prompt[b]:
                    one, two = set(parts[0].repairers[a].tolist()), set(other.repairers[b].tolist())
                    wanted.append(len(one & two) / len(one | two))
            np.testing.assert_allclose(got[sample], np.mean(wanted) if wanted else np.nan)


def test_ratios_draw_whole_prompts():
    rng = np.random.default_rng(3)
    prompt = np.array([0, 0, 1, 3, 3, 3])
    repair = repair_of(rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), np.ones(6), prompt)
    top, bottom = rng.random((2, 6))
    weights = np.array([[1.0, 1, 1, 1], [2, 0, 1, 1], [0, 0, 4, 0]])
    wanted = []
    for counts in weights:
        drawn = [t for p in range(4) for _ in range(int(counts[p])) for t in np.flatnonzero(prompt == p)]
        wanted.append(top[drawn].sum() / bottom[drawn].sum() if drawn else np.nan)
    np.testing.assert_allclose(repair.token_ratio(top, bottom, weights).drawn, wanted)
    twice = repair.token_ratio(np.stack([top, 2 * top]), bottom, weights)
    np.testing.assert_allclose(twice[1].drawn, 2 * np.array(wanted))


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


@pytest.mark.parametrize("fraction", (0.5, 0.01))
def test_shards_merge_to_one_computation(monkeypatch, tmp_path, fraction):
    """One token for each head leaves most shards without tokens of some heads, and one without any."""
    model = load_family("llama", tmp_path)
    np.save(tmp_path / "tokens.npy", random_tokens(8).numpy())
    text = {
        "text": None,
        "dataset": None,
        "tokens": str(tmp_path / "tokens.npy"),
        "prompt_len": 12,
        "seed": 0,
    }
    task = Task(
        "neurons", str(tmp_path / "llama"), SETTINGS | text | {"fraction": fraction}, tmp_path / "measured"
    )
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "SHARD_PAIRS", 1)
        assert len(task.shards) == 4
        merged = open_store(task.merge([model]))
    assert len(task.shards) == 1
    whole = task.computed_again(model, 0)
    assert merged.sizes["shard"] == 4 and whole.sizes["shard"] == 1
    assert len(np.unique(merged["made_in_shard"])) == (4 if fraction == 0.5 else 3)
    assert merged.attrs | whole.attrs == merged.attrs
    for name, values in whole.data_vars.items():
        assert (merged[name].dims, merged[name].dtype) == (values.dims, values.dtype)
    found, wanted = (repairs_by_head(data) for data in (merged, whole))
    assert found.keys() == wanted.keys()
    for head, of_mlps in wanted.items():
        assert found[head].keys() == of_mlps.keys()
        for mlp, repair in of_mlps.items():
            for name, values in vars(repair).items():
                np.testing.assert_allclose(getattr(found[head][mlp], name), values, rtol=1e-4, atol=1e-5)


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
    for head, of_mlps in found.by_head.items():
        total = sum(repair.repair + repair.harm for repair in of_mlps.values())
        prompt, position = (getattr(of_mlps[2], axis) for axis in ("prompt", "position"))
        wanted = inputs["heads"]["self_repair_mlps"].values[head][prompt, position]
        np.testing.assert_allclose(total, wanted, atol=1e-4 * np.abs(wanted).max())
        assert (of_mlps[2].direct_effect == effect[head][prompt, position]).all()
        assert effect[head][prompt, position].min() >= np.median(effect[head])


def test_statistics_are_means_over_the_strongest_heads(measured):
    _, _, found = measured("llama")
    found = dataclasses.replace(found, strongest=[found.chosen, (1, 0), *found.strongest])
    statistics = found.statistics()
    names = {claim.statistic for claim in load_claims() if claim.notebook == "04"}
    assert len(names) == 4 and names < set(statistics)
    assert all(of.drawn.shape == (1001,) and np.isfinite(of.drawn).all() for of in statistics.values())
    heads = [found.by_head[head][2] for head in found.strongest]
    assert list(statistics) == [
        "neurons-for-half",
        "tokens-repaired-by-one-neuron",
        "repairing-neurons-overlap",
        "erasing-share",
        "supporting-share",
    ]
    half, single, overlap, erasing, supporting = (of.value for of in statistics.values())
    assert half == pytest.approx(np.mean([h.n_for_half.mean() / 48 for h in heads]))
    assert single == pytest.approx(
        np.mean([(h.largest.max(1) / h.direct_effect >= 0.05)[h.direct_effect > 0].sum() / 44 for h in heads])
    )
    assert erasing == pytest.approx(np.mean([h.repair_by_erasing.sum() / h.repair.sum() for h in heads]))
    assert supporting == pytest.approx(np.mean([h.harm_by_supporting.sum() / h.harm.sum() for h in heads]))
    by_head = []
    for h in heads:
        sets = [set(s.tolist()) for s in h.repairers]
        pairs = [(a, b) for a, b in itertools.combinations(range(44), 2) if h.prompt[a] != h.prompt[b]]
        by_head.append(np.mean([len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs]))
    assert overlap == pytest.approx(np.mean(by_head))


def test_a_model_without_later_heads_has_no_statistics(measured):
    _, _, found = measured("neox-parallel")
    assert (
        found.strongest == [] and found.statistics() == {}
    )  # three layers: the later half is the last one alone


def test_tables(measured):
    model, inputs, found = measured("llama")
    layer, head = found.chosen
    alone = found.single_neurons()
    assert alone[["heads", "MLP"]].values.tolist() == [
        [s, m] for m in (1, 2) for s in (f"L1H{head}", "all heads of L1")
    ]
    assert alone.iloc[2]["≥ 0.1"] == found.scopes()[f"L1H{head}"].repaired_alone(np.ones((1, 8))).value[1, 0]
    everyone = found.scopes(1)["all heads of L1"]
    assert len(everyone.prompt) == N_HEADS * 44 and set(everyone.head) == set(range(N_HEADS))
    overlaps = found.overlaps()
    assert overlaps["chance"].unique().tolist() == [chance_overlap(48, 20)]
    heads = [found.by_head[1, h][2] for h in range(N_HEADS)]
    pairs = sum(pair_overlaps(a, b, 8) for a, b in zip(heads, [*heads[1:], heads[0]], strict=True))
    assert overlaps.iloc[5]["overlap"] == pytest.approx(mean_overlap(pairs, np.ones((1, 8))).value)
    assert ((overlaps["low"] <= overlaps["overlap"]) & (overlaps["overlap"] <= overlaps["high"])).all()

    mask = np.zeros((8, 11), dtype=bool)
    mask[found.by_head[layer, head][1].prompt, found.by_head[layer, head][1].position] = True
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

    examples = found.examples(n=3)
    best = sorted(
        -found.by_head[layer, head][2].direct_effect[found.by_head[layer, head][2].prompt == p].max()
        for p in range(8)
    )[:3]
    np.testing.assert_allclose(examples["direct effect"], np.negative(best))


@pytest.mark.parametrize(
    ("head", "said"),
    [([2, 0], "no MLP comes after"), ([0, 4], "give"), ([7, 0], "from 0 to 1"), ([1], "layer, head")],
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
        neurons.HeadChoice.of(one, inputs["heads"]["direct_effect"], 0.1, None)
    sequential, inputs, _ = measured("llama")
    first = dataclasses.replace(sequential, blocks=sequential.blocks[:1])
    assert neurons.HeadChoice.of(first, inputs["heads"]["direct_effect"], 0.1, None).chosen[0] == 0


def test_a_chosen_head_is_taken(measured):
    model, inputs, _ = measured("llama")
    found = loaded(model, inputs, fraction=0.1, head=[2, 1])
    assert (
        found.chosen == (2, 1)
        and found.later_mlps == [2]
        and list(found.scopes()) == ["L2H1", "all heads of L2"]
    )


def test_figures_show_the_numbers(measured):
    models = [measured(name)[2] for name in ("llama", "neox-parallel")]
    figure = figures.single_neurons(models)
    for axis, repair in zip(
        np.array(figure.axes).reshape(2, 2).T.flat,
        [r for m in models for r in m.scopes().values()],
        strict=True,
    ):
        lines = np.stack([line.get_ydata() for line in axis.lines])
        np.testing.assert_array_equal(lines, repair.repaired_alone(np.ones((1, 8))).value)
    figure = figures.cumulative_change(models)
    ends = [line.get_ydata()[-1] for line in figure.axes[0].lines]
    assert sum(ends) == pytest.approx(1)  # all repairing and all harming neurons make up the whole change
    repair = next(iter(models[0].scopes().values()))
    colours = figure.axes[0].collections[0].get_array()
    assert colours[0] == pytest.approx(repair.clean_by_rank[0, 0] / repair.tokens_by_rank[0, 0])
    figure = figures.neurons_for_half(models)
    assert figure.axes[0].lines[0].get_xdata().max() == pytest.approx(100 * repair.n_for_half.max() / 48)
    table = pd.concat([model.overlaps() for model in models])
    shown = {round(float(x), 9) for line in figures.overlaps(table).axes[0].lines for x in line.get_xdata()}
    assert shown == {round(float(x), 9) for x in table[["overlap", "low", "high", "chance"]].values.flat}
    statistics = {"llama": models[0].statistics()}
    shown = [
        line.get_xdata()[0]
        for line in figures.erasure_shares(statistics).axes[0].lines
        if len(line.get_xdata()) == 1
    ]
    assert shown == [statistics["llama"][name].value for name in ("erasing-share", "supporting-share")]
