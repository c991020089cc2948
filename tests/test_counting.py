"""Notebook 07's numbers: points of the multiverse and slopes by plain loops, claims on sweeps whose repair is known."""

import math
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from fake_sweeps import FRACTION, HEADS, LAYERS, PROMPTS, counted, fake_sweep, floor, tokens_of

from selfrepair.analysis import breakdown, counting, mirror
from selfrepair.analysis.breakdown import SUMS, WAYS
from selfrepair.analysis.claims import claims_table
from selfrepair.analysis.estimates import draws
from selfrepair.paths import PUBLISHED
from selfrepair.plots import counting as plots

LATER = range(LAYERS // 2, LAYERS)


def with_sums(rows):
    return [row | {name: sum(row[part] for part in parts) for name, parts in SUMS.items()} for row in rows]


def by_loops(sweep, prompts=range(PROMPTS)):
    """Every part each way: means over the heads of the later layers, ratio of means over all their tokens."""
    of_heads = [with_sums(tokens_of(sweep, layer, head, prompts)) for layer in LATER for head in range(HEADS)]
    together = [row for rows in of_heads for row in rows]
    found = {}
    for part in SUMS:
        for way in WAYS[:-1]:
            found[part, way] = statistics.fmean(counted(rows, part)[way] for rows in of_heads)
        found[part, WAYS[-1]] = counted(together, part)[WAYS[-1]]
        found[part, "floor"] = statistics.fmean(floor(rows, part) for rows in of_heads)
    return found


def test_points_are_those_of_plain_loops():
    wanted = by_loops(sweep := fake_sweep())
    table = counting.points(sweep, [FRACTION], n_bootstrap=20)
    assert len(table) == len(SUMS) * len(WAYS) and (table["fraction"] == FRACTION).all()
    for row in table.itertuples():
        assert row.estimate == pytest.approx(wanted[row.part, row.way], rel=1e-9), (row.part, row.way)
        assert row.floor == pytest.approx(wanted[row.part, "floor"] if row.way == "clipped" else 0)
        assert row.low <= row.high


def test_the_unclipped_mean_is_over_the_heads_that_have_one():
    """A head loses its own where the last of its tokens has a direct effect of almost 0; then all heads do."""
    sweep = fake_sweep()
    lost = (LAYERS - 1, 0)
    heads = [(layer, head) for layer in LATER for head in range(HEADS)]
    others = {part: [] for part in SUMS}
    for head in heads:
        for part, of_part in others.items():
            if head != lost:
                of_part.append(counted(with_sums(tokens_of(sweep, *head)), part)["unclipped mean"])
    for losing in ([lost], heads):
        for head in losing:
            effect = sweep["direct_effect"][head].values
            last = np.argsort(-effect, axis=None)[math.ceil(FRACTION * effect.size) - 1]
            effect[effect < effect.flat[last]] = -1
            effect.flat[last] = 0.0005
        table = counting.points(sweep, [FRACTION], n_bootstrap=5)
        for row in table[table["way"] == "unclipped mean"].itertuples():
            if losing == heads:
                assert np.isnan([row.estimate, row.low, row.high]).all()
            else:
                assert row.estimate == pytest.approx(statistics.fmean(others[row.part]), rel=1e-9)
        assert table[table["way"] != "unclipped mean"][["estimate", "low", "high"]].notna().all(axis=None)


def test_every_kind_and_fraction_is_there_once():
    kinds = {"resample": fake_sweep(0), "optimal": fake_sweep(1, ablation="optimal")}
    table = counting.multiverse(kinds)
    combinations = table.groupby(["kind", "fraction", "way", "part"]).size()
    assert len(combinations) == 2 * len(counting.FRACTIONS) * len(WAYS) * len(SUMS) == len(table)
    assert (combinations == 1).all()


def test_medians_of_many_tokens_are_those_of_repeated_tokens():
    """In every draw, to the last bit: the lower of two middle values."""
    rng = np.random.default_rng(0)
    ratio = rng.normal(size=(1, 3, 5, 200)).round(2)
    defined = rng.random(ratio.shape) < [[[[1.0]], [[0.3]], [[0.0]]]]
    weights = draws(5, 30, seed=1)
    found = breakdown._medians(ratio, defined, weights)
    for head in (0, 1):
        for draw, counts in enumerate(weights.astype(int)):
            values = [ratio[0, head, p][defined[0, head, p]] for p in range(5) for _ in range(counts[p])]
            assert found[0, head, draw] == statistics.median_low(np.concatenate(values))
    assert np.isnan(found[0, 2]).all()


def one_kind(name, clipped, part="layernorm", kind="x"):
    """Rows of a multiverse, of one model: ``clipped`` are (fraction, estimate, low, high, floor)."""
    names = ("fraction", "estimate", "low", "high", "floor")
    rows = [dict(zip(names, row, strict=True)) | {"way": "clipped"} for row in clipped]
    rows += [{"fraction": f, "estimate": 10 * f, "way": way} for f, *_ in clipped for way in WAYS[1:]]
    return {name: pd.DataFrame(rows).assign(part=part, kind=kind)}


def test_a_clipped_share_rises_and_falls_with_the_tokens():
    """By hand: "falls" needs intervals that do not touch, and is about its own part and kind alone."""
    first = (0.001, 0.1, 0.0, 0.2, 0.05)
    universes = {
        **one_kind("falls", [(1, 0.2, 0.15, 0.25, 0.4), first, (0.25, 0.4, 0.3, 0.5, 0.3)]),
        **one_kind("may not", [first, (0.25, 0.4, 0.3, 0.5, 0.3), (1, 0.2, 0.1, 0.31, 0.4)]),
    }
    other = one_kind("other", [first, (0.25, 9, 9, 9, 9), (1, 0, 0, 0, 0)], part="heads")["other"]
    universes["falls"] = pd.concat([other, universes["falls"], other.assign(part="layernorm", kind="y")])
    table = counting.clipped_course(universes, "layernorm", "x")
    assert table.index.tolist() == ["falls", "may not"] and table["falls"].tolist() == [True, False]
    assert table["rise"].tolist() == pytest.approx([0.3, 0.3])
    assert table["floor's rise"].tolist() == pytest.approx([0.25, 0.25])
    assert table["floor's rise after"].tolist() == pytest.approx([0.1, 0.1])
    wide = counting.by_way(universes["falls"], "layernorm", "x")
    assert wide.columns.tolist() == list(WAYS) and wide.index.tolist() == [0.001, 0.25, 1]
    assert wide.loc[0.25].tolist() == pytest.approx([0.4, 2.5, 2.5, 2.5])


def test_heads_without_an_unclipped_mean_are_counted_as_plain_loops_do():
    """One effect of almost 0 among a head's tokens is enough; beyond them, or in early layers, it is not."""
    sweep = fake_sweep()
    effect = sweep["direct_effect"].values
    effect[np.abs(effect) < 0.01] = 0.01
    assert counting.without_unclipped_mean(sweep, 1) == (0, len(LATER) * HEADS)
    effect[0, :, 0, 0] = 0.0  # an early layer
    for head in range(HEADS):
        order = np.argsort(-effect[LAYERS - 1, head], axis=None)
        n_tokens = math.ceil(FRACTION * order.size)
        effect[LAYERS - 1, head].flat[order[n_tokens + head - 1 :]] -= 100
        effect[LAYERS - 1, head].flat[order[n_tokens + head - 1]] = -0.0005 if head else 0.0005
    for fraction in (FRACTION, 1):
        wanted = 0
        for layer in LATER:
            for head in range(HEADS):
                of_head = sorted(effect[layer, head].ravel().astype(float), reverse=True)
                tokens = of_head[: math.ceil(fraction * len(of_head))]
                wanted += any(abs(one) < 0.001 for one in tokens)
        assert counting.without_unclipped_mean(sweep, fraction) == (wanted, len(LATER) * HEADS)
        assert wanted == (1 if fraction == FRACTION else HEADS)


def test_main_effects_by_hand():
    one, two = np.array([0.0, 3.0, 6.0]), np.array([-1.0, 1.0])
    added = one[:, None] + two
    assert counting.main_effects(added) == pytest.approx([36 / 42, 6 / 42])
    assert counting.main_effects(np.array([[1.0, -1.0], [-1.0, 1.0]])) == [0, 0]
    assert np.isnan(counting.main_effects(np.ones((2, 2)))).all()
    assert np.isnan(counting.main_effects(np.array([[1.0, np.nan], [0, 2]]))).all()


def test_variance_is_of_all_combinations_in_whatever_order():
    effect = {"fraction": {0.01: 0.0, 1: 5.0}, "way": {"a": -2, "b": 2}, "kind": {"x": 0, "y": 0}}
    rows = [
        {"part": part, "fraction": f, "way": w, "kind": k, "estimate": number * (of_f + of_w + of_k)}
        for number, part in enumerate(SUMS, start=1)
        for f, of_f in effect["fraction"].items()
        for w, of_w in effect["way"].items()
        for k, of_k in effect["kind"].items()
    ]
    table = pd.DataFrame(rows).sample(frac=1, random_state=0)
    found = counting.variance_explained(table, counting.CHOICES, most=1).set_index("part")
    for number, part in enumerate(SUMS, start=1):
        row = found.loc[part]
        assert row[list(counting.CHOICES.values())].tolist() == pytest.approx([25 / 41, 16 / 41, 0])
        assert row["choices together"] == pytest.approx(0) and row["largest"] == 7 * number
        assert row["least"] == -2 * number
    few = counting.variance_explained(table, counting.CHOICES, most=0.5).set_index("part")
    assert few.loc["heads"].tolist()[:3] == pytest.approx([0, 1, 0])
    one_kind = counting.variance_of_models({"m": table[table["kind"] == "x"]}, most=1)
    assert one_kind["kind of ablation"].isna().all() and one_kind["way of counting"].notna().all()


def fake_draws(repairs):
    """Sweeps of one layer and head, by draw; what they repair by heads on each token."""
    dims = ("layer", "head", "prompt", "position")
    effect = np.ones(np.shape(repairs)[1:])
    zero = np.zeros_like(effect)
    sweeps = {}
    for draw, repair in enumerate(repairs):
        values = {"direct_effect": effect, "ablated_direct_effect": zero, "self_repair_mlps": zero}
        values |= {"logit_change": repair - effect, "self_repair_heads": repair}
        sweeps[draw] = xr.Dataset({name: (dims, value[None, None]) for name, value in values.items()})
        sweeps[draw].attrs["model"] = "fake"
    return sweeps


def test_what_hangs_on_donors_by_hand():
    """Two draws of two tokens: of the sum of squares 20 around the mean 3, 2 + 2 lies within tokens."""
    sweeps = fake_draws(np.array([[[0.0, 4.0]], [[2.0, 6.0]]]))
    found = counting.donors_matter(sweeps, 1)
    assert found["model"] == pytest.approx(2.0)
    assert found["tokens"] == pytest.approx(2 / (20 / 3))
    same = fake_draws(np.array([[[0.0, 4.0]], [[0.0, 4.0]]]))
    assert counting.donors_matter(same, 1) == {"model": 0, "tokens": 0}
    table = counting.donors_table({"a": sweeps, "b": {}}, 1)
    assert table["model"].tolist() == ["a"] and table["draws"].tolist() == [2]


def test_what_hangs_on_donors_by_loops():
    """On the tokens of the first draw for a head's variance, on each draw's own for the model's share."""
    sweeps = {draw: fake_sweep(draw) for draw in (0, 1, 2)}
    found = counting.donors_matter(sweeps, FRACTION)
    of_heads, shares = [], []
    for sweep in sweeps.values():
        rows = [row for layer in LATER for head in range(HEADS) for row in tokens_of(sweep, layer, head)]
        lost = sum(row["direct_effect"] for row in rows)
        shares.append(sum(row["heads"] + row["mlps"] + row["layernorm"] for row in rows) / lost)
    for layer in LATER:
        for head in range(HEADS):
            order = np.argsort(-sweeps[0]["direct_effect"].values[layer, head].ravel())
            top = order[: math.ceil(FRACTION * order.size)]
            repair = np.array(
                [
                    (one["logit_change"] - one["ablated_direct_effect"] + one["direct_effect"])
                    .values[layer, head]
                    .ravel()[top]
                    for one in sweeps.values()
                ]
            )
            within = np.mean([np.var(of_token, ddof=1) for of_token in repair.T])
            of_heads.append(within / np.var(repair.ravel(), ddof=1))
    assert found == pytest.approx({"model": max(shares) - min(shares), "tokens": np.mean(of_heads)})


def test_the_norms_clipped_share_is_above_its_own_floor():
    sweep = fake_sweep()
    found = mirror.counting_statistics(sweep, FRACTION, 3)["layernorm-clipped-above-floor"]
    rows = [tokens_of(sweep, layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    above = [counted(one, "layernorm")["clipped"] - floor(one, "layernorm") for one in rows]
    assert found.value == pytest.approx(statistics.fmean(above))


def test_other_donors_stand_beside_the_own_on_the_same_prompts():
    sweep = fake_sweep().assign_coords(prompt=range(PROMPTS))
    again = xr.concat([sweep.isel(prompt=[0, 1])] * 2, "draw").assign_coords(draw=[1, 2])
    found = counting.with_draws({"resample": sweep}, again)
    assert list(found) == [0, 1, 2] and all(one.sizes["prompt"] == 2 for one in found.values())
    xr.testing.assert_equal(found[0], sweep.isel(prompt=[0, 1]))
    assert list(counting.with_draws({"zero": sweep}, again)) == [1, 2]
    assert counting.with_draws({"resample": sweep}, None) == {}
    assert counting.multiverse_of_draws({}) is None
    table = counting.multiverse_of_draws(found)
    assert table["low"].isna().all() and sorted(table["draw"].unique()) == [0, 1, 2]
    assert (table["n_prompts"] == 2).all()


def test_released_points_are_the_files():
    table = counting.released_points().set_index(["model", "fraction", "way", "part"])["estimate"]
    rows = pd.read_csv(PUBLISHED / "published_head_breakdown_top2pct.csv").query("model == 'gpt2-small'")
    later = rows[rows["layer"] >= 6]
    assert table["gpt2-small", 0.02, "clipped", "heads"] == pytest.approx(later["clipped_share_heads"].mean())
    both = (later["self_repair_heads"] + later["self_repair_mlps"]).sum() / later["direct_effect"].sum()
    assert table["gpt2-small", 0.02, "ratio of means", "norm frozen"] == pytest.approx(both)
    assert ("gpt2-small", 1, "clipped", "heads") not in table.index
    assert ("pythia-160m", 1, "ratio of means", "mlps") in table.index


def test_the_bottom_is_the_most_negative_tokens():
    sweep = fake_sweep()
    ends = mirror.both_ends({"fake": sweep}, FRACTION, 10).set_index(["part", "end"])["estimate"]
    rows = [with_sums(tokens_of(mirror.mirrored(sweep), i, h)) for i in LATER for h in range(HEADS)]
    for row in (row for of_head in rows for row in of_head):
        assert row["direct_effect"] > 0  # reversed: the head hurts there
    lowest = []
    for layer in LATER:
        for head in range(HEADS):
            effect = sweep["direct_effect"].values[layer, head].ravel()
            chosen = np.argsort(effect)[: math.ceil(FRACTION * effect.size)]
            repair = sweep["self_repair_mlps"].values[layer, head].ravel()[chosen]
            lowest.append((repair.sum(), effect[chosen].sum()))
    repair, effect = np.sum(lowest, axis=0)
    assert effect < 0 and ends["mlps", mirror.BOTTOM] == pytest.approx(repair / effect)
    logits = mirror.logits_at_both_ends({"fake": sweep}, FRACTION).set_index("end")
    n_heads, n_tokens = len(lowest), math.ceil(FRACTION * sweep["direct_effect"][0, 0].size)
    assert logits.loc["bottom", "mlps"] == pytest.approx(repair / n_heads / n_tokens)
    assert logits.loc["bottom", "direct effect"] < 0 < logits.loc["top", "direct effect"]


def test_slopes_are_least_squares_head_by_head():
    """The value, and each sample: prompts that are drawn twice count twice."""
    sweep = fake_sweep()
    found = mirror.slopes(sweep, n_bootstrap=5, seed=2)
    weights = draws(PROMPTS, 5, 2).astype(int)
    for draw, counts in enumerate(weights):
        prompts = np.repeat(np.arange(PROMPTS), counts)
        of_heads = []
        for layer in LATER:
            for head in range(HEADS):
                here = sweep.isel(layer=layer, head=head, prompt=prompts)
                lost = (here["direct_effect"] - here["ablated_direct_effect"]).values.ravel()
                repair = (here["self_repair_heads"] + here["self_repair_mlps"]).values.ravel()
                of_heads.append(np.polyfit(lost, repair, 1)[0])
        assert found["norm frozen"].drawn[draw] == pytest.approx(np.mean(of_heads))


def planted(norm, others, seed=0):
    """A sweep in which the norm's part and that of heads are these functions of the lost direct effect."""
    rng = np.random.default_rng(seed)
    shape = (4, 2, 12, 60)
    effect, noise = rng.normal(0, 1, shape), rng.normal(0, 0.05, (2, *shape))
    heads, layernorm = others(effect) + noise[0], norm(effect) + noise[1]
    values = {"direct_effect": effect, "ablated_direct_effect": 0 * effect, "self_repair_heads": heads}
    values |= {"self_repair_mlps": 0 * effect, "logit_change": heads + layernorm - effect}
    dims = ("layer", "head", "prompt", "position")
    return xr.Dataset({name: (dims, of) for name, of in values.items()}, attrs={"model": "planted"})


NOISE = np.random.default_rng(5)


@pytest.mark.parametrize(
    ("norm", "others", "judged"),
    [
        (lambda lost: 0.3 * lost, lambda lost: 0.2 * lost, ("yes", "yes", "yes")),
        (lambda lost: 0.6 + 0 * lost, lambda lost: -0.2 * lost, ("yes", "no", "no")),
        (
            lambda lost: 0.3 * NOISE.normal(size=lost.shape),
            lambda lost: NOISE.normal(size=lost.shape),
            ("no", "open", "open"),
        ),
    ],
    ids=("repairs", "amplifies", "does neither"),
)
def test_claims_hold_where_they_were_planted(norm, others, judged):
    table = claims_table("07", mirror.claimed({"planted": planted(norm, others)}, 0.1))
    assert table["claim"].tolist() == ["clipped-above-floor", "repairs-both-ways", "repair-proportional"]
    assert tuple(table["holds"]) == judged


def test_table_of_both_ends_and_slopes():
    sweeps = {name: fake_sweep(seed) for seed, name in enumerate("ba")}
    ends, slopes = mirror.both_ends(sweeps, FRACTION, 5), mirror.slopes_table(sweeps)
    table = mirror.ratio_and_slope(ends, slopes)
    assert table["model"].tolist() == ["b", "b", "a", "a"]
    row = table.iloc[3]
    assert row["part"] == "norm frozen"
    assert row["slope"] == pytest.approx(mirror.slopes(sweeps["a"], 5)["norm frozen"].value)
    assert row["top"] == pytest.approx(
        ends.query("model == 'a' and part == 'norm frozen'")["estimate"].iloc[0]
    )


def test_a_side_of_zero_takes_a_whole_interval():
    rows = [("up", 0.1, 0.3), ("over", -0.1, 0.3), ("down", -0.3, -0.1), ("touches", 0.0, 0.2)]
    table = pd.DataFrame(rows, columns=["model", "low", "high"]).assign(part="mlps")
    table = pd.concat([table, table.assign(part="heads", low=1, high=2)])
    wanted = {"above": ["up"], "below": ["down"], "open": ["over", "touches"]}
    assert mirror.sides(table, "mlps") == wanted


@pytest.fixture
def drawn():
    """Figures that the test makes are closed after it."""
    yield
    plt.close("all")


@pytest.mark.slow("the figure of all ways of counting shows every point")
def test_multiverse_figure_shows_every_point(drawn):
    table = counting.multiverse({"resample": fake_sweep(0), "another kind": fake_sweep(1)})
    draws_of_donors = counting.multiverse_of_draws({0: fake_sweep(2), 1: fake_sweep(3)})
    figure = plots.multiverse_figure(table, draws_of_donors)
    panels = np.array(figure.axes).reshape(len(SUMS), len(WAYS))
    for row, part in zip(panels, SUMS, strict=True):
        for axis, way in zip(row, WAYS, strict=True):
            here = table[(table["part"] == part) & (table["way"] == way)]
            lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
            shown = {one.get_label(): one.lines[0].get_ydata() for one in axis.containers}
            for kind, rows in here.groupby("kind"):
                np.testing.assert_allclose(shown[kind], rows.sort_values("fraction")["estimate"])
            assert ("floor: signs at random (0 where not clipped)" in lines) == (way == "clipped")
            assert f"resample, 2 choices of donors, {PROMPTS} of the prompts" in lines


def test_bars_of_every_way_end_where_intervals_do(drawn):
    rows = [
        {"part": part, "way": way, "fraction": fraction, "kind": "resample", "floor": 0.0}
        | {"estimate": 0.2 + fraction, "low": 0.1 + fraction, "high": 0.5 + fraction}
        for part in SUMS
        for way in WAYS
        for fraction in (0.01, 0.1)
    ]
    figure = plots.multiverse_figure(pd.DataFrame(rows), None)
    assert len(figure.axes) == len(SUMS) * len(WAYS)
    for axis in figure.axes:
        ends = [bar[:, 1] for bar in axis.containers[0][2][0].get_segments()]
        np.testing.assert_allclose(ends, [[0.11, 0.51], [0.2, 0.6]])


def test_released_figure_says_what_was_not_released(drawn):
    figure = plots.released_figure(counting.released_points())
    said = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert said == ["not released"] * 2


def test_both_ends_figure_shows_top_bottom_and_slopes(drawn):
    sweeps = {name: fake_sweep(seed) for seed, name in enumerate("ba")}
    ends, slopes = mirror.both_ends(sweeps, FRACTION, 5), mirror.slopes_table(sweeps)
    figure = plots.both_ends_figure(ends, slopes)
    tables = [ends[ends["end"] == mirror.TOP], ends[ends["end"] == mirror.BOTTOM], slopes]
    for axis, table in zip(figure.axes, tables, strict=True):
        points = sorted(line.get_xdata()[0] for line in axis.get_lines() if line.get_marker() != "None")
        np.testing.assert_allclose(points, np.sort(table["estimate"]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["b", "a"]
