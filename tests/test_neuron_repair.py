"""What is kept of neurons, and the statistics made of it, against loops over tokens and neurons."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrepair.analysis import neuron_sets
from selfrepair.analysis.neuron_repair import (
    NeuronRepair,
    NeuronTotals,
    gaussian_half,
    mlp_part,
    part_of_self_repair,
    repair_statistics,
    repairs_of,
    totals_of,
)
from selfrepair.analysis.neuron_sets import NeuronSets, chance_overlap, mean_overlap, pair_overlaps
from selfrepair.measure import neurons
from selfrepair.measure.neuron_effects import Combination, NeuronEffects
from selfrepair.measure.neuron_summary import SELECTIONS, THRESHOLDS, HeadTokens, summarize

ONCE = np.ones((1, 9))


def summary_of(clean, change, direct_effect, prompt=None, head=0, repair=None, mlps=None, selected=None):
    """Of one chunk of tokens in MLP 2 after a head of layer 1."""
    n = len(clean)
    prompt = torch.arange(n) if prompt is None else torch.as_tensor(prompt)
    clean, change = torch.as_tensor(clean).double(), torch.as_tensor(change).double()
    selected = np.ones((n, len(SELECTIONS)), dtype=bool) if selected is None else selected
    effects = NeuronEffects(Combination(1, head, 2), prompt, torch.arange(n), clean, change)
    nothing = np.zeros(n)
    values = [np.asarray(nothing if of is None else of, dtype=float) for of in (direct_effect, repair, mlps)]
    kept = neurons._assembled({effects.of: summarize(effects, HeadTokens(*values, selected))})
    return kept.assign_attrs(selections=list(SELECTIONS), thresholds=list(THRESHOLDS))


def repair_of(*args, head=0, **kwargs):
    """The tokens that are selected by direct effect."""
    return repairs_of(summary_of(*args, head=head, **kwargs))["direct effect"][1, head][2]


def test_by_hand():
    summary = summary_of(
        [[2.0, 1, -1, -1, 1], [1, 1, 1, 1, -1]], [[-5.0, 3, 4, 2, 1], [0, 0, 0, 0, 0]], [10.0, 10]
    )
    repair, totals = repairs_of(summary)["direct effect"][1, 0][2], totals_of(summary)[1, 0][2]
    assert repair.moved.tolist() == [True, False]
    assert repair.largest[0].tolist() == [[4, 3, 2, 1, -5], [5, -1, -2, -3, -4]]
    assert repair.largest_clean[0].tolist() == [[-1, 1, -1, 1, 2], [-2, -1, 1, -1, 1]]
    assert repair.repairers[0].tolist() == [2, 1, 3, 4, 0]
    assert repair.strongest[0, 0] == 0 and set(repair.erasers[0, :2]) == {2, 3}
    assert repair.n_for_half.tolist() == [[2, 1], [0, 0]]  # 4 + 3 of 10
    assert repair.total.tolist() == [[10, 5], [0, 0]] and repair.mlp_repair.tolist() == [5, 0]
    assert repair.by_erasing.tolist() == [[6, 5], [0, 0]]
    assert repair.changed_by_erasing.tolist() == [[6, 9], [0, 0]]
    assert repair.mlp_direct_effect.tolist() == [2, 3]
    assert repair.n_above[0].tolist() == [[0, 4, 4, 4, 4], [1, 1, 1, 1, 1]]
    assert totals.n_moved == 1
    np.testing.assert_allclose(totals.share_by_rank, np.array([[4, 7, 9, 10, 10], [5, 5, 5, 5, 5]]) / 15)
    assert totals.clean_by_rank.tolist() == [[-1, 1, -1, 1, 0], [-2, 0, 0, 0, 0]]
    assert totals.tokens_by_rank.tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert totals.clean_by_neuron.tolist() == [3, 2, 0, 0, 0]
    assert totals.change_by_neuron.tolist() == [-5, 3, 4, 2, 1]
    alone = repair.repaired_alone(np.ones((1, 2))).value
    assert alone[0].tolist() == [0, 0, 0, 0, 0]  # half of the direct effect would be 5
    assert alone[1].tolist() == [0.5, 0.5, 0.5, 0.5, 0]  # at least a tenth, on one of two tokens
    assert repair.repaired_alone(np.ones((1, 2)), 1).value[0].tolist() == [0.5, 0, 0, 0, 0]
    nothing_to_repair = repair_of([[1.0, 1]], [[1.0, -2]], [-1.0])
    assert nothing_to_repair.repaired_alone(np.ones((1, 1))).value.max() == 0
    assert repair_of([[-1.0, -2]], [[0.5, 0.5]], [1.0]).n_for_half.tolist() == [[1, 0]]  # reached exactly


@settings(max_examples=40, deadline=None)
@given(n_tokens=st.integers(1, 8), n_neurons=st.integers(1, 60), seed=st.integers(0, 999))
def test_summaries_equal_loops(n_tokens, n_neurons, seed):
    """Both sides, each by its own loop: the second is not made by reversing signs here."""
    rng = np.random.default_rng(seed)
    clean, change = rng.normal(size=(2, n_tokens, n_neurons))
    effect = rng.normal(1, 1, n_tokens)
    selected = rng.random((n_tokens, 3)) < 0.7
    summary = summary_of(clean, change, effect, selected=selected)
    totals = totals_of(summary)[1, 0][2]
    top = [t for t in range(n_tokens) if selected[t, 0]]
    for i, name in enumerate(SELECTIONS):
        here = [t for t in range(n_tokens) if selected[t, i]]
        repair = repairs_of(summary)[name][1, 0][2]
        assert repair.prompt.tolist() == here
        for row, t in enumerate(here):
            ranked = sorted(range(n_neurons), key=lambda n: -change[t, n])
            assert repair.repairers[row].tolist() == ranked[:20]
            assert set(repair.erasers[row]) == set(sorted(range(n_neurons), key=lambda n: clean[t, n])[:20])
            strongest = sorted(range(n_neurons), key=lambda n: -abs(clean[t, n]))[:20]
            assert repair.strongest[row].tolist() == strongest
            ups = [n for n in ranked if change[t, n] > 0]
            downs = [n for n in ranked[::-1] if change[t, n] < 0]
            erasers = [n for n in range(n_neurons) if clean[t, n] < 0]
            supporters = [n for n in range(n_neurons) if clean[t, n] > 0]
            for side, (moving, like) in enumerate(((ups, erasers), (downs, supporters))):
                sizes = [abs(change[t, n]) for n in moving]
                assert repair.total[row, side] == pytest.approx(sum(sizes))
                both = [abs(change[t, n]) for n in moving if n in like]
                assert repair.by_erasing[row, side] == pytest.approx(sum(both))
                assert repair.changed_by_erasing[row, side] == pytest.approx(
                    sum(abs(change[t, n]) for n in like)
                )
                half = (k for k in range(1, len(sizes) + 1) if sum(sizes[:k]) >= sum(sizes) / 2 - 1e-12)
                assert repair.n_for_half[row, side] == next(half, 0)
                for j, threshold in enumerate(THRESHOLDS):
                    above = sum(size >= threshold * effect[t] for size in sizes) if effect[t] > 0 else 0
                    assert repair.n_above[row, side, j] == above
                few = sizes[:5]
                np.testing.assert_allclose(repair.largest[row, side, : len(few)], few)
                effects = [clean[t, n] * (1, -1)[side] for n in moving[:5]]
                np.testing.assert_allclose(repair.largest_clean[row, side, : len(few)], effects)
    np.testing.assert_allclose(totals.change_by_neuron, change[top].sum(0))
    np.testing.assert_allclose(totals.clean_by_neuron, clean[top].sum(0))
    curve = np.zeros((2, n_neurons))
    for t in top:
        ranked = sorted(range(n_neurons), key=lambda n: -change[t, n])
        for k in range(n_neurons):
            curve[0, k] += sum(max(0, change[t, n]) for n in ranked[: k + 1]) / np.abs(change[t]).sum()
            curve[1, k] += sum(max(0, -change[t, n]) for n in ranked[::-1][: k + 1]) / np.abs(change[t]).sum()
    np.testing.assert_allclose(totals.share_by_rank, curve)


@pytest.mark.parametrize("direct_effect", [2.0, -2.0])
def test_changes_of_rounding_do_not_count_as_moved(direct_effect):
    """Less than a ten-thousandth of the direct effect, in all neurons together and whatever their signs."""
    part = direct_effect * np.array([[0, 0], [1e-6, -1e-6], [4e-5, -4e-5], [6e-5, -6e-5], [0.1, 0.2]])
    found = summary_of(np.ones((5, 2)), part, [direct_effect] * 5)
    assert repairs_of(found)["direct effect"][1, 0][2].moved.tolist() == [False, False, False, True, True]


def test_scopes_join_tokens_and_sum_totals():
    rng = np.random.default_rng(0)
    clean, change = rng.normal(size=(2, 6, 7))
    whole = summary_of(clean, change, np.ones(6))
    parts = [summary_of(clean[i::2], change[i::2], np.ones(3), np.arange(6)[i::2]) for i in range(2)]
    joined = NeuronRepair.joined([repairs_of(part)["repair"][1, 0][2] for part in parts])
    wanted = repairs_of(whole)["repair"][1, 0][2]
    assert joined.prompt.tolist() == list(range(6))
    for name in ("total", "n_above", "largest", "repairers"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(wanted, name))
    summed = NeuronTotals.summed([totals_of(part)[1, 0][2] for part in parts])
    for name, values in vars(totals_of(whole)[1, 0][2]).items():
        np.testing.assert_allclose(getattr(summed, name), values)


@pytest.mark.parametrize("n_neurons", (64, 512))
def test_gaussian_changes_need_an_eighth_of_the_neurons(n_neurons):
    """The closed form against a simulation."""
    rng = np.random.default_rng(1)
    needed = []
    for _ in range(3000):
        change = rng.normal(size=n_neurons)
        ups = np.sort(change[change > 0])[::-1]
        needed.append(np.searchsorted(np.cumsum(ups), ups.sum() / 2) + 1)
    error = np.std(needed) / n_neurons / math.sqrt(len(needed))
    assert abs(np.mean(needed) / n_neurons - gaussian_half(n_neurons)) < 4 * error + 1 / n_neurons / 8
    assert gaussian_half(10**6) == pytest.approx(0.1195, abs=1e-4)


def gaussian_tokens(n_tokens, n_neurons=40, seed=0):
    rng = np.random.default_rng(seed)
    clean, change = rng.normal(size=(2, n_tokens, n_neurons))
    return clean, change, rng.integers(0, 50, n_tokens)


def test_noise_gives_every_statistic_its_control():
    """Changes without any tie to clean effects, of Gaussian size and random sign."""
    clean, change, prompt = gaussian_tokens(1500, 256)
    repair = repair_of(clean, 0.02 * change, np.ones(len(clean)), prompt)
    found = repair_statistics(repair, repair, np.ones((1, 50)))
    for name, control, tolerance in (
        ("neurons-for-half", "neurons-for-half-gaussian", 0.004),
        ("tokens-repaired-by-one-neuron", "tokens-broken-by-one-neuron", 0.03),
        ("repairing-neurons-overlap", "strongest-neurons-overlap", 0.003),
        ("erasing-share", "erasers-part-of-change", 0.01),
        ("erasers-weaken", "supporters-weaken", 0.01),
        ("first-repairer-erases", "first-changer-erases", 0.03),
    ):
        assert 0.01 < found[name].value < 0.99, name
        assert found[name].value == pytest.approx(found[control].value, abs=tolerance), name


def test_anti_erasure_beats_its_controls_and_general_weakening_shows_in_the_mirror():
    clean, change, prompt = gaussian_tokens(400)
    every = np.full(len(clean), 6.0)
    erasers_weaken = 0.1 * change + np.where(clean < 0, -0.2 * clean, 0)
    all_weaken = -0.2 * clean
    found = [
        repair_statistics(repair, repair, np.ones((1, 50)))
        for repair in (repair_of(clean, of, every, prompt) for of in (erasers_weaken, all_weaken))
    ]
    for statistics in found:
        assert statistics["erasing-share"].value > statistics["erasers-part-of-change"].value + 0.02
        assert statistics["first-repairer-erases"].value > 0.9
        assert statistics["first-repairer-erases"].value > statistics["first-changer-erases"].value
    alone, with_all = ([of[name].value for name in ("erasers-weaken", "supporters-weaken")] for of in found)
    assert alone[0] > 0.9 and alone[1] == pytest.approx(0.5, abs=0.01) and with_all == [1, 1]
    assert found[0]["tokens-repaired-by-one-neuron"].value > found[0]["tokens-broken-by-one-neuron"].value


def test_neurons_that_always_repair_are_no_different_neurons():
    clean, change, prompt = gaussian_tokens(200, 60)
    change[:, :20] += 10
    repair = repair_of(clean, change, np.ones(len(clean)), prompt)
    found = repair_statistics(repair, repair, np.ones((1, 50)))
    assert found["repairing-neurons-overlap"].value == 1
    assert found["strongest-neurons-overlap"].value < 0.3


def test_the_mirror_may_be_of_other_tokens():
    clean, change, prompt = gaussian_tokens(30)
    one = repair_of(clean[:15], change[:15], np.ones(15), prompt[:15])
    other = repair_of(clean[15:], change[15:] - 1, np.ones(15), prompt[15:])
    mixed = repair_statistics(one, other, np.ones((1, 50)))
    for name, of in (("tokens-repaired-by-one-neuron", one), ("tokens-broken-by-one-neuron", other)):
        assert mixed[name].value == repair_statistics(of, of, np.ones((1, 50)))[name].value
    weakened = sum(other.by_erasing[:, 1]) / sum(other.changed_by_erasing[:, 1])
    assert mixed["supporters-weaken"].value == pytest.approx(weakened)


def made_parts(n=400, share=0.0, seed=0):
    """Tokens whose MLP change is noise, plus ``share`` of a positive self-repair of other parts."""
    rng = np.random.default_rng(seed)
    other, noise = rng.normal(0.5, 1, n), rng.normal(0, 0.7, n)
    part = noise + share * np.abs(other)
    zeros = np.zeros((n, 3))
    return repair_of(zeros, zeros, np.ones(n), np.arange(n) % 9, repair=other + part, mlps=part)


def test_the_part_of_self_repair_and_its_floor_equal_loops():
    repair = made_parts(60)
    weights = np.concatenate([ONCE, np.random.default_rng(0).integers(0, 3, (2, 9))])
    found = mlp_part(repair, repair.mlps_repair, weights)
    for draw, counts in enumerate(weights):
        shares, both, parts, repaired = [], [], [], []
        for t in (
            t for p in range(9) for _ in range(int(counts[p])) for t in np.flatnonzero(repair.prompt == p)
        ):
            part, whole = repair.mlps_repair[t], repair.self_repair[t]
            parts.append(part)
            repaired.append(whole)
            if whole > 0:
                shares.append(min(max(part / whole, 0), 1))
                both.append(shares[-1])
            if (other := whole - 2 * part) > 0:
                both.append(min(max(-part / other, 0), 1))
        for name, values in (
            ("clipped", shares),
            ("floor", both),
            ("part", parts),
            ("self_repair", repaired),
        ):
            assert found[name].drawn[draw] == pytest.approx(np.mean(values)), name
    assert part_of_self_repair(repair, repair.mlps_repair).mean() == pytest.approx(found["clipped"].value)


def test_noise_has_the_floor_as_its_part_of_self_repair():
    noise, real = (mlp_part(of, of.mlps_repair, ONCE) for of in (made_parts(20_000), made_parts(20_000, 1.0)))
    assert noise["floor"].value > 0.2
    assert noise["clipped"].value == pytest.approx(noise["floor"].value, abs=0.01)
    assert real["clipped"].value > real["floor"].value + 0.1


def test_shares_of_few_neurons_by_hand():
    repair = repair_of(
        [[1.0, -1, 1, -1, 1, 1, 1]] * 2, [[6.0, 5, 4, 3, 2, 1, -7], [-1.0] * 7], [1.0, 1], mlps=[10.0, -14]
    )
    np.testing.assert_array_equal(repair.few_of_total(0), [20 / 21, np.nan])
    np.testing.assert_array_equal(repair.few_of_mlps(0), [2.0, np.nan])
    np.testing.assert_array_equal(repair.few_of_total(1), [1, 5 / 7])
    np.testing.assert_array_equal(repair.few_of_mlps(1), [np.nan, 5 / 14])
    assert repair.share_for_half(0).tolist() == [2 / 7] and repair.share_for_half(1).tolist() == [
        1 / 7,
        4 / 7,
    ]
    assert repair.first_erases(0).tolist()[0] == 0 and repair.first_erases(1).tolist()[0] == 1


@pytest.mark.parametrize(("n", "size"), [(5, 2), (6, 3), (7, 3), (4, 4), (9, 1)])
def test_chance_overlap_is_that_of_all_pairs_of_sets(n, size):
    sets = [set(chosen) for chosen in itertools.combinations(range(n), size)]
    wanted = np.mean([len(a & b) / len(a | b) for a in sets for b in sets])
    assert chance_overlap(n, size) == pytest.approx(wanted, abs=1e-12)


def test_random_sets_overlap_and_recur_by_chance():
    rng = np.random.default_rng(0)
    chosen = rng.random((300, 60)).argsort(1)[:, :20]
    sets = NeuronSets(np.arange(300), chosen, 60)
    assert mean_overlap(pair_overlaps(sets, sets, 300), np.ones((1, 300))).value == pytest.approx(
        chance_overlap(60, 20), abs=0.002
    )
    often, expected = sets.frequencies(10), sets.random_frequencies(10)
    counts = [sum(n in of[:10] for of in chosen.tolist()) for n in range(60)]
    assert often.tolist() == [count / 300 for count in sorted(counts, reverse=True)]
    assert expected.sum() == pytest.approx(10, abs=0.1)
    np.testing.assert_allclose(often, expected, atol=0.03)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), at_once=st.sampled_from((1, 700, 10**6)))
def test_overlaps_equal_loops_over_pairs(seed, at_once):
    rng = np.random.default_rng(seed)
    parts = []
    for head in range(2):
        prompt = rng.integers(0, 4, 7)
        change = rng.normal(size=(7, 30))
        change[rng.integers(7)] = 0  # not moved: in no pair
        parts.append(repair_of(-change, change, np.ones(7), prompt, head=head))
    weights = np.concatenate([np.ones((1, 4)), rng.integers(0, 3, (3, 4))])
    original, neuron_sets.COMPARED_AT_ONCE = neuron_sets.COMPARED_AT_ONCE, at_once
    try:
        one = parts[0].sets("repairers")
        found = [mean_overlap(pair_overlaps(one, of.sets("repairers"), 4), weights).drawn for of in parts]
    finally:
        neuron_sets.COMPARED_AT_ONCE = original
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
                    first, second = set(parts[0].repairers[a].tolist()), set(other.repairers[b].tolist())
                    wanted.append(len(first & second) / len(first | second))
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
