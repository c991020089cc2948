"""Tables and means of a model's heads, and what the claims of notebook 01 are about."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from fake_sweeps import without_repair

from selfrepair.analysis.claims import claims_table, verdicts
from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.head_means import (
    HeadMeans,
    head_statistics,
    means_of_models,
    released_means,
    released_statistics,
    restored_table,
    statistics_of_models,
)
from selfrepair.analysis.head_table import (
    PARTS,
    extreme_heads,
    furthest_below,
    heads_of_models,
    heads_table,
    layer_means,
    restored_of_strong,
    share_in_zone,
    strong_heads,
    strongest_head,
    write_heads,
)
from selfrepair.analysis.published import published_heads
from selfrepair.analysis.rules import VERDICTS, load_claims
from selfrepair.errors import UserError
from selfrepair.plots.across_models import effect_against_change, self_repair_by_depth

NAMES = ("direct_effect", "ablated_direct_effect", "logit_change", "self_repair_heads", "self_repair_mlps")


def fake_sweep(layers=4, heads=3, prompts=10, positions=50, seed=0, model="fake"):
    rng = np.random.default_rng(seed)
    shape = (layers, heads, prompts, positions)
    data = {name: (("layer", "head", "prompt", "position"), rng.normal(size=shape)) for name in NAMES}
    return xr.Dataset(data, attrs={"model": model})


def test_heads_table_against_plain_loops():
    sweep = fake_sweep()
    table = heads_table(sweep, fraction=0.05)
    for row in table.itertuples():
        de, ade, change, heads, mlps = (sweep[name].values[row.layer, row.head].ravel() for name in NAMES)
        top = sorted(range(de.size), key=lambda i: -de[i])[:25]
        repair = [change[i] - (ade[i] - de[i]) for i in top]
        layernorm = [r - heads[i] - mlps[i] for r, i in zip(repair, top, strict=True)]
        assert row.n_tokens == 25
        assert row.self_repair == pytest.approx(sum(repair) / 25)
        assert row.direct_effect == pytest.approx(sum(de[i] for i in top) / 25)
        assert row.self_repair_layernorm == pytest.approx(sum(layernorm) / 25)
        shares = [min(1, max(0, part / de[i])) for part, i in zip(layernorm, top, strict=True)]
        assert row.clipped_share_layernorm == pytest.approx(sum(shares) / 25)
        floors = [min(1, abs(part / de[i])) / 2 for part, i in zip(layernorm, top, strict=True)]
        assert row.clipped_floor_layernorm == pytest.approx(sum(floors) / 25)
        assert row.share_of_means_mlps == pytest.approx(sum(mlps[i] for i in top) / sum(de[i] for i in top))
        assert row.self_repair_low < row.self_repair < row.self_repair_high


def test_tokens_of_one_prompt_have_no_interval():
    """Every draw of prompts gives their mean again, as if it were known exactly."""
    sweep = fake_sweep()
    sweep["direct_effect"][1, 2, 3, :10] = 100
    table = heads_table(sweep, fraction=10 / 500).set_index(["layer", "head"])
    ends = table[["self_repair_low", "self_repair_high"]]
    assert ends.loc[(1, 2)].isna().all() and np.isfinite(table.loc[(1, 2), "self_repair"])
    assert ends.drop(index=[(1, 2)]).notna().all(axis=None)


def test_parts_sum_to_self_repair():
    table = heads_table(fake_sweep())
    assert sum(table[f"self_repair_{part}"] for part in PARTS).to_numpy() == pytest.approx(
        table["self_repair"].to_numpy()
    )


def test_a_fraction_that_is_none_is_refused():
    for make in (heads_table, HeadMeans.of_sweep):
        with pytest.raises(UserError, match="fraction"):
            make(fake_sweep(), 0)


def test_columns_are_those_of_the_published_tables_and_more():
    columns = list(heads_table(fake_sweep()))
    assert [name for name in columns if name in published_heads()] == [
        name for name in published_heads() if name in columns
    ]
    assert set(published_heads()) <= set(columns)
    shares = columns.index("clipped_share_layernorm")
    assert columns[shares : shares + 6] == [
        f"clipped_{what}_{part}" for what in ("share", "floor") for part in PARTS
    ]


def test_tables_of_several_models_are_one_under_the_other_and_kept(tmp_path):
    sweeps = {"a": fake_sweep(model="a"), "b": fake_sweep(2, 5, seed=1, model="b")}
    table = heads_of_models(sweeps, 0.05)
    for name, sweep in sweeps.items():
        rows = table[table["model"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, heads_table(sweep, 0.05))
    assert table["model"].tolist() == ["a"] * 12 + ["b"] * 10 and list(table.index) == list(range(22))
    write_heads(table, "zero", tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["heads_zero.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new" / "heads_zero.csv"), table, rtol=1e-5)


def test_layer_means():
    table = pd.DataFrame(
        {"model": "m", "layer": [0, 0, 1, 1, 2, 2], "head": [0, 1] * 3, "self_repair": [1.0, 3, 0, 0, 5, 7]}
    )
    means = layer_means(table)
    assert means["self_repair"].tolist() == [2, 0, 6] and means["relative_depth"].tolist() == [0, 0.5, 1]
    assert layer_means(table[table["layer"] == 0])["relative_depth"].tolist() == [0]


def test_extreme_heads():
    table = pd.DataFrame(
        {
            "model": ["a", "a", "a", "b", "b"],
            "layer": [0, 0, 1, 0, 1],
            "head": [0, 1, 0, 0, 0],
            "self_repair": [1.0, -3, 2, 5, 4],
            "direct_effect": [1.0, 2, 3, 4, 5],
        }
    )
    found = extreme_heads(table).to_dict("list")
    assert found == {
        "model": ["a", "a", "b", "b"],
        "head": ["L0H1", "L1H0", "L1H0", "L0H0"],
        "self-repair": [-3.0, 2.0, 4.0, 5.0],
        "direct effect": [2.0, 3.0, 5.0, 4.0],
    }


def test_share_in_the_zone_of_self_repair():
    """Not on its borders: nothing repaired, nothing lost; nor with more lost than given, or something won."""
    table = pd.DataFrame({"direct_effect": 1.0, "logit_change": [-0.9, -0.1, -1, 0, -1.1, 0.5, -0.5, -3]})
    assert share_in_zone(table) == 3 / 8


def test_what_is_restored_of_strong_heads_of_the_later_half():
    table = pd.DataFrame(
        {
            "model": list("aaaabb"),
            "layer": [0, 1, 2, 3, 0, 1],
            "direct_effect": [9.0, 9, 2, 0.5, 9, 4],
            "self_repair": [-9.0, -9, 1, 5, -9, 0.5],
        }
    )
    assert restored_of_strong(table) == 1.5 / 6
    assert np.isnan(restored_of_strong(table, least=4.0))
    assert strong_heads(table).index.tolist() == [2, 5] and strong_heads(table, least=4.0).empty


def test_heads_furthest_below_the_line_of_no_repair():
    table = pd.DataFrame(
        {
            "model": list("aaaabb"),
            "layer": [0, 1, 2, 3, 0, 1],
            "head": [0, 0, 0, 0, 3, 4],
            "direct_effect": [1.0, 2, 2, 0.5, 1, 2],
            "logit_change": [-1.5, -2.25, -2.75, 0, -0.5, -1.75],
        }
    )
    found = furthest_below(table).to_dict("records")
    assert found == [
        {"model": "a", "layer": 2, "head": 0, "above": -0.75, "is_later": True},
        {"model": "b", "layer": 1, "head": 4, "above": 0.25, "is_later": True},
    ]


def test_strongest_head():
    table = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "direct_effect": [1.0, 2, 4, 3]})
    assert strongest_head(table, 0) == (0, 1) and strongest_head(table, -1) == (1, 0)


def test_published_numbers_say_what_the_design_recalls():
    heads = published_heads()
    shares = heads.groupby("model")["clipped_share_layernorm"].mean()
    for model, share in {
        "pythia-160m": 0.34,
        "gpt2-small": 0.32,
        "pythia-410m": 0.25,
        "gpt2-medium": 0.30,
    }.items():
        assert shares[model] == pytest.approx(share, abs=0.01)
    for _, rows in heads.groupby("model"):
        assert 0.745 <= head_statistics(HeadMeans.of_table(rows))["repaired-heads-later-half"].value <= 0.985
        later = rows[rows["layer"] >= (rows["layer"].max() + 1) / 2]
        assert 0.295 <= (later["self_repair"] / later["direct_effect"]).median() <= 0.465


def test_head_means_of_a_sweep_equal_the_table():
    sweep = fake_sweep()
    means = HeadMeans.of_sweep(sweep, 0.05, n_bootstrap=50)
    table = heads_table(sweep, 0.05, n_bootstrap=50)
    for name in ("self_repair", "direct_effect"):
        assert np.ravel(getattr(means, name).value) == pytest.approx(table[name].to_numpy())
    for end, values in zip(("low", "high"), means.self_repair.interval(), strict=True):
        assert np.array_equal(table[f"self_repair_{end}"], values.ravel())
    again = head_statistics(HeadMeans.of_table(table.sample(frac=1, random_state=0)))
    for name, estimate in head_statistics(means).items():
        assert estimate.value == pytest.approx(again[name].value, nan_ok=True)
        assert not again[name].samples.size


def test_means_of_several_models_are_those_of_each():
    sweeps = {"a": fake_sweep(model="a"), "b": fake_sweep(5, 2, seed=1, model="b")}
    means = means_of_models(sweeps, 0.05)
    assert list(means) == ["a", "b"]
    for model, sweep in sweeps.items():
        alone = HeadMeans.of_sweep(sweep, 0.05)
        assert np.array_equal(means[model].self_repair.drawn, alone.self_repair.drawn)
        wanted = head_statistics(alone)
        found = {name: one.value for name, one in statistics_of_models(means)[model].items()}
        same = pytest.approx({name: one.value for name, one in wanted.items()}, rel=0, abs=0, nan_ok=True)
        assert found == same


def test_layer_intervals_hold_the_layer_means():
    sweep = fake_sweep()
    intervals = HeadMeans.of_sweep(sweep, 0.05, n_bootstrap=200).layer_intervals()
    means = layer_means(heads_table(sweep, 0.05))["self_repair"].to_numpy()
    assert (intervals["low"] < means).all() and (means < intervals["high"]).all()
    assert intervals["layer"].tolist() == [0, 1, 2, 3] and list(intervals) == ["layer", "low", "high"]


def test_statistics_by_hand():
    repair = np.array([[-4.0, -2], [0, 0], [1, -1], [2, 4]])
    means = HeadMeans(Estimate.bare(repair), Estimate.bare(np.full_like(repair, 2.0)))
    found = {name: estimate.value for name, estimate in head_statistics(means).items()}
    assert np.isnan(found.pop("self-repair-later-minus-early-of-orders"))
    assert found == {
        "self-repair-later-half": 1.5,
        "repaired-heads-later-half": 0.75,
        "restored-share-later-half": 0.75,
        "self-repair-first-quarter": -3.0,
        "self-repair-later-minus-early": 4.5,
    }


def test_released_statistics_stand_beside_the_top_2_percent_alone():
    found, wanted = released_statistics(0.02), statistics_of_models(released_means())
    assert list(found) == list(wanted) and len(found) == 4
    for model, of_model in found.items():
        assert {name: one.value for name, one in of_model.items()} == {
            name: one.value for name, one in wanted[model].items()
        }
    assert released_statistics(1) == released_statistics(0.1) == {}


def test_what_is_restored_over_top_and_all_tokens_as_released():
    """Of the later half of layers; no share where the direct effects do not sum to more than 0."""
    top, everywhere = (
        restored_table(released_means(tokens)).set_index("model") for tokens in ("top2pct", "all_tokens")
    )
    assert top["share"].round(2).to_dict() == {
        "gpt2-small": 0.39,
        "gpt2-medium": 0.43,
        "pythia-160m": 0.27,
        "pythia-410m": 0.51,
    }
    assert everywhere["share"].round(2).to_dict() == {"gpt2-small": -0.44, "pythia-160m": -0.36}
    rows = published_heads("all_tokens").query("model == 'gpt2-small' and layer >= 6")
    assert everywhere.loc["gpt2-small", "self-repair"] == pytest.approx(sum(rows["self_repair"]) / 72)
    assert everywhere.loc["gpt2-small", "direct effect"] == pytest.approx(sum(rows["direct_effect"]) / 72)
    assert everywhere[["low", "high"]].isna().all(axis=None)

    repair, effect = np.array([[[1.0, 2]], [[1, 3]]]), np.array([[[5.0, 5]], [[-1, 6]]])
    found = restored_table({"m": HeadMeans(Estimate(repair), Estimate(effect))}).iloc[0]
    assert (found["direct effect"], found["self-repair"]) == (-1, 1) and np.isnan(found["share"])
    assert (found["low"], found["high"]) == (0.5, 0.5)


def test_statistics_have_samples_head_by_head():
    repair, effect = (np.random.default_rng(i).normal(i, 0.3 + i, (4, 2, 6)) for i in range(2))
    effect = np.abs(effect)
    repair[2, 0, 3] = effect[2, 0, 3] = np.nan  # a head that has no tokens in a draw
    found = head_statistics(HeadMeans(Estimate(repair), Estimate(effect)))
    for k in range(6):
        later = [
            (repair[i, j, k], effect[i, j, k])
            for i in (2, 3)
            for j in (0, 1)
            if not np.isnan(repair[i, j, k])
        ]
        early = [repair[0, j, k] for j in (0, 1)]
        wanted = {
            "self-repair-later-half": sum(r for r, _ in later) / len(later),
            "repaired-heads-later-half": sum(r > 0 for r, _ in later) / 4,
            "restored-share-later-half": sum(r for r, _ in later) / sum(e for _, e in later),
            "self-repair-first-quarter": sum(early) / 2,
            "self-repair-later-minus-early": sum(r for r, _ in later) / len(later) - sum(early) / 2,
        }
        assert {name: found[name].drawn[k] for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("n_layers", [3, 4, 5, 6])
def test_later_minus_early_against_layers_in_every_order(n_layers):
    """By loops over all orders, of every sample; up to four layers there are too few orders."""
    repair = np.random.default_rng(n_layers).normal(size=(n_layers, 2, 3))
    found = head_statistics(HeadMeans(Estimate(repair), Estimate(np.ones_like(repair))))
    n_later, n_early = {3: (1, 1), 4: (2, 1), 5: (3, 1), 6: (3, 2)}[n_layers]
    for k in range(3):
        of_layer = [(one[k] + other[k]) / 2 for one, other in repair]
        gaps = []
        for order in itertools.permutations(of_layer):
            gaps.append(sum(order[-n_later:]) / n_later - sum(order[:n_early]) / n_early)
        assert found["self-repair-later-minus-early"].drawn[k] == pytest.approx(gaps[0])
        end = min(v for v in gaps if sum(w > v + 1e-12 for w in gaps) <= len(gaps) / 20)
        wanted = end if max(gaps) > end + 1e-12 else np.nan
        control = found["self-repair-later-minus-early-of-orders"].drawn[k]
        assert control == pytest.approx(wanted, nan_ok=True) and np.isnan(control) == (n_layers <= 4)


@pytest.mark.parametrize(("n_layers", "n_early"), [(1, 1), (2, 1), (4, 1), (6, 2), (12, 3), (24, 6)])
def test_a_quarter_of_the_layers_is_rounded_but_never_none(n_layers, n_early):
    repair = np.arange(n_layers, dtype=float)[:, None, None]
    found = head_statistics(HeadMeans(Estimate(repair), Estimate(np.ones_like(repair))))
    assert found["self-repair-first-quarter"].value == sum(range(n_early)) / n_early


def test_claims_of_notebook_01_are_computed():
    measured = head_statistics(HeadMeans.of_sweep(fake_sweep(), 0.05, 100))
    released = head_statistics(HeadMeans.of_table(heads_table(fake_sweep(), 0.05)))
    table = claims_table("01", {"fake": measured}, {"p": released})
    found = verdicts(table)
    assert list(found) == [claim.id for claim in load_claims() if claim.notebook == "01"]
    assert set(found.values()) <= set(VERDICTS) - {"not testable here"}
    assert len(table) == 2 * len(found) and table["estimate"].notna().all()


def test_a_model_without_repair_reproduces_nothing():
    """Noise of no sign in the place of self-repair: every rule of notebook 01 is met by chance at most."""
    measured = {f"model {i}": head_statistics(HeadMeans.of_sweep(without_repair(i), 0.1)) for i in range(4)}
    assert set(verdicts(claims_table("01", measured)).values()) <= {"undecided", "not reproduced"}


# --- the figure of all heads ---


def test_panels_share_one_linear_scale_and_tails_are_at_its_edge():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        [(m, layer, h, rng.normal()) for m in "ab" for layer in range(3) for h in range(40)],
        columns=["model", "layer", "head", "self_repair"],
    )
    far = table.assign(model="far " + table["model"])
    far.loc[0, "self_repair"], far.loc[1, "self_repair"] = 1000, -500
    measured = HeadMeans(Estimate(rng.normal(size=(3, 40, 50))), Estimate(np.ones((3, 40, 50))))
    figure = self_repair_by_depth({"measured": table, "published": far}, {"a": measured})
    left, right = figure.axes
    bars = [
        segment
        for part in left.collections
        if hasattr(part, "get_segments")
        for segment in part.get_segments()
    ]
    assert [(bar[0][1], bar[1][1]) for bar in bars] == [
        pytest.approx((low, high)) for _, low, high in measured.layer_intervals().itertuples(index=False)
    ]
    assert not any(hasattr(part, "get_segments") for part in right.collections)
    assert left.get_ylim() == right.get_ylim() and left.get_yscale() == "linear"
    for axis, shown in ((left, table), (right, far)):
        low, high = axis.get_ylim()
        offsets = [part.get_offsets().data for part in axis.collections if part.get_offsets().size]
        points = np.concatenate([one for one in offsets if np.abs(one).max()])
        inside = points[(points[:, 1] > low) & (points[:, 1] < high), 1]
        wanted = shown["self_repair"][shown["self_repair"].between(low, high)]
        assert sorted(inside) == pytest.approx(sorted(wanted))
        by_layer = layer_means(shown)
        means = [rows["self_repair"] for _, rows in by_layer.groupby("model", sort=False)]
        drawn = [line.get_ydata() for line in axis.lines if line.get_label() in set(shown["model"])]
        assert [list(line) for line in drawn] == [pytest.approx(list(mean)) for mean in means]
        assert all(low < value < high for mean in means for value in mean)
        beyond = int((shown["self_repair"] > high).sum()), int((shown["self_repair"] < low).sum())
        assert ((points[:, 1] == high).sum(), (points[:, 1] == low).sum()) == beyond
    plt.close(figure)


def test_heads_stand_against_the_line_of_no_repair():
    """Below 0 by as much as the direct effect."""
    table = pd.DataFrame({"model": "m", "direct_effect": [0.1, 0.5, 2.0], "logit_change": [0.0, -0.2, -1.0]})
    (axis,) = effect_against_change({"measured": table}).axes
    (line,) = (line for line in axis.lines if "no repair" in line.get_label())
    assert (line.get_ydata() == -line.get_xdata()).all() and max(line.get_xdata()) >= 2
    (heads,) = (one for one in axis.collections if one.get_label() == "m")
    np.testing.assert_allclose(heads.get_offsets(), table[["direct_effect", "logit_change"]])
    plt.close("all")
