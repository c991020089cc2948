"""Notebook 02's numbers against plain loops over float64 passes, repeated samples and textbook formulas."""

import dataclasses
import itertools
import math
import re
import statistics
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import reference
import torch
import xarray as xr
from families import ALL_FAMILIES, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from selfrepair.analysis import token_shares
from selfrepair.analysis import token_variation as noise
from selfrepair.analysis.claims import claims_table, verdicts
from selfrepair.analysis.estimates import draws
from selfrepair.analysis.examples import (
    KINDS,
    examples_table,
    in_context,
    pick_examples,
    token_texts,
)
from selfrepair.analysis.passages import AFTER, BEFORE
from selfrepair.analysis.published import published_heads
from selfrepair.analysis.rules import VERDICTS, load_claims, load_statistics
from selfrepair.analysis.self_repair import with_self_repair
from selfrepair.errors import UserError
from selfrepair.measure import heads, pairs, probabilities
from selfrepair.measure.tokens import of_prompts
from selfrepair.models.loading import load_model
from selfrepair.paths import MODELS
from selfrepair.plots import token_variation as plots
from selfrepair.text.corpora import Prompts

FRACTION = 0.25


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error", RuntimeWarning)
        yield
    plt.close("all")


def fake_sweep(layers=4, heads=3, prompts=8, positions=40, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    names = (
        "direct_effect",
        "ablated_direct_effect",
        "logit_change",
        "self_repair_heads",
        "self_repair_mlps",
    )
    data = {
        name: (("layer", "head", "prompt", "position"), rng.normal(size=(layers, heads, prompts, positions)))
        for name in names
    }
    data["direct_effect"] = (data["direct_effect"][0], data["direct_effect"][1] + shift)
    made = xr.Dataset(data, attrs={"model": "fake", "ablation": "resample"})
    return with_self_repair(made).assign(
        probability=(("prompt", "position"), rng.uniform(size=(prompts, positions)))
    )


def measured_sweep(model, tokens, ablation):
    """As the sweep and the probabilities of a model on such prompts give it."""
    inputs = {"tokens": of_prompts(Prompts(tokens, "random"))}
    sweep = heads.MEASUREMENT.compute(model, {"ablation": ablation}, inputs, 0).assign_attrs(model=model.name)
    return noise.with_probability(sweep, probabilities.MEASUREMENT.compute(model, {}, inputs, 0))


def made_tokens(prompts=6, seed=0, sizes=(1, 7)):
    """Rows as :func:`noise.selected_tokens` gives, prompts of unequal size, positions with ties."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), rng.integers(*sizes, prompts))
    effect = rng.uniform(0.5, 3, len(prompt))
    repair = effect * rng.normal(0.3, 0.8, len(prompt)) + rng.normal(size=prompts)[prompt]
    return pd.DataFrame(
        {
            "prompt": prompt,
            "position": rng.integers(0, 5, len(prompt)),
            "direct_effect": effect,
            "self_repair": repair,
            "share": repair / effect,
            "probability": rng.uniform(size=len(prompt)),
        }
    )


def spearman(x, y):
    return float(pd.Series(x).rank().corr(pd.Series(y).rank()))


def plain_components(groups):
    """Variance between and within by sums of squares, written out (one-way, random effects, any sizes)."""
    everything = list(itertools.chain(*groups))
    k, n, grand = len(groups), len(everything), statistics.fmean(everything)
    inside = sum((x - statistics.fmean(group)) ** 2 for group in groups for x in group) / (n - k)
    outside = sum(len(group) * (statistics.fmean(group) - grand) ** 2 for group in groups) / (k - 1)
    n0 = (n - sum(len(group) ** 2 for group in groups) / n) / (k - 1)
    return (outside - inside) / n0, inside


def plain_noise(tokens):
    """Every quantity of one head, tokens being (prompt, position, direct effect, repair, probability)."""
    prompts, positions, effects, repairs, probabilities = map(list, zip(*tokens, strict=True))
    mean = statistics.fmean(effects)
    between, within = plain_components(
        [[t[3] for t in tokens if t[0] == prompt] for prompt in sorted(set(prompts))]
    )
    return {
        "share": sum(repairs) / sum(effects),
        "spread": statistics.pstdev(repairs) / mean,
        "over_corrected": sum(r > e for r, e in zip(repairs, effects, strict=True)) / len(tokens),
        "made_worse": sum(r < 0 for r in repairs) / len(tokens),
        **plain_noise_of_a_fixed_share(effects, sum(repairs) / sum(effects)),
        "within": math.sqrt(within) / mean,
        "between": math.sqrt(max(0, between)) / mean,
        "between_share": between / (between + within),
        "correlation_direct_effect": spearman(repairs, effects),
        "correlation_probability": spearman(repairs, probabilities),
        "correlation_position": spearman(repairs, positions),
    }


def plain_noise_of_a_fixed_share(effects, share):
    """The same of tokens whose repair is that share of their direct effect."""
    repairs = [share * effect for effect in effects]
    return {
        "spread_fixed": statistics.pstdev(repairs) / statistics.fmean(effects),
        "over_corrected_fixed": sum(r > e for r, e in zip(repairs, effects, strict=True)) / len(effects),
        "made_worse_fixed": sum(r < 0 for r in repairs) / len(effects),
    }


def at_threshold(value):
    return int(np.abs(noise.THRESHOLDS - value).argmin())


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_equals_plain_loops_over_full_forward_passes(family, name):
    model, hf = family(name)
    tokens = random_tokens(8)
    sweep = measured_sweep(model, tokens.numpy(), "resample")
    measured = noise.TokenNoise.of_sweep(sweep, FRACTION, n_bootstrap=3)
    with torch.no_grad():
        probabilities = hf(tokens).logits.softmax(-1)
    assert list(measured.layers) == [2]
    for head in range(model.n_heads):
        wanted = reference.ablate(hf, tokens, 2, head, "resample")
        effect = wanted["direct_effect"]
        repair = wanted["logit_change"] - wanted["ablated_direct_effect"] + effect
        places = sorted(itertools.product(range(8), range(11)), key=lambda at: -effect[at])[
            :22
        ]  # a quarter of 88
        assert effect[places[-1]] > 0
        plain = [
            (b, k, effect[b, k].item(), repair[b, k].item(), probabilities[b, k, tokens[b, k + 1]].item())
            for b, k in places
        ]
        for quantity, value in plain_noise(plain).items():
            found = measured.quantities[quantity][0, head].value
            assert found == pytest.approx(value, rel=1e-4, abs=1e-4), quantity
        below = sum(r / e <= 0.5 for _, _, e, r, _ in plain) / 22
        assert measured.share_at_most[0, head, at_threshold(0.5)] == pytest.approx(below)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_probability_is_the_softmax_whatever_the_batch(family, name, monkeypatch):
    model, hf = family(name)
    tokens = random_tokens(5)
    with torch.no_grad():
        wanted = hf(tokens).logits.softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].numpy()
    whole = probabilities.correct_probability(model, tokens).numpy()
    sizes = []
    hook = model.hf.register_forward_pre_hook(
        lambda _, __, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(probabilities, "LOGIT_BYTES", 2 * 4 * tokens.shape[1] * len(model.W_U))
    few = probabilities.correct_probability(model, tokens).numpy()
    hook.remove()
    assert sizes == [2, 2, 1]
    for found in (whole, few):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-9)


def test_probabilities_are_those_of_the_sweeps_prompts(family, monkeypatch):
    """However prompts are divided into shards and in whatever order they come."""
    model, _ = family("gpt2")
    tokens = random_tokens(10)
    wanted = probabilities.correct_probability(model, tokens).numpy()
    monkeypatch.setattr(pairs, "SHARD_PAIRS", 2)
    inputs = {"tokens": of_prompts(Prompts(tokens.numpy(), "random"))}
    first_pairs = probabilities.MEASUREMENT.shards({"n_prompts": 10})
    assert list(first_pairs) == [0, 2, 4]
    shards = [probabilities.MEASUREMENT.compute(model, {}, inputs, first) for first in first_pairs]
    assert [shard["prompt"].values.tolist() for shard in shards] == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9]]
    whole = xr.concat(shards, "prompt")
    sweep = fake_sweep(prompts=10, positions=11).drop_vars("probability").assign_coords(prompt=np.arange(10))
    np.testing.assert_allclose(noise.with_probability(sweep, whole)["probability"], wanted, rtol=1e-6)
    few = noise.with_probability(sweep.isel(prompt=[7, 3]), whole)
    np.testing.assert_allclose(few["probability"], wanted[[7, 3]], rtol=1e-6)
    assert few["self_repair"].equals(sweep["self_repair"].isel(prompt=[7, 3]))
    with pytest.raises(KeyError):
        noise.with_probability(sweep, whole.isel(prompt=slice(1, None)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), prompts=st.integers(2, 7))
def test_a_sample_equals_its_tokens_written_out(seed, prompts):
    tokens = made_tokens(prompts, seed)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=4).astype(float)
    found = {name: estimate.drawn for name, estimate in noise.head_noise(tokens, weights).items()}
    for sample, drawn in enumerate(weights):
        copies = [
            tokens[tokens["prompt"] == prompt].assign(prompt=100 * prompt + copy)
            for prompt in range(prompts)
            for copy in range(int(drawn[prompt]))
        ]
        written = pd.concat(copies)
        if not len(written) > written["prompt"].nunique() or written["prompt"].nunique() < 2:
            assert math.isnan(found["within"][sample]) and math.isnan(found["between_share"][sample])
            continue
        rows = written[["prompt", "position", "direct_effect", "self_repair", "probability"]].itertuples(
            index=False
        )
        for quantity, value in plain_noise([tuple(row) for row in rows]).items():
            assert found[quantity][sample] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), quantity


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=12))
def test_ranks_are_those_of_the_repeated_values(pairs):
    values, times = (np.array(x) for x in zip(*pairs, strict=True))
    ranks = noise.weighted_ranks(values, times[None].astype(float))[0]
    expected = pd.Series(np.repeat(values, times)).rank().to_numpy()
    assert np.repeat(ranks, times) == pytest.approx(expected)


def test_in_chunks_as_in_one(monkeypatch):
    tokens, weights = made_tokens(), draws(6, 50)
    whole = noise.head_noise(tokens, weights)
    monkeypatch.setattr(noise, "SAMPLE_BYTES", 8 * 7 * len(tokens))
    for name, estimate in noise.head_noise(tokens, weights).items():
        np.testing.assert_allclose(estimate.drawn, whole[name].drawn, rtol=1e-12, err_msg=name)


def test_head_noise_by_hand():
    tokens = pd.DataFrame(
        {
            "prompt": [0, 0, 1, 1],
            "position": [1, 2, 3, 4],
            "direct_effect": [1.0, 2.0, 3.0, 2.0],
            "self_repair": [-1.0, 1.0, 4.0, 0.0],
            "probability": [0.4, 0.3, 0.1, 0.2],
        }
    )
    found = {name: estimate.value for name, estimate in noise.head_noise(tokens, np.ones((1, 2))).items()}
    assert found["share"] == 0.5
    assert found["spread"] == pytest.approx(math.sqrt(3.5) / 2)  # squared deviations from 1: 4, 0, 9, 1
    assert (found["over_corrected"], found["made_worse"]) == (0.25, 0.25)
    assert found["spread_fixed"] == pytest.approx(0.5 * math.sqrt(0.5) / 2)  # deviations from 2: 1, 0, 1, 0
    assert (found["over_corrected_fixed"], found["made_worse_fixed"]) == (0, 0)
    assert found["within"] == pytest.approx(math.sqrt(5) / 2)  # (1 + 1 + 4 + 4) / (4 − 2)
    # mean square between: 2 (0 − 1)² + 2 (2 − 1)² = 4 on one degree of freedom; (4 − 5) / 2
    assert found["between"] == 0 and found["between_share"] == pytest.approx(-0.5 / 4.5)
    assert found["correlation_position"] == pytest.approx(0.4)
    assert found["correlation_probability"] == pytest.approx(-0.8)
    assert found["correlation_direct_effect"] == pytest.approx(math.sqrt(0.9))


def test_variance_components_are_recovered():
    rng = np.random.default_rng(1)
    prompt = np.repeat(np.arange(4000), rng.integers(1, 6, 4000))
    values = 0.7 * rng.normal(size=4000)[prompt] + 1.5 * rng.normal(size=len(prompt)) + 10
    between, within = noise.variance_components(values, prompt, np.ones((1, 4000)))
    assert within[0] == pytest.approx(2.25, rel=0.05) and between[0] == pytest.approx(0.49, rel=0.15)
    between, _ = noise.variance_components(rng.normal(size=len(prompt)), prompt, np.ones((1, 4000)))
    assert abs(between[0]) < 0.05


def test_only_tokens_on_which_the_head_helps():
    sweep = fake_sweep()
    effect, repair = (sweep[name].values[3, 1].ravel() for name in ("direct_effect", "self_repair"))
    everything = noise.selected_tokens(sweep, 1.0, 3, 1)
    assert len(everything) == (effect > 0).sum() < effect.size
    assert sorted(everything["self_repair"]) == sorted(repair[effect > 0])
    few = noise.selected_tokens(sweep, 0.05, 3, 1)
    assert sorted(few["direct_effect"]) == sorted(sorted(effect)[-16:])
    for row in few.itertuples():
        at = dict(layer=3, head=1, prompt=row.prompt, position=row.position)
        for name in ("direct_effect", "ablated_direct_effect", "logit_change", "self_repair"):
            assert getattr(row, name) == sweep[name][at].item()
        assert row.probability == sweep["probability"].values[row.prompt, row.position]
        assert row.share == row.self_repair / row.direct_effect
        assert row.removed == row.direct_effect - row.ablated_direct_effect
        assert row.logit_change == pytest.approx(row.self_repair - row.removed)
    with pytest.raises(UserError, match="fraction"):
        noise.selected_tokens(sweep, 0.0, 3, 1)


@pytest.mark.parametrize(("fraction", "shift"), [(1.0, 0.0), (0.001, 0.0), (1.0, -100.0)])
def test_all_tokens_one_token_and_none_give_no_infinity(fraction, shift):
    sweep = fake_sweep(prompts=2, shift=shift)
    table = noise.TokenNoise.of_sweep(sweep, fraction, n_bootstrap=20).table()
    values = table.set_index("quantity")["estimate"]
    assert not np.isinf(table[["estimate", "low", "high"]].to_numpy()).any()
    if fraction == 1.0 and shift == 0:
        assert np.isfinite(table[["estimate", "low", "high"]].to_numpy()).all()
    elif shift == 0:
        assert values["spread"] == 0 and np.isnan(values["within"]) and np.isfinite(values["share"])
    else:
        assert values.isna().all()


def test_noise_of_a_sweep_is_that_of_its_later_heads_over_prompts():
    sweep = fake_sweep(layers=5)
    measured = noise.TokenNoise.of_sweep(sweep, 0.05, n_bootstrap=200)
    assert list(measured.layers) == [2, 3, 4]
    assert {found.drawn.shape for found in measured.quantities.values()} == {(3, 3, 201)}
    spreads = []
    for layer, head in itertools.product((2, 3, 4), range(3)):
        tokens = noise.selected_tokens(sweep, 0.05, layer, head)
        spreads.append(np.std(tokens["self_repair"]) / np.mean(tokens["direct_effect"]))
        curve = measured.share_at_most[layer - 2, head]
        for threshold in (-1.0, 0.25, 2.0):
            assert curve[at_threshold(threshold)] == pytest.approx((tokens["share"] <= threshold).mean())
    spread = measured.statistics()["self-repair-spread"]
    assert spread.value == pytest.approx(np.mean(spreads))
    row = measured.table().set_index("quantity").loc["spread"]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(spread.samples, [0.025, 0.975])))
    assert row["low"] < row["estimate"] and row["low"] < row["high"]


def test_statistics_are_those_of_the_claims_and_their_controls():
    measured = noise.TokenNoise.of_sweep(fake_sweep(), 0.05, n_bootstrap=20)
    found = measured.statistics()
    used = {claim.statistic for claim in load_claims() if claim.notebook == "02"}
    assert set(found) == used | {load_statistics()[name].control_id for name in used}
    judged = verdicts(claims_table("02", {"fake": found}))
    assert len(judged) == 3 and set(judged.values()) <= set(VERDICTS) - {"not testable here"}
    assert set(noise.LABELS) == set(noise.head_noise(made_tokens(), np.ones((1, 6)))) - {"share"}
    for quantity, name in (noise.STATISTICS | noise.CONTROLS).items():
        assert found[name].drawn == pytest.approx(measured.quantities[quantity].drawn.mean((0, 1)))


@pytest.mark.parametrize("share", [0.3, -0.4, 1.5])
def test_repair_by_a_fixed_share_is_neither_noise_nor_failure(share):
    """Every statistic equals its control, so that no claim is reproduced."""
    sweep = fake_sweep()
    for name in ("ablated_direct_effect", "self_repair_heads", "self_repair_mlps"):
        sweep[name] = 0 * sweep[name]
    sweep["self_repair"] = share * sweep["direct_effect"]
    sweep["logit_change"] = sweep["self_repair"] - sweep["direct_effect"]
    found = noise.TokenNoise.of_sweep(sweep, 0.05, n_bootstrap=50).statistics()
    for statistic in noise.STATISTICS.values():
        assert found[statistic].drawn == pytest.approx(found[f"{statistic}-of-fixed-share"].drawn, abs=1e-9)
    found = {name: one.map(lambda drawn: drawn.round(9)) for name, one in found.items()}
    assert set(verdicts(claims_table("02", {"fake": found})).values()) == {"not reproduced"}


@pytest.mark.parametrize(
    ("layers", "expected"), [(2, [0, 1]), (4, [0, 1, 2, 3]), (6, [2, 3, 4, 5]), (12, [6, 8, 9, 11])]
)
def test_strongest_heads(layers, expected):
    sweep = fake_sweep(layers, 3, 2, 50)
    found = noise.strongest_heads(sweep, 0.1)
    assert [layer for layer, _ in found] == expected
    for layer, head in found:
        tops = [sorted(sweep["direct_effect"].values[layer, h].ravel())[-10:] for h in range(3)]
        assert head == max(range(3), key=lambda h: sum(tops[h]))


def test_head_shares_of_the_published_later_half():
    found = token_shares.head_shares(published_heads())
    rows = published_heads().query("model == 'gpt2-small' and layer >= 6")
    assert found["gpt2-small"] == pytest.approx((rows["self_repair"] / rows["direct_effect"]).to_numpy())
    assert len(found["gpt2-small"]) == 72 and len(found["pythia-410m"]) == 192
    with_negative = pd.DataFrame(
        {"model": "m", "layer": [0, 1, 1], "direct_effect": [1.0, -1.0, 2.0], "self_repair": [1.0, 1.0, 1.0]}
    )
    assert token_shares.head_shares(with_negative)["m"].tolist() == [0.5]


def test_shares_of_heads_and_their_quantiles():
    measured = noise.noise_of_models({"fake": fake_sweep(shift=3.0)}, 0.1)
    shares = token_shares.shares_of_heads(measured, published_heads())
    assert list(shares) == ["measured", "published"]
    assert shares["measured"]["fake"].tolist() == measured["fake"].quantities["share"].value.ravel().tolist()
    assert shares["published"].keys() == token_shares.head_shares(published_heads()).keys()
    quantiles = token_shares.quantiles_of_heads(
        {"a": np.array([0.0, 0.5, 1.0]), "b": np.array([2.0, np.nan])}
    )
    assert list(quantiles) == ["10%", "25%", "50%", "75%", "90%"] and quantiles.index.name == "model"
    assert quantiles.loc["a"].tolist() == pytest.approx([0.1, 0.25, 0.5, 0.75, 0.9])
    assert quantiles.loc["b"].tolist() == [2.0] * 5


def test_quantiles_over_tokens_count_every_head_equally():
    sweep = fake_sweep(shift=4.0)
    measured = noise.noise_of_models({"fake": sweep}, 0.2)
    shares = [
        noise.selected_tokens(sweep, 0.2, layer, head)["share"]
        for layer, head in itertools.product((2, 3), range(3))
    ]
    found = token_shares.quantiles_of_tokens(measured)
    assert found.index.name == "model" and list(found) == ["10%", "25%", "50%", "75%", "90%"]
    wanted = np.quantile(np.concatenate(shares), [0.1, 0.25, 0.5, 0.75, 0.9])
    assert found.loc["fake"].tolist() == pytest.approx(wanted, abs=0.02)  # equally many tokens of each head
    everything = dataclasses.replace(measured["fake"], share_at_most=np.ones((1, 1, len(noise.THRESHOLDS))))
    assert token_shares.quantiles_of_tokens({"fake": everything}).isna().all(axis=None)


def test_clouds_and_scatter_by_hand():
    """Plain float64 over every token, and over each head's own."""
    sweep = fake_sweep()
    found = token_shares.clouds_table(noise.all_tokens(sweep, [(1, 0), (3, 2)]), idle=0.3)
    assert found.index.tolist() == ["L1H0", "L3H2"]
    for row, (layer, head) in zip(found.itertuples(index=False), [(1, 0), (3, 2)], strict=True):
        effect, change = (
            sweep[name].values[layer, head].ravel().astype(np.float64)
            for name in ("direct_effect", "logit_change")
        )
        idle = [b for a, b in zip(effect, change, strict=True) if abs(a) < 0.3]
        assert 0 < row[0] == len(idle) / len(effect) < 1
        assert row[1] == pytest.approx(statistics.pstdev(idle))
        assert row[2] == pytest.approx(statistics.correlation(effect, change))
    heads = [(3, 2), (1, 0)]
    scatter = token_shares.scatter_table(noise.tokens_of_heads(sweep, 0.1, heads))
    assert scatter.index.tolist() == ["L1H0", "L3H2"]
    for row, (layer, head) in zip(scatter.itertuples(index=False), reversed(heads), strict=True):
        repair = noise.selected_tokens(sweep, 0.1, layer, head)["self_repair"].tolist()
        assert row[0] == pytest.approx(statistics.pstdev(repair))
        assert row[1] == sum(value < 0 for value in repair) / len(repair)


def test_tables_of_several_models():
    sweeps = {
        "a": fake_sweep(seed=1).assign_attrs(model="a"),
        "b": fake_sweep(seed=2).assign_attrs(model="b"),
    }
    models = noise.noise_of_models(sweeps, 0.1)
    table = noise.noise_table(models)
    for name, one in models.items():
        rows = table[table["model"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, one.table())
    text = noise.with_intervals(table, ["share", "spread"])
    assert list(text) == ["share", "spread"] and list(text.index) == ["a", "b"]
    row = models["b"].table().set_index("quantity").loc["share"]
    numbers = re.fullmatch(r"([+−]\d\.\d\d) \[([+−]\d\.\d\d), ([+−]\d\.\d\d)\]", text.loc["b", "share"])
    for number, end in zip(numbers.groups(), ("estimate", "low", "high"), strict=True):
        assert float(number.replace("−", "-")) == pytest.approx(row[end], abs=0.005)


# --- tokens in context ---


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "pocket-gpt2")


def example_rows(shares, prompts):
    n = len(shares)
    zero = np.zeros(n)
    columns = {
        "layer": 3,
        "head": 1,
        "prompt": prompts,
        "position": np.arange(n) + 30,
        "direct_effect": zero + 2.0,
    }
    return pd.DataFrame(
        {
            **columns,
            "ablated_direct_effect": zero,
            "logit_change": 2 * np.array(shares) - 2,
            "self_repair": 2 * np.array(shares),
            "share": shares,
            "probability": zero + 0.25,
        }
    )


def test_examples_follow_the_rule():
    shares = [0.55, 0.6, 0.7, 0.8, 0.95, 0.4, 0.0, 1.0, 1.2, 3.0, 1.4, -0.1, -0.2, -0.3, -4.0, -5.0]
    tokens = example_rows(shares, [0, 1, 2, 3, 2, 0, 0, 0, 5, 6, 5, 0, 1, 2, 3, 2])
    chosen = pick_examples(tokens)
    picked = chosen.groupby("kind", sort=False)["share"].apply(list).to_dict()
    # median 0.7; 90% quantile 0.8
    assert picked["strongly repaired"] == [0.7, 0.8]
    assert picked["over-corrected"] == [1.4, 3.0]
    assert picked["made worse"] == [-0.3, -4.0]
    of_first_prompt = pick_examples(example_rows(shares[:5], [0, 1, 2, 2, 2]))
    assert list(of_first_prompt["share"]) == [0.7, 0.6]  # 0.8 and 0.95 are of the first one's prompt


@pytest.mark.parametrize("rounding", [-1e-15, 0, 1e-15])
def test_of_two_tokens_in_the_middle_the_lower_one_is_the_example(rounding):
    """However the share halfway between them is rounded."""
    tokens = example_rows([0.9, 0.8 + rounding, 0.6 - rounding, 0.55], [0, 1, 2, 3])
    assert pick_examples(tokens)["share"].tolist() == [0.6 - rounding, 0.8 + rounding]


def test_examples_of_a_kind_that_is_not_there():
    chosen = pick_examples(example_rows([0.1, 0.7], [0, 0]))
    assert list(chosen["kind"]) == ["strongly repaired"] and set(chosen["kind"]) < set(KINDS)
    nothing = pick_examples(example_rows([0.1], [0]))
    assert nothing.empty and examples_table(nothing).empty


def test_an_example_stands_among_its_neighbours_each_with_the_heads_self_repair_on_it(tokenizer):
    sweep = fake_sweep(positions=127)
    ids = np.random.default_rng(0).integers(300, 3000, (8, 128))
    sweep = sweep.assign(token=(("prompt", "token_position"), ids))
    for position in (3, 60, 126):
        row = example_rows([0.7], [5]).assign(position=position)
        (found,) = in_context(pick_examples(row), sweep, tokenizer)
        at = position + 1
        first, last = max(0, at - BEFORE), min(128, at + AFTER + 1)
        assert found.marked == at - first and len(found.tokens) == len(found.values) == last - first
        for index, value in enumerate(found.values, start=first):
            if index == 0:
                assert math.isnan(value)
            else:
                assert value == sweep["self_repair"].values[3, 1, 5, index - 1]
        assert found.tokens == token_texts(ids[5], tokenizer)[first:last]
        assert found.heading == "1 · strongly repaired: L3H1, prompt 5"


def test_characters_of_several_tokens_come_with_the_last_of_them(tokenizer):
    text = "One morning the ferry was late.\nNobody on the quay — not even the café’s owner — said a word 🛶."
    ids = np.array(tokenizer(text)["input_ids"])
    texts = token_texts(ids, tokenizer)
    assert "".join(texts) == tokenizer.decode(ids)
    assert not any("\ufffd" in one for one in texts)
    for one, token in zip(texts, ids, strict=True):
        plain = tokenizer.decode(token)
        assert one == plain or "\ufffd" in plain  # part of a character
    assert "" in texts


def test_table_of_examples_has_their_numbers():
    table = examples_table(pick_examples(example_rows([1.5, -0.5], [4, 4])))
    assert table.index.name == "example" and list(table.index) == [1, 2]
    over, worse = table.to_dict("records")
    assert (over["kind"], over["head"], over["DE"], over["Δlogit"]) == ("over-corrected", "L3H1", 2, 1)
    assert (worse["kind"], worse["self-repair"], worse["self-repair / DE"]) == ("made worse", -1, -0.5)
    assert worse["clean probability"] == 0.25 and worse["DE ablated"] == 0


# --- what the figures plot ---


def test_scatter_shows_every_token_in_the_colour_of_its_outcome():
    sweep = fake_sweep()
    tokens = noise.tokens_of_heads(sweep, 0.1, [(1, 0), (2, 0), (3, 0)])
    figure = plots.effect_against_change_per_token(tokens, "fake")
    assert [axis.get_title().split(":")[0] for axis in figure.axes] == ["L1H0", "L2H0", "L3H0"]
    assert "axes differ" in figure.get_suptitle()
    for axis, (_, here) in zip(figure.axes, tokens.groupby("layer"), strict=True):
        over, partly, worse = (points.get_offsets().data for points in axis.collections)
        low, high = axis.get_ylim()
        said = re.search(r"(\d+) tokens(?:, (\d+) of them outside)?", axis.get_title())
        shown = here[here["logit_change"].between(low, high)]
        assert int(said[1]) == len(here) and int(said[2] or 0) == len(here) - len(shown) <= 0.02 * len(here)
        assert len(over) + len(partly) + len(worse) == len(shown)
        for found, rows in (
            (over, shown[shown["self_repair"] > shown["direct_effect"]]),
            (worse, shown[shown["self_repair"] < 0]),
        ):
            x = rows["direct_effect"] - rows["ablated_direct_effect"]
            assert found == pytest.approx(np.column_stack([x, rows["logit_change"]]))
        assert (worse[:, 1] < -worse[:, 0]).all()  # made worse: below the line of no repair
        assert (over[:, 1] > -over[:, 0]).all() and (partly[:, 1] >= -partly[:, 0]).all()
    figure.canvas.draw()


def test_all_tokens_are_drawn_on_the_authors_axes():
    """Whatever the sign of their direct effect; those beyond the axes are counted."""
    sweep = fake_sweep()
    heads = noise.all_tokens(sweep, [(1, 0), (3, 0)])
    assert np.array_equal(heads["L3H0"]["logit_change"], sweep["logit_change"].values[3, 0].ravel())
    figure = plots.all_tokens(heads, "fake")
    for place, (name, head) in enumerate(heads.items()):
        for row, quantity in enumerate(("logit_change", "self_repair")):
            axis = figure.axes[2 * row + place]
            ends = np.ravel([axis.get_xlim(), axis.get_ylim()])
            assert np.abs(ends) == pytest.approx(np.full(4, ends[1]))
            beyond = (np.abs(head["direct_effect"]) > ends[1]) | (np.abs(head[quantity]) > ends[1])
            assert axis.get_title() == f"{name}, {beyond.sum()} tokens outside"
            (cells,) = axis.collections
            assert len(beyond) - beyond.sum() <= cells.get_array().sum() <= len(beyond)
            (line,) = [drawn for drawn in axis.lines if not drawn.get_label().startswith("_")]
            x, y = line.get_data()
            assert y == pytest.approx(-x if quantity == "logit_change" else x)
    figure.canvas.draw()


def test_distributions_cross_at_the_shares():
    measured = {"fake": noise.TokenNoise.of_sweep(fake_sweep(), 0.1, n_bootstrap=5)}
    figure = plots.share_distributions(
        measured,
        {
            "measured": {"fake": np.array([0.3, 0.1])},
            "published": token_shares.head_shares(published_heads()),
        },
        "fake",
    )
    curve = figure.axes[0].lines[0].get_xydata()
    table = measured["fake"].table().set_index("quantity")["estimate"]
    assert np.interp(0, *curve.T) == pytest.approx(table["made_worse"], abs=1e-9)
    assert 1 - np.interp(1, *curve.T) == pytest.approx(table["over_corrected"], abs=1e-9)
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[0.1, 0.0], [0.1, 0.5], [0.3, 1.0]]
    assert len(figure.axes[2].lines) == 4
    figure.canvas.draw()


def test_intervals_show_the_table():
    measured = {
        name: noise.TokenNoise.of_sweep(fake_sweep(seed=seed), 0.1, n_bootstrap=30)
        for seed, name in enumerate(("a", "b"))
    }
    tables = {name: found.table().set_index("quantity") for name, found in measured.items()}
    panels = {
        plots.spread: ["spread", "over_corrected", "made_worse"],
        plots.within_and_between: ["within", "between", "between_share"],
        plots.correlations: ["correlation_direct_effect", "correlation_probability", "correlation_position"],
    }
    for draw, quantities in panels.items():
        figure = draw(measured, "fake")
        for axis, quantity in zip(figure.axes, quantities, strict=True):
            for y, (model, found) in enumerate(measured.items()):
                row = tables[model].loc[quantity]
                bar, point = axis.lines[2 * y : 2 * y + 2]
                assert bar.get_xdata() == pytest.approx([row["low"], row["high"]])
                assert point.get_xdata()[0] == row["estimate"]
                single = axis.collections[y].get_offsets()[:, 0].data
                assert single == pytest.approx(found.quantities[quantity].value.ravel())
        figure.canvas.draw()
    figure = plots.spread(measured, "fake")
    marked = [axis.lines[-5].get_xdata()[0] for axis in figure.axes]
    assert marked == [claim.at_least for claim in load_claims() if claim.notebook == "02"]
    for axis, quantity in zip(figure.axes, noise.CONTROLS, strict=True):
        for model, drawn in zip(measured, (axis.lines[-4:-2], axis.lines[-2:]), strict=True):
            row = tables[model].loc[quantity]
            assert list(drawn[0].get_xdata()) == pytest.approx([row["low"], row["high"]])
            assert drawn[1].get_xdata()[0] == row["estimate"]


def test_prompts_stand_in_the_order_of_their_means():
    tokens = made_tokens()
    axis = plots.by_prompt(tokens, "fake").axes[0]
    means = axis.lines[0].get_ydata()
    assert sorted(means) == list(means) and means == pytest.approx(
        sorted(tokens.groupby("prompt")["self_repair"].mean())
    )
    places = axis.collections[0].get_offsets().data
    assert len(places) == len(tokens)
    for x, mean in zip(axis.lines[0].get_xdata(), means, strict=True):
        assert places[places[:, 0] == x, 1].mean() == pytest.approx(mean)


def test_top_tokens_of_a_trained_model_all_have_a_positive_direct_effect():
    model = load_model("pocket-pythia-small", device="cpu")
    tokens = np.random.default_rng(0).integers(4, 4096, (4, 128))
    found = measured_sweep(model, tokens, "zero")
    for layer, head in noise.strongest_heads(found, 0.02):
        assert len(noise.selected_tokens(found, 0.02, layer, head)) == math.ceil(0.02 * 4 * 127)
