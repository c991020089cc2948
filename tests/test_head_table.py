"""Tables and means of a model's heads, and what the claims of notebook 01 are about."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from selfrepair.analysis.claims import claims_table, load_claims, verdicts
from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.head_means import HeadMeans, head_statistics
from selfrepair.analysis.head_table import (
    PARTS,
    heads_of_models,
    heads_table,
    layer_means,
    strongest_head,
    write_heads,
)
from selfrepair.analysis.published import published_heads
from selfrepair.errors import UserError

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
        assert row.share_of_means_mlps == pytest.approx(sum(mlps[i] for i in top) / sum(de[i] for i in top))
        assert row.self_repair_low < row.self_repair < row.self_repair_high


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
        assert estimate.value == pytest.approx(again[name].value) and not again[name].samples.size


def test_layer_intervals_hold_the_layer_means():
    sweep = fake_sweep()
    intervals = HeadMeans.of_sweep(sweep, 0.05, n_bootstrap=200).layer_intervals()
    means = layer_means(heads_table(sweep, 0.05))["self_repair"].to_numpy()
    assert (intervals["low"] < means).all() and (means < intervals["high"]).all()
    assert intervals["layer"].tolist() == [0, 1, 2, 3] and list(intervals) == ["layer", "low", "high"]


def test_statistics_by_hand():
    repair = np.array([[-4.0, -2], [0, 0], [1, -1], [2, 4]])
    means = HeadMeans(Estimate.bare(repair), Estimate.bare(np.full_like(repair, 2.0)))
    assert {name: estimate.value for name, estimate in head_statistics(means).items()} == {
        "self-repair-later-half": 1.5,
        "repaired-heads-later-half": 0.75,
        "restored-share-later-half": 0.75,
        "self-repair-first-quarter": -3.0,
        "self-repair-later-minus-early": 4.5,
    }


def test_statistics_have_samples_head_by_head():
    repair, effect = (np.random.default_rng(i).normal(size=(4, 2, 6)) for i in range(2))
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
        assert {name: estimate.drawn[k] for name, estimate in found.items()} == pytest.approx(wanted)


def test_claims_of_notebook_01_are_computed():
    measured = head_statistics(HeadMeans.of_sweep(fake_sweep(), 0.05, 100))
    released = head_statistics(HeadMeans.of_table(heads_table(fake_sweep(), 0.05)))
    table = claims_table("01", {"fake": measured}, {"p": released})
    found = verdicts(table)
    assert list(found) == [claim.id for claim in load_claims() if claim.notebook == "01"]
    assert set(found.values()) <= {"reproduced", "partly", "not reproduced"}
    assert len(table) == 2 * len(found) and table["estimate"].notna().all()
