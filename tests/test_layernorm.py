"""Notebook 03: the final norm's scale, the breakdown by part, and ways of counting it."""

import math
import statistics

import numpy as np
import pytest
import reference
import torch
import xarray as xr
from families import load_family, random_tokens, save_family
from tasks import OF_HEADS
from transformers import AutoModelForCausalLM

from selfrepair.analysis.claims import load_claims
from selfrepair.analysis.head_table import heads_table, strongest_head
from selfrepair.analysis.layernorm import (
    WAYS,
    Breakdown,
    ScaleRatios,
    by_model,
    counting_table,
    layernorm_statistics,
    published_statistics,
    scale_ratios,
    scale_table,
)
from selfrepair.analysis.published import published_heads
from selfrepair.measure.heads import MEASUREMENT
from selfrepair.measure.tokens import of_prompts
from selfrepair.statistics import PARTS
from selfrepair.text.corpora import Prompts

LAYERS, HEADS, PROMPTS, POSITIONS = 4, 2, 6, 25
FRACTION = 0.1


def fake_sweep(seed=0, architecture="gpt2", ablation="resample"):
    rng = np.random.default_rng(seed)
    data = {
        name: (("layer", "head", "prompt", "position"), rng.normal(size=(LAYERS, HEADS, PROMPTS, POSITIONS)))
        for name in OF_HEADS
    }
    data["sigma_ablated"][1][:] = 1 + 0.1 * data["sigma_ablated"][1]
    data["sigma_clean"] = (("prompt", "position"), 1 + 0.1 * rng.normal(size=(PROMPTS, POSITIONS)))
    return xr.Dataset(data, attrs={"model": "fake", "architecture": architecture, "ablation": ablation})


def tokens_of(dataset, layer, head, prompts=range(PROMPTS)):
    """Plain numbers of a head's top tokens; a prompt named twice gives its tokens twice."""
    rows = []
    for prompt in range(PROMPTS):
        for position in range(POSITIONS):
            row = {name: float(dataset[name][layer, head, prompt, position]) for name in OF_HEADS}
            row |= {"prompt": prompt, "sigma_clean": float(dataset["sigma_clean"][prompt, position])}
            repair = row["logit_change"] - (row["ablated_direct_effect"] - row["direct_effect"])
            row["heads"], row["mlps"] = row["self_repair_heads"], row["self_repair_mlps"]
            row["layernorm"] = repair - row["heads"] - row["mlps"]
            rows.append(row)
    rows.sort(key=lambda row: -row["direct_effect"])
    top = rows[: math.ceil(FRACTION * len(rows))]
    return [row for prompt in prompts for row in top if row["prompt"] == prompt]


def counted(rows, part):
    ratios = [row[part] / row["direct_effect"] for row in rows]
    return {
        "clipped": statistics.fmean(min(1, max(0, ratio)) for ratio in ratios),
        "unclipped mean": statistics.fmean(ratios),
        "median": statistics.median_low(ratios),
        "ratio of means": sum(row[part] for row in rows) / sum(row["direct_effect"] for row in rows),
    }


def test_ways_of_counting_by_hand():
    dataset = fake_sweep()
    breakdown = Breakdown.of_sweep(dataset, FRACTION, n_bootstrap=20)
    by_layer = breakdown.by_layer().set_index(["layer", "part", "quantity"])["estimate"]
    for part in PARTS:
        found = {}
        for layer in range(LAYERS):
            for head in range(HEADS):
                rows = tokens_of(dataset, layer, head)
                found[layer, head] = counted(rows, part)
                for way in WAYS:
                    assert breakdown.shares[way][part][layer, head].value == pytest.approx(
                        found[layer, head][way]
                    )
            both = [row for head in range(HEADS) for row in tokens_of(dataset, layer, head)]
            assert by_layer[layer, part, "ratio of means"] == pytest.approx(
                counted(both, part)["ratio of means"]
            )
            assert by_layer[layer, part, "logits"] == pytest.approx(
                statistics.fmean(row[part] for row in both)
            )
            for way in WAYS[:-1]:
                assert by_layer[layer, part, way] == pytest.approx(
                    statistics.fmean(found[layer, head][way] for head in range(HEADS))
                )
        over_tokens, over_heads = breakdown.over_tokens(part), breakdown.over_heads(part)
        ratios = [way["ratio of means"] for way in found.values()]
        assert over_heads["unclipped mean"].value == pytest.approx(statistics.fmean(ratios))
        assert over_heads["median"].value == pytest.approx(statistics.median(ratios))
        for way in WAYS[:-1]:
            assert over_tokens[way].value == pytest.approx(
                statistics.fmean(one[way] for one in found.values())
            )


def test_samples_are_of_drawn_prompts():
    """The bootstrap samples of every way are what counting the drawn prompts' tokens anew gives."""
    from selfrepair.statistics import bootstrap_weights

    dataset = fake_sweep(seed=1)
    breakdown = Breakdown.of_sweep(dataset, FRACTION, n_bootstrap=5, seed=3)
    for sample, weights in enumerate(bootstrap_weights(PROMPTS, 5, 3)):
        drawn = [prompt for prompt, count in enumerate(weights) for _ in range(int(count))]
        rows = tokens_of(dataset, 2, 1, drawn)
        for way, value in counted(rows, "heads").items():
            assert breakdown.shares[way]["heads"][2, 1].samples[sample] == pytest.approx(value)


def test_all_tokens_with_a_direct_effect_of_zero_are_counted_without_a_ratio():
    dataset = fake_sweep()
    dataset["direct_effect"][0, 0, 0, :5] = 0
    breakdown = Breakdown.of_sweep(dataset, 1.0, n_bootstrap=5)
    assert all(np.isfinite(breakdown.shares[way][part].drawn).all() for way in WAYS for part in PARTS)


def test_released_tables_are_counted_alike():
    """A heads table of a sweep gives what the sweep gives, as far as it can."""
    dataset = fake_sweep()
    table = heads_table(dataset, FRACTION)
    of_sweep, of_table = Breakdown.of_sweep(dataset, FRACTION, 5), Breakdown.of_table(table)
    for part in PARTS:
        for way, estimate in of_table.over_heads(part).items():
            assert estimate.value == pytest.approx(of_sweep.over_heads(part)[way].value)
            assert not estimate.samples.size


def test_published_shares():
    shares = {
        model: published_statistics(rows)["layernorm-clipped-share"].value
        for model, rows in published_heads().groupby("model")
    }
    assert shares == pytest.approx(
        {"pythia-160m": 0.34, "gpt2-small": 0.32, "pythia-410m": 0.25, "gpt2-medium": 0.30}, abs=0.01
    )


def test_scale_ratios_by_hand():
    dataset = fake_sweep()
    ratios = ScaleRatios.of_sweep(dataset, 3, 1, FRACTION)
    rows = tokens_of(dataset, 3, 1)
    found = ratios.share_above_one()
    above = statistics.fmean(row["sigma_clean"] / row["sigma_ablated"] > 1 for row in rows)
    low, high = found.interval()
    assert (
        found.value == pytest.approx(above) and low <= found.value <= high and ratios.top.sum() == len(rows)
    )
    table = heads_table(dataset, FRACTION)
    layer, head = strongest_head(table, -1)
    assert layer == 3 and table.query("layer == 3").set_index("head")["direct_effect"].idxmax() == head


def test_one_head_of_two_models_under_every_ablation():
    llama, gpt2 = fake_sweep(3, "llama"), fake_sweep(4)
    sweeps = {
        kind: {
            "a": gpt2.assign_attrs(model="a", ablation=kind),
            "b": gpt2.assign_attrs(model="b", ablation=kind),
            "c": llama.assign_attrs(model="c", ablation=kind),
        }
        for kind in ("mean", "zero")
    }
    of_models = by_model(sweeps)
    assert list(of_models) == ["a", "b", "c"] and list(of_models["c"]) == ["mean", "zero"]
    assert of_models["c"]["zero"] is sweeps["zero"]["c"]
    ratios = scale_ratios(of_models, FRACTION)
    assert [[(one.model, one.ablation) for one in row] for row in ratios] == [
        [("a", "mean"), ("a", "zero")],
        [("c", "mean"), ("c", "zero")],
    ]
    for row, dataset in zip(ratios, (gpt2, llama), strict=True):
        means = [
            statistics.fmean(token["direct_effect"] for token in tokens_of(dataset, 3, head))
            for head in range(HEADS)
        ]
        assert {(one.layer, one.head) for one in row} == {(3, means.index(max(means)))}
    assert [len(row) for row in scale_ratios({"c": of_models["c"]}, FRACTION)] == [2]
    given = scale_ratios(of_models, FRACTION, (1, 0))
    assert {(one.layer, one.head) for row in given for one in row} == {(1, 0)}
    table = scale_table(ratios)
    assert list(table.columns) == ["model", "head", "ablation", "top tokens", "low", "high", "all tokens"]
    for row, one in zip(
        table.itertuples(index=False), [one for of_head in ratios for one in of_head], strict=True
    ):
        assert (row.model, row.head, row.ablation) == (one.model, f"L3H{one.head}", one.ablation)
        assert row[3] == pytest.approx((one.all_tokens[one.top] > 1).mean())
        assert row[4:6] == pytest.approx(tuple(one.share_above_one().interval()))
        assert row[6] == (one.all_tokens > 1).mean()


def test_counting_table_has_a_row_for_each_model_and_way():
    measured = Breakdown.of_sweep(fake_sweep(), FRACTION, 30).over_heads("layernorm")
    released = Breakdown.of_table(published_heads().query("model == 'gpt2-small'")).over_heads("layernorm")
    table = counting_table({"fake": measured, "published": released})
    assert table["way"].tolist() == 2 * list(WAYS) and table["model"].tolist() == 4 * ["fake"] + 4 * [
        "published"
    ]
    for row in table.iloc[:4].itertuples():
        samples = measured[row.way].samples
        assert row.estimate == measured[row.way].value
        assert (row.low, row.high) == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))
    assert table.loc[4:, ["low", "high"]].isna().all(axis=None) and np.isfinite(table["estimate"]).all()


def test_claims_by_hand():
    kinds = {
        kind: fake_sweep(seed, "gpt_neox", kind) for seed, kind in enumerate(("resample", "mean", "zero"))
    }
    found = layernorm_statistics(kinds, FRACTION, 10)
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    shares = [
        statistics.fmean(counted(tokens_of(one, *head), "layernorm")["clipped"] for head in every)
        for one in kinds.values()
    ]
    first = kinds["resample"]
    above = [
        statistics.fmean(
            row["sigma_clean"] > row["sigma_ablated"] for row in tokens_of(first, LAYERS - 1, head)
        )
        for head in range(HEADS)
    ]
    later = [row for layer in (2, 3) for head in range(HEADS) for row in tokens_of(first, layer, head)]
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(
        {
            "layernorm-clipped-share": shares[0],
            "sigma-falls-last-layer": statistics.fmean(above),
            "layernorm-share-over-ablations": max(shares) - min(shares),
            "mlp-repair-pythia": counted(later, "mlps")["ratio of means"],
        }
    )
    assert set(found) == {claim.statistic for claim in load_claims() if claim.notebook == "03"}
    assert len(layernorm_statistics({"zero": fake_sweep()}, FRACTION, 10)) == 2


@pytest.mark.parametrize("family", ["gpt2", "neox-parallel", "llama-gqa"])
def test_what_remains_with_the_norm_frozen(family, tmp_path):
    """Against a full forward pass with σ_clean forced on the final norm of the ablated run, in float64."""
    tokens = random_tokens()
    model = load_family(family, tmp_path)
    prompts = {"tokens": of_prompts(Prompts(tokens.numpy(), "random"))}
    dataset = MEASUREMENT.compute(model, {"ablation": "resample"}, prompts, 0).assign_attrs(model=model.name)
    hf = AutoModelForCausalLM.from_pretrained(save_family(family, tmp_path / "again"), dtype=torch.float64)
    clean = reference.forward(hf, tokens)
    n_layers, n_heads = dataset.sizes["layer"], dataset.sizes["head"]
    norm = (
        hf.base_model.ln_f
        if family == "gpt2"
        else hf.base_model.final_layer_norm
        if family == "neox-parallel"
        else hf.base_model.norm
    )
    sigma = reference.sigma(hf, clean["residual"][n_layers])[..., None]

    def frozen(_, args):
        residual = args[0]
        centred = residual - residual.mean(-1, keepdim=True) if family != "llama-gqa" else residual
        return norm.weight * centred / sigma + (0 if getattr(norm, "bias", None) is None else norm.bias)

    total, effect = 0.0, 0.0
    for layer in range(round(0.5 * n_layers), n_layers):
        for head in range(n_heads):
            wanted = reference.ablate(hf, tokens, layer, head, "resample")
            width = clean["z"][layer].shape[-1] // n_heads
            z = clean["z"][layer][..., head * width : (head + 1) * width].roll(len(tokens) // 2, 0)
            handle = norm.register_forward_hook(lambda _, args, __: frozen(_, args))
            ablated = reference.forward(hf, tokens, (layer, head, z))["logits"]
            handle.remove()
            change = reference.centred_correct_logit(ablated, tokens) - reference.centred_correct_logit(
                clean["logits"], tokens
            )
            total += (change - (wanted["ablated_direct_effect"] - wanted["direct_effect"])).sum().item()
            effect += wanted["direct_effect"].sum().item()
    table = Breakdown.of_sweep(dataset, 1.0, 5).with_norm_frozen().set_index("final norm")
    assert table.loc["frozen", "estimate"] == pytest.approx(total / effect, rel=1e-4)
