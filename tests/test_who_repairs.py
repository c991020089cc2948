"""Backup heads: how few carry the growth, whether that is luck, whom they resemble, joint costs by hand."""

from statistics import NormalDist

import numpy as np
import pytest
import xarray as xr
from readings import cosines_of

from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.head_growth import CONTROL, TOP, PairGrowth, all_pairs
from selfrepair.analysis.joint_ablation import JointCosts, beyond_control, excess_table
from selfrepair.analysis.rules import load_statistics
from selfrepair.analysis.who_repairs import (
    counted_pairs,
    erasers_table,
    resemblance_gains,
    resemblances,
    who_repairs_statistics,
)
from selfrepair.measure.joint_ablation import Trio
from selfrepair.measure.judged_tokens import SELECTED

LAYERS, HEADS, PROMPTS = 3, 2, 12
PLACES = (LAYERS, HEADS, LAYERS, HEADS)
RUNS = list(Trio((0, 0), (1, 0), (1, 1)).runs())


def grown(growth, count=2, clean_effect=1.0, control=0.0, prompts=PROMPTS):
    """As measured: mean ``growth [layer, head, later layer, later head(, prompt)]`` of ``count`` tokens."""
    growth = np.asarray(growth, dtype=float)
    growth = growth if growth.ndim == 5 else np.repeat(growth[..., None], prompts, -1)
    n_layers, n_heads = growth.shape[:2]
    values = count * np.stack([growth, np.full_like(growth, control)])
    effects = np.broadcast_to(np.asarray(clean_effect, dtype=float), growth.shape[:4])
    ablated, other = ("ablated_layer", "ablated_head"), ("layer", "head")
    return xr.Dataset(
        {
            "growth": (("selection", *ablated, *other, "prompt"), values),
            "clean_effect": (
                (*ablated, *other, "prompt"),
                count * np.repeat(effects[..., None], prompts, -1),
            ),
            "count": (("selection", *ablated, "prompt"), np.full((2, n_layers, n_heads, prompts), count)),
        },
        {"prompt": np.arange(prompts)},
        {"model": "made up", "selections": list(SELECTED)},
    )


def numbered():
    """A different growth for each pair."""
    return np.arange(np.prod(PLACES), dtype=float).reshape(PLACES) / 100


def noise(n_layers=4, n_heads=5, prompts=PROMPTS, seed=0):
    return np.random.default_rng(seed).normal(size=(n_layers, n_heads, n_layers, n_heads, prompts))


def test_pairs_are_of_later_layers_alone():
    found = PairGrowth.of(grown(numbered()), 10)
    matrix = found.matrix().reshape(PLACES)
    for layer in range(LAYERS):
        assert np.isnan(matrix[layer, :, : layer + 1]).all()
        np.testing.assert_allclose(matrix[layer, :, layer + 1 :], numbered()[layer, :, layer + 1 :])
    assert len(found.later) == 12 and set(found.layers_apart.tolist()) == {1, 2}
    assert found.largest() == ((1, 1), (2, 1))


def test_growth_is_per_token_however_many_a_prompt_has():
    made = grown(numbered())
    made["growth"][0, 0, 0, 1, 0] = np.arange(PROMPTS)
    made["count"][0, 0, 0] = np.arange(PROMPTS) % 3
    found = PairGrowth.of(made, 10)
    assert found.matrix()[0, 2] == pytest.approx(sum(range(PROMPTS)) / sum(i % 3 for i in range(PROMPTS)))


def test_one_pair_that_carries_everything():
    growth = np.zeros(PLACES)
    growth[0, 1, 2, 0] = 0.5
    found = PairGrowth.of(grown(growth), 10)
    share = found.share_of_strongest()
    assert share.value == 1 and (share.samples == 1).all() and found.net().value == 1
    assert (found.cumulative().drawn == 1).all() and (found.cumulative(CONTROL).drawn == 0).all()


def test_luck_does_not_carry_over_to_the_other_half():
    """Growth that is noise: chosen and read on the same prompts its largest would be far above 0."""
    made = noise(prompts=40)
    found = PairGrowth.of(grown(made, prompts=40), 10)
    n = found.n_strongest
    even, odd = (found.growth(found.draws_of_half(half)[0]) for half in (True, False))
    same, other = even[found.strongest()].mean(), odd[found.strongest()].mean()
    assert n == 15 and same > 0.2 and abs(other) < 0.1


def shares_of_gaussians(spreads, noise_of_half, seed=9):
    """What the strongest tenth carries, by drawing: chosen with noise, read without."""
    true = np.random.default_rng(seed).normal(size=(20_000, len(spreads))) * spreads
    chosen = true + np.random.default_rng(seed + 1).normal(size=true.shape) * noise_of_half
    strongest = chosen > np.quantile(chosen, 0.9)
    return true[strongest].sum() / true[chosen > 0].sum()


@pytest.mark.parametrize("differ", [False, True])
def test_gaussian_pairs_carry_what_the_control_says(differ):
    """Growth with as much noise again, and heads after which others grow more: no head is a backup."""
    spreads = np.geomspace(0.2, 3, 20) if differ else np.ones(20)
    true = noise(2, 20, 1, seed=1) * spreads[:, None, None, None] + np.zeros(16)
    made = true + noise(2, 20, 16, seed=2) * np.sqrt(8)
    found = PairGrowth.of(grown(made, prompts=16), 10)
    drawn = shares_of_gaussians(spreads, 1.0)
    assert drawn > 0.55 if differ else drawn == pytest.approx(0.44, abs=0.01)
    assert found.share_if_gaussian().value == pytest.approx(drawn, abs=0.05)
    assert found.share_of_strongest().value == pytest.approx(drawn, abs=0.1)


def test_few_backups_of_each_head_carry_more_than_the_control_says():
    growth = noise(3, 10, 1, seed=6) * 0.1 + np.zeros(16)
    growth[:, :, :, 0] += 1
    found = PairGrowth.of(grown(growth + noise(3, 10, 16, seed=7) * 0.1, prompts=16), 10)
    share, by_chance = found.share_of_strongest(), found.share_if_gaussian()
    assert (share - by_chance).interval().low > 0.1
    assert found.if_gaussian(np.array([0.5]))[0].value == pytest.approx(1)  # all that are positive


def test_the_pair_that_grows_most_is_read_where_it_was_not_chosen():
    """By hand: even prompts choose, odd ones are read."""
    made = noise(3, 4, PROMPTS, seed=8)
    table = PairGrowth.of(grown(made), 50).table()
    row = table.loc[table["chosen_by"].idxmax()]
    (a, b), (c, d) = ((int(name[1]), int(name[3])) for name in (row["ablated"], row["later"]))
    assert row["chosen_by"] == pytest.approx(made[a, b, c, d, ::2].mean())
    assert row["read"] == pytest.approx(made[a, b, c, d, 1::2].mean())
    assert row["read_low"] < row["read"] < row["read_high"]
    assert row["growth"] == pytest.approx(made[a, b, c, d].mean())
    assert row["share"] == pytest.approx(row["read"])  # the ablated head's own effect is 1


def by_hand(made, weights):
    """Growth of every pair on prompts of so many weights, in order of layer and head."""
    growth = (made * weights).sum(-1) / weights.sum()
    n_layers, n_heads = made.shape[:2]
    return np.array(
        [
            growth[a, b, c, d]
            for a in range(n_layers)
            for b in range(n_heads)
            for c in range(a + 1, n_layers)
            for d in range(n_heads)
        ]
    )


def test_curve_of_the_pairs_that_grow_most_and_its_samples():
    made = noise(3, 4, 20, seed=11)
    found = PairGrowth.of(grown(made, prompts=20), 30)
    curve, even = found.cumulative(), np.arange(20) % 2 == 0
    chosen = by_hand(made, even)
    order, n_positive = np.argsort(-chosen), int((chosen > 0).sum())
    for draw in (0, 1, 30):
        read = by_hand(made, found.draws_of_half(even=False)[draw])[order]
        wanted = np.cumsum(read) / read[:n_positive].sum()
        np.testing.assert_allclose(curve.drawn[:, draw], wanted, atol=1e-12)
    at_tenth = curve[found.n_strongest - 1]
    np.testing.assert_allclose(at_tenth.drawn, found.share_of_strongest().drawn, atol=1e-12)
    np.testing.assert_allclose(curve.drawn[n_positive - 1], 1)


def test_ablated_heads_that_have_half_of_the_growth():
    """In the order of even prompts, odd ones give 1 + 3 + 5 of 11; pairs that shrink are left out."""
    growth = np.full((2, 4, 2, 4, PROMPTS), -1.0)
    growth[0, :, 1, 0, ::2] = np.array([6, 5, 3, 1])[:, None]
    growth[0, :, 1, 0, 1::2] = np.array([1, 3, 5, 2])[:, None]
    assert PairGrowth.of(grown(growth), 10).heads_for_half() == 3


def test_heads_that_shrink_outweigh():
    growth = np.full(PLACES, -1.0)
    growth[0, 0, 1] = 2.0
    assert PairGrowth.of(grown(growth), 10).net().value == pytest.approx((4 - 10) / 4)


def test_resemblance_of_the_strongest_pairs_against_the_other_heads_of_the_layer():
    """Two of twelve pairs are the tenth. A layer that is alike in all its heads is as alike in the control."""
    growth = np.zeros(PLACES)
    growth[0, 0, 1, 1], growth[1, 0, 2, 0] = 3, 2
    cosine = np.zeros((6, 6))
    cosine[0, 3], cosine[2, 4], cosine[1, 2] = 0.8, 0.4, 0.4
    cosine[2, 5] = 0.5
    own, control = PairGrowth.of(grown(growth), 10).resemblance(cosine)
    assert own.value == pytest.approx(0.6) and control.value == pytest.approx((0 + 0.5) / 2)
    assert own.samples == pytest.approx(0.6) and control.samples == pytest.approx(0.25)


@pytest.mark.parametrize("seed", [0, 1])
def test_resemblance_by_loops(seed):
    made = noise(3, 4, PROMPTS, seed=seed)
    cosine = np.random.default_rng(seed + 10).normal(size=(12, 12))
    own, control = PairGrowth.of(grown(made), 5).resemblance(cosine)
    pairs = [(a, b) for a in range(12) for b in range(12) if a // 4 < b // 4]
    growth = made.mean(-1).reshape(12, 12)
    strongest = sorted(pairs, key=lambda pair: -growth[pair])[:5]  # of 48, rounded up
    assert own.value == pytest.approx(sum(cosine[pair] for pair in strongest) / 5)
    wanted = []
    for a, b in strongest:
        others = [other for other in range(12) if other // 4 == b // 4 and other != b]
        wanted.append(sum(cosine[a, other] for other in others) / 3)
    assert control.value == pytest.approx(sum(wanted) / 5)


def test_one_head_in_a_layer_has_no_control():
    made = noise(4, 1, PROMPTS)
    own, control = PairGrowth.of(grown(made), 5).resemblance(np.ones((4, 4)))
    assert own.value == 1 and np.isnan(control.value)


def test_samples_of_a_choice_lie_around_the_value():
    made = noise(prompts=20)
    made[0, 0, 1] += 1
    cosine = np.random.default_rng(3).normal(size=(20, 20))
    for estimate in PairGrowth.of(grown(made, prompts=20), 50).resemblance(cosine):
        assert estimate.samples.mean() == pytest.approx(estimate.value) and estimate.samples.std() > 0


def test_backups_that_are_shared_by_all_heads_and_by_none():
    common = np.random.default_rng(4).normal(size=(4, 5))
    shared, same = PairGrowth.of(grown(np.broadcast_to(common, (4, 5, 4, 5))), 10).shared()
    assert shared.value == pytest.approx(1) and same.value == pytest.approx(1)
    own = np.repeat(noise(3, 12, 1), PROMPTS, -1)
    shared, same = PairGrowth.of(grown(own), 10).shared()
    assert abs(shared.value) < 0.05 and same.value == pytest.approx(1)
    on_control_tokens = (
        np.broadcast_to(common[:3, :1, None], (3, 12, 3, 12, PROMPTS)) * np.arange(12)[:, None]
    )
    both = PairGrowth.of(grown(own, control=on_control_tokens), 10)
    assert both.shared(CONTROL)[0].value == pytest.approx(1) and abs(both.shared()[0].value) < 0.05
    reversed_order = np.zeros((3, 2, 3, 2))
    reversed_order[:, 0, :, 0] = reversed_order[:, 1, :, 1] = 1
    assert PairGrowth.of(grown(reversed_order), 10).shared()[0].value == pytest.approx(-1)


def test_a_head_without_tokens_shares_nothing():
    made = grown(np.broadcast_to(np.random.default_rng(5).normal(size=(4, 5)), (4, 5, 4, 5)))
    made["count"][:, 0, :2], made["growth"][:, 0, :2] = 0, 0
    found = PairGrowth.of(made, 10)
    assert found.shared()[0].value == pytest.approx(1)
    assert np.isnan(found.matrix()[:2]).all() and np.isfinite(found.share_of_strongest().value)


def test_growth_of_heads_that_lower_the_token():
    growth, effect = np.zeros(PLACES), np.ones(PLACES)
    growth[0, 0, 1, 1], growth[1, 0, 2, 0] = 3, 1
    effect[0, 0, 1, 1] = effect[0, 0, 1, 0] = effect[0, 0, 2, 0] = -1
    found = PairGrowth.of(grown(growth, clean_effect=effect), 10)
    share, of_all = found.by_erasers()
    assert share.value == 0.75 and of_all == 3 / 12
    assert erasers_table({"m": found})[["of the growth", "of all pairs"]].values.tolist() == [[0.75, 0.25]]


def test_share_is_read_on_the_same_prompts_as_growth():
    made = grown(numbered())
    made["clean_effect"][..., ::2] = 1e6  # prompts of even number are not read
    made["clean_effect"][..., 1::2] *= 4
    table = PairGrowth.of(made, 10).table()
    np.testing.assert_allclose(table["share"], table["read"] / 4)


def test_distance_from_gaussian_is_counted_with_its_interval():
    found = PairGrowth.of(grown(noise(3, 4, 20, seed=12), prompts=20), 50)
    row = counted_pairs({"made up": found}, all_pairs([found])).iloc[0]
    beyond = found.share_of_strongest().drawn - found.share_if_gaussian().drawn
    wanted = [beyond[0], *np.quantile(beyond[1:], [0.025, 0.975])]
    np.testing.assert_allclose(row[["beyond Gaussian", "beyond low", "beyond high"]].astype(float), wanted)
    assert row["ablated heads"] == 8 and row["heads for half"] == found.heads_for_half()


def test_gains_in_resemblance_are_over_pairs_as_far_apart():
    made = {
        f"backups-{kind}-cosine{suffix}": Estimate(np.array(drawn))
        for kind, own, control in (
            ("output", [0.5, 0.4, 0.6], [0.1, 0.1, 0.2]),
            ("pattern", [0.2] * 3, [0.3] * 3),
        )
        for suffix, drawn in (("", own), ("-same-layer", control))
    }
    table = resemblance_gains({"m": made})
    assert table.loc[("m", "output"), ["cosine", "gain"]].tolist() == pytest.approx([0.5, 0.4])
    assert table.loc[("m", "output"), ["low", "high"]].tolist() == pytest.approx([0.3025, 0.3975])
    assert table.loc[("m", "pattern")].tolist() == pytest.approx([0.2, -0.1, -0.1, -0.1])


def test_table_of_pairs_has_the_strongest_first():
    made = grown(numbered(), control=-0.1, clean_effect=0.5)
    found = PairGrowth.of(made, 20)
    first = found.table().iloc[0]
    assert (first["ablated"], first["later"]) == ("L1H1", "L2H1")
    wanted = {"growth": 0.23, "low": 0.23, "high": 0.23, "share": 0.46, "control": -0.1, "later_effect": 0.5}
    assert {name: first[name] for name in wanted} == pytest.approx(wanted)
    counted = counted_pairs({"made up": found}, all_pairs([found])).iloc[0]
    assert counted["grow, top tokens"] == counted["shrink, control tokens"] == 1
    assert counted["shrink, top tokens"] == counted["grow, control tokens"] == 0


def uneven(n_layers=3, n_heads=4, prompts=PROMPTS, seed=1):
    """Tokens differ by head, selection and prompt, clean effects by prompt; growth is a sum over tokens."""
    rng = np.random.default_rng(seed)
    ablated, other = ("ablated_layer", "ablated_head"), ("layer", "head")
    heads = (n_layers, n_heads)
    return xr.Dataset(
        {
            "growth": (
                ("selection", *ablated, *other, "prompt"),
                rng.normal(0.2, 1, size=(2, *heads, *heads, prompts)),
            ),
            "clean_effect": ((*ablated, *other, "prompt"), rng.normal(size=(*heads, *heads, prompts))),
            "count": (("selection", *ablated, "prompt"), rng.integers(1, 6, size=(2, *heads, prompts))),
        },
        {"prompt": np.arange(prompts)},
        {"model": "made up", "selections": list(SELECTED)},
    )


class Pairs:
    """Means over tokens of :func:`uneven` by plain sums, over ``EVERY``, ``EVEN`` or ``ODD`` prompts."""

    EVERY, EVEN, ODD = slice(None), slice(0, None, 2), slice(1, None, 2)

    def __init__(self, made, selection=0):
        self.growth, self.count = (made[name].values[selection] for name in ("growth", "count"))
        self.effect, self.top_count = made["clean_effect"].values, made["count"].values[0]
        heads = [(layer, head) for layer in range(made.sizes["layer"]) for head in range(made.sizes["head"])]
        self.all = [(one, later) for one in heads for later in heads if later[0] > one[0]]

    def mean(self, head, later, prompts):
        return self.growth[(*head, *later)][prompts].sum() / self.count[head][prompts].sum()

    def means(self, prompts):
        return np.array([self.mean(head, later, prompts) for head, later in self.all])

    def mean_effect(self, head, later, prompts):
        """Of the later head, on the ablated head's top tokens."""
        return self.effect[(*head, *later)][prompts].sum() / self.top_count[head][prompts].sum()

    def strongest(self, prompts):
        """Numbers of the tenth of the pairs that grow most."""
        return np.argsort(-self.means(prompts), kind="stable")[: int(np.ceil(0.1 * len(self.all)))]


def test_table_of_pairs_by_loops():
    made = uneven()
    pairs, control = Pairs(made), Pairs(made, 1)
    found = PairGrowth.of(made, 5)
    table = found.table().set_index(["ablated", "later"])
    for head, later in pairs.all:
        row = table.loc["L{}H{}".format(*head), "L{}H{}".format(*later)]
        own = pairs.mean_effect(head, head, Pairs.ODD)
        wanted = {
            "growth": pairs.mean(head, later, Pairs.EVERY),
            "control": control.mean(head, later, Pairs.EVERY),
            "chosen_by": pairs.mean(head, later, Pairs.EVEN),
            "read": pairs.mean(head, later, Pairs.ODD),
            "later_effect": pairs.mean_effect(head, later, Pairs.EVERY),
            "share": pairs.mean(head, later, Pairs.ODD) / own,
        }
        assert {name: row[name] for name in wanted} == pytest.approx(wanted)


def test_shares_of_the_growth_by_loops():
    """Pairs and their signs by even prompts, growth by odd ones, each head's over its own tokens."""
    made = uneven()
    pairs, found = Pairs(made), PairGrowth.of(made, 5)
    chosen, read = pairs.means(Pairs.EVEN), pairs.means(Pairs.ODD)
    positive, strongest = read[chosen > 0].sum(), pairs.strongest(Pairs.EVEN)
    assert found.share_of_strongest().value == pytest.approx(read[strongest].sum() / positive)
    assert found.net().value == pytest.approx(read.sum() / positive)
    order = np.argsort(-chosen, kind="stable")
    np.testing.assert_allclose(found.cumulative().value, np.cumsum(read[order]) / positive)
    control = Pairs(made, 1)
    order = np.argsort(-control.means(Pairs.EVEN), kind="stable")
    wanted = np.cumsum(control.means(Pairs.ODD)[order]) / positive
    np.testing.assert_allclose(found.cumulative(CONTROL).value, wanted)
    row = counted_pairs({"made up": found}, all_pairs([found])).iloc[0]
    assert row["all pairs together"] == pytest.approx(read.sum() / positive)
    assert row["strongest tenth carries"] == pytest.approx(read[strongest].sum() / positive)


@pytest.mark.parametrize("seed", [1, 2])
def test_growth_of_heads_that_lower_the_token_by_loops(seed):
    made = uneven(seed=seed)
    pairs = Pairs(made)
    read, strongest = pairs.means(Pairs.ODD), pairs.strongest(Pairs.EVEN)
    lowers = np.array([pairs.mean_effect(*pair, Pairs.EVEN) < 0 for pair in pairs.all])
    share, of_all = PairGrowth.of(made, 5).by_erasers()
    wanted = sum(read[pair] for pair in strongest if lowers[pair]) / sum(read[pair] for pair in strongest)
    assert share.value == pytest.approx(wanted) and of_all == lowers.mean()


def test_control_of_the_strongest_tenth_by_loops():
    """Growth that is Gaussian around 0 with the mean square that each ablated head's has on even prompts."""
    made = uneven()
    pairs = Pairs(made)
    chosen, read, n = pairs.means(Pairs.EVEN), pairs.means(Pairs.ODD), len(pairs.all)
    heads = sorted({head for head, _ in pairs.all})
    of_head = {head: [i for i, pair in enumerate(pairs.all) if pair[0] == head] for head in heads}
    spread = {head: np.sqrt(np.mean(chosen[of_head[head]] ** 2)) for head in heads}
    slope = {head: (chosen * read)[of_head[head]].sum() / spread[head] for head in heads}
    low, high = -50.0, 50.0
    for _ in range(100):
        threshold = (low + high) / 2
        above = sum(len(of_head[head]) * (1 - NormalDist().cdf(threshold / spread[head])) for head in heads)
        low, high = (threshold, high) if above > np.ceil(0.1 * n) else (low, threshold)
    carried, positive = (
        sum(slope[head] * np.exp(-((t / spread[head]) ** 2) / 2) for head in heads) for t in (threshold, 0)
    )
    found = PairGrowth.of(made, 5).share_if_gaussian()
    assert found.value == pytest.approx(carried / positive)


@pytest.mark.parametrize(("selection", "number"), [(TOP, 0), (CONTROL, 1)])
def test_ranks_of_one_half_against_those_of_the_other_by_loops(selection, number):
    made = uneven()
    pairs, others, same = Pairs(made, number), [], []

    def ranks(head, layer, prompts):
        return np.argsort(np.argsort([pairs.mean(head, (layer, later), prompts) for later in range(4)]))

    for layer, above in ((0, 1), (0, 2), (1, 2)):
        for one in range(4):
            for other in range(4):
                half, rest = ranks((layer, one), above, Pairs.EVEN), ranks((layer, other), above, Pairs.ODD)
                (same if one == other else others).append(np.corrcoef(half, rest)[0, 1])
    shared, own = PairGrowth.of(made, 5).shared(selection)
    assert [shared.value, own.value] == pytest.approx([np.mean(others), np.mean(same)])


def test_halves_are_drawn_apart():
    found = PairGrowth.of(uneven(), 50)
    even, odd = (found.draws_of_half(half)[1:] for half in (True, False))
    assert not even[:, 1::2].any() and not odd[:, 0::2].any()
    assert (even.sum(1) == 6).all() and (odd.sum(1) == 6).all()
    assert abs(np.corrcoef(even[:, 0::2].ravel(), odd[:, 1::2].ravel())[0, 1]) < 0.2


def jointly(loss, logit):
    """``loss`` and ``logit [run, trio]`` of every token; a prompt of number ``n`` has ``n`` tokens."""
    count = np.tile(np.arange(4.0), (2, 1))
    made = {
        name: np.array(of_runs, dtype=float)[..., None] * count
        for name, of_runs in (("loss", loss), ("logit", logit))
    }
    made["loss"][..., 0::2] = 1e6  # prompts of even number are not read
    heads = {"head": [[0, 0], [0, 1]], "backup": [[1, 0], [2, 1]], "middling": [[1, 1], [1, 0]]}
    return xr.Dataset(
        {name: (("run", "trio", "prompt"), values) for name, values in made.items()}
        | {"count": (("trio", "prompt"), count)}
        | {name: (("trio", "place"), places) for name, places in heads.items()},
        {"prompt": np.arange(4)},
        {"model": "made up", "runs": RUNS},
    )


def test_costs_together_and_alone():
    loss = [[2, 3], [2.5, 3.1], [2.1, 3.3], [2.9, 3.4], [2.2, 3.2], [2.7, 3.3]]
    logit = [[5, 5], [4, 4], [4.5, 4.5], [3, 3.5], [4.5, 5], [3.5, 4]]
    found = JointCosts.of(jointly(loss, logit), 20)
    assert found.heads.values.tolist() == [["L0H0", "L1H0", "L1H1"], ["L0H1", "L2H1", "L1H0"]]
    np.testing.assert_allclose(found.sum_of_both("loss", "backup").value, [0.6, 0.4])
    np.testing.assert_allclose(found.together("loss", "backup").value, [0.9, 0.4])
    wanted = {
        "joint-loss-excess": 0.15,
        "joint-loss-excess-middling": 0.0,
        "joint-logit-excess": 0.25,
        "joint-logit-excess-middling": 0.0,
    }
    statistics = found.statistics()
    assert {name: estimate.value for name, estimate in statistics.items()} == pytest.approx(wanted)
    table = excess_table([found], "loss")
    assert table[["model", "with"]].values.tolist() == [["made up", "backup"], ["made up", "middling"]]
    np.testing.assert_allclose(table["excess"], [0.15, 0], atol=1e-12)
    np.testing.assert_allclose(table["other alone"], [0.2, 0.2])
    np.testing.assert_allclose(table["of that"], [0.75, 0], atol=1e-12)
    assert found.n_prompts == 2


def test_table_of_costs_alone_and_together():
    """Logits cost where they fall; low and high are ends of the excess's interval over prompts."""
    loss = [[2, 3], [2.5, 3.1], [2.1, 3.3], [2.9, 3.4], [2.2, 3.2], [2.7, 3.3]]
    logit = [[5, 5], [4, 4], [4.5, 4.5], [3, 3.5], [4.5, 5], [3.5, 4]]
    found = JointCosts.of(jointly(loss, logit), 20)
    columns = ["head", "with", "kind", "head alone", "other alone", "sum", "together", "excess"]
    wanted = {
        "loss": [
            ["L0H0", "L1H0", "backup", 0.5, 0.1, 0.6, 0.9, 0.3],
            ["L0H1", "L2H1", "backup", 0.1, 0.3, 0.4, 0.4, 0.0],
            ["L0H0", "L1H1", "middling", 0.5, 0.2, 0.7, 0.7, 0.0],
            ["L0H1", "L1H0", "middling", 0.1, 0.2, 0.3, 0.3, 0.0],
        ],
        "logit": [
            ["L0H0", "L1H0", "backup", 1.0, 0.5, 1.5, 2.0, 0.5],
            ["L0H1", "L2H1", "backup", 1.0, 0.5, 1.5, 1.5, 0.0],
            ["L0H0", "L1H1", "middling", 1.0, 0.5, 1.5, 1.5, 0.0],
            ["L0H1", "L1H0", "middling", 1.0, 0.0, 1.0, 1.0, 0.0],
        ],
    }
    for quantity, rows in wanted.items():
        table = found.table(quantity)
        assert (table["model"] == "made up").all()
        for row, values in zip(table[columns].values.tolist(), rows, strict=True):
            assert row[:3] == values[:3] and row[3:] == pytest.approx(values[3:], abs=1e-9)
        np.testing.assert_allclose(table["low"], table["excess"], atol=1e-9)  # the same on every token
        np.testing.assert_allclose(table["high"], table["excess"], atol=1e-9)


def test_backups_beyond_the_control_drawn_together():
    """Excesses differ by as much in every prompt, so that their difference has no spread though they have."""
    joint = jointly(np.zeros((6, 2)), np.zeros((6, 2)))
    both, middling, alone = RUNS.index("both"), RUNS.index("both with middling"), RUNS.index("backup")
    joint["count"][:] = 1
    joint["loss"][:] = 0.0
    joint["loss"][both, :, 1::2], joint["loss"][middling, :, 1::2] = [2.0, 5.0], [1.5, 4.5]
    joint["loss"][[alone, RUNS.index("middling")]] = np.array([1.0, 0.25])[:, None, None]
    costs = JointCosts.of(joint, 20)
    assert np.ptp(costs.excess("loss", "backup").samples) > 0
    row = beyond_control([costs], "loss").loc["made up"]
    assert row[["excess", "low", "high"]].tolist() == pytest.approx([-0.25] * 3)
    assert row["times_alone"] == 4
    shares = [(3.5 - 1) / 1, (3 - 0.25) / 0.25]
    assert row["share"] == pytest.approx(shares[0] - shares[1]) and row["share_low"] < row["share_high"]


def test_statistics_by_loops_and_those_that_are_registered():
    """All of notebook 09, and no others."""
    made, rng = uneven(), np.random.default_rng(3)
    growth, pairs = PairGrowth.of(made, 5), Pairs(made)
    outputs, patterns = rng.normal(size=(1, 12, 12)), rng.normal(size=(12, 12, 3))
    alike = resemblances(
        {"m": growth},
        {"m": cosines_of(np.zeros((3, 3, 2)), outputs)},
        {"m": xr.Dataset({"heads": (("any_head", "other_head", "prompt"), patterns)})},
    )
    costs = JointCosts.of(jointly(rng.normal(size=(6, 2)), rng.normal(size=(6, 2))), 10)
    found = who_repairs_statistics({"m": growth}, {"m": costs}, alike)["m"]
    known = load_statistics()
    controls = {statistic.control for name, statistic in known.items() if name in found}
    assert (
        found.keys() <= known.keys() and {name for name in controls if isinstance(name, str)} <= found.keys()
    )
    wanted = {
        "growth-of-strongest-tenth": growth.share_of_strongest(),
        "growth-of-strongest-tenth-gaussian": growth.share_if_gaussian(),
        "same-backups": growth.shared()[0],
        "same-backups-control-tokens": growth.shared(CONTROL)[0],
    } | costs.statistics()
    wanted = {name: estimate.value for name, estimate in wanted.items()}
    assert len({round(value, 6) for value in wanted.values()}) == len(wanted)  # none is another's
    strongest = [pairs.all[number] for number in pairs.strongest(Pairs.EVERY)]
    for kind, cosine in (("output", outputs[0] / 2), ("pattern", patterns.mean(-1))):  # 2 prompts, 3 prompts
        of_layers = [
            (cosine[4 * a + b, 4 * c + d], [cosine[4 * a + b, 4 * c + e] for e in range(4) if e != d])
            for (a, b), (c, d) in strongest
        ]
        wanted[f"backups-{kind}-cosine"] = np.mean([own for own, _ in of_layers])
        wanted[f"backups-{kind}-cosine-same-layer"] = np.mean([np.mean(rest) for _, rest in of_layers])
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(wanted)
    assert alike["m"]["same-head"].value == growth.shared()[1].value


def test_names_of_selections_are_those_of_the_measurement():
    assert SELECTED == (TOP, CONTROL)
