import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from selfrepair.analysis.head_table import PARTS, heads_table, layer_means
from selfrepair.analysis.claims import Claim, claims_table, judge, load_claims, to_markdown, verdict
from selfrepair.errors import UserError
from selfrepair.analysis.head_means import HeadMeans, head_statistics
from selfrepair.analysis.published import published_heads
from selfrepair.statistics import bootstrap_ratio, bootstrap_weights, clipped_share, select_top

RNG = np.random.default_rng(0)
NAMES = ("direct_effect", "ablated_direct_effect", "logit_change", "self_repair_heads", "self_repair_mlps")


def fake_sweep(layers=4, heads=3, prompts=10, positions=50, seed=0):
    rng = np.random.default_rng(seed)
    shape = (layers, heads, prompts, positions)
    data = {name: (("layer", "head", "prompt", "position"), rng.normal(size=shape)) for name in NAMES}
    return xr.Dataset(data, attrs={"model": "fake"})


@given(st.integers(1, 6), st.integers(1, 30), st.floats(0.001, 1), st.integers(0, 9))
def test_selection_takes_the_largest(prompts, positions, fraction, seed):
    effect = np.random.default_rng(seed).integers(-3, 3, (prompts, positions)).astype(float)
    chosen = select_top(effect, fraction)
    assert chosen.shape == effect.shape
    assert chosen.sum() == max(1, int(np.ceil(fraction * effect.size - 1e-9)))
    if not chosen.all():
        assert effect[chosen].min() >= effect[~chosen].max()


def test_whole_fraction_is_all_tokens():
    assert select_top(RNG.normal(size=(3, 4)), 1).all()
    for fraction in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(UserError, match="fraction"):
            select_top(np.ones((2, 2)), fraction)


def test_clipped_share_by_hand():
    part, effect = np.array([1.0, 3.0, -1.0, 1.0, -1.0]), np.array([2.0, 2.0, 2.0, 0.0, -2.0])
    assert clipped_share(part, effect).tolist() == [0.5, 1.0, 0.0, 0.0, 0.5]


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
    assert sum(table[f"self_repair_{part}"] for part in PARTS).to_numpy() == pytest.approx(table["self_repair"].to_numpy())


def test_bootstrap_interval_covers_like_the_standard_error():
    values = RNG.normal(2.0, 1.0, size=200)
    low, high = bootstrap_ratio(values, np.ones(200), bootstrap_weights(200, 4000, seed=1))
    error = values.std() / np.sqrt(200)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_bootstrap_draws_whole_prompts():
    # tokens of a prompt are copies of each other: the interval must be that of 20 values, not of 2,000
    values = np.repeat(RNG.normal(size=20)[:, None], 100, axis=1)
    low, high = bootstrap_ratio(values.sum(1), np.full(20, 100.0), bootstrap_weights(20, 4000))
    error = values[:, 0].std() / np.sqrt(20)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_bootstrap_is_seeded():
    assert np.array_equal(bootstrap_weights(7, 5, 1), bootstrap_weights(7, 5, 1))
    assert not np.array_equal(bootstrap_weights(7, 5, 1), bootstrap_weights(7, 5, 2))
    assert (bootstrap_weights(7, 50).sum(1) == 7).all()


def test_layer_means():
    table = pd.DataFrame({"model": "m", "layer": [0, 0, 1, 1, 2, 2], "head": [0, 1] * 3, "self_repair": [1.0, 3, 0, 0, 5, 7]})
    means = layer_means(table)
    assert means["self_repair"].tolist() == [2, 0, 6] and means["relative_depth"].tolist() == [0, 0.5, 1]


def test_published_numbers_say_what_the_design_recalls():
    heads = published_heads()
    shares = heads.groupby("model")["clipped_share_layernorm"].mean()
    for model, share in {"pythia-160m": 0.34, "gpt2-small": 0.32, "pythia-410m": 0.25, "gpt2-medium": 0.30}.items():
        assert shares[model] == pytest.approx(share, abs=0.01)
    positive = "share of heads with positive self-repair, later half of layers"
    for _, rows in heads.groupby("model"):
        assert 0.745 <= head_statistics(HeadMeans.of_table(rows))[positive][0] <= 0.985
        later = rows[rows["layer"] >= (rows["layer"].max() + 1) / 2]
        assert 0.295 <= (later["self_repair"] / later["direct_effect"]).median() <= 0.465


def test_head_means_of_a_sweep_equal_the_table():
    sweep = fake_sweep()
    means = HeadMeans.of_sweep(sweep, 0.05, n_bootstrap=50)
    table = heads_table(sweep, 0.05)
    assert means.self_repair[..., 0].ravel() == pytest.approx(table["self_repair"].to_numpy())
    again = head_statistics(HeadMeans.of_table(table))
    for name, samples in head_statistics(means).items():
        assert samples[0] == pytest.approx(again[name][0])


def test_layer_intervals_hold_the_layer_means():
    sweep = fake_sweep()
    intervals = HeadMeans.of_sweep(sweep, 0.05, n_bootstrap=200).layer_intervals()
    means = layer_means(heads_table(sweep, 0.05))["self_repair"].to_numpy()
    assert (intervals["low"] < means).all() and (means < intervals["high"]).all()
    assert intervals["layer"].tolist() == [0, 1, 2, 3]


def test_statistics_by_hand():
    repair = np.array([[-4.0, -2], [0, 0], [1, -1], [2, 4]])[..., None]
    means = HeadMeans(repair, np.full_like(repair, 2.0))
    assert {name: samples[0] for name, samples in head_statistics(means).items()} == {
        "mean self-repair, later half of layers": 1.5,
        "share of heads with positive self-repair, later half of layers": 0.75,
        "self-repair over direct effect, later half of layers": 0.75,
        "mean self-repair, first quarter of layers": -3.0,
        "mean self-repair, later half minus first quarter": 4.5,
    }


def test_rules():
    claim = Claim("x", "", "", "", "", at_least=0, at_most=1)
    assert [judge(*interval, claim) for interval in ((0.1, 0.9), (-0.1, 0.5), (0.5, 1.5), (1.1, 2), (-2, -1))] == [
        "yes",
        "open",
        "open",
        "no",
        "no",
    ]
    assert verdict(["yes", "yes"]) == "reproduced"
    assert verdict(["yes", "no"]) == verdict(["yes", "open"]) == "partly"
    assert verdict(["no", "open"]) == "not reproduced"
    assert verdict([]) == "not testable here"


def test_claims_are_complete_and_computed():
    claims = load_claims()
    assert len({claim.id for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.notebook and claim.source and claim.claim and claim.at_least < claim.at_most
    measured = head_statistics(HeadMeans.of_sweep(fake_sweep(), 0.05, 100))
    released = head_statistics(HeadMeans.of_table(heads_table(fake_sweep(), 0.05)))
    table = claims_table("01", {"fake": measured}, {"p": released})
    assert list(table["id"]) == [claim.id for claim in claims if claim.notebook == "01"]
    assert set(table["verdict"]) <= {"reproduced", "partly", "not reproduced"}
    assert len(to_markdown(table).splitlines()) == len(table) + 2
    assert set(claims_table("01", {"fake": {}})["verdict"]) == {"not testable here"}
