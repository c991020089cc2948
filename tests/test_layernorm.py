"""Notebook 03: the final norm's scale, the breakdown by part, and ways of counting it."""

import math
import statistics

import numpy as np
import pytest
import reference
import torch
import xarray as xr
from families import load_family, random_tokens, save_family
from transformers import AutoModelForCausalLM

from selfrepair.analysis.head_table import PARTS, heads_table, strongest_head
from selfrepair.text.corpora import Prompts
from selfrepair.analysis.layernorm import WAYS, Breakdown, ScaleRatios, layernorm_statistics, published_statistics
from selfrepair.analysis.published import published_heads
from selfrepair.store.datasets import open_store
from selfrepair.measure.heads import sweep

NAMES = ("direct_effect", "ablated_direct_effect", "logit_change", "self_repair_heads", "self_repair_mlps", "sigma_ablated")
LAYERS, HEADS, PROMPTS, POSITIONS = 4, 2, 6, 25
FRACTION = 0.1


def fake_sweep(seed=0, architecture="gpt2", ablation="resample"):
    rng = np.random.default_rng(seed)
    data = {name: (("layer", "head", "prompt", "position"), rng.normal(size=(LAYERS, HEADS, PROMPTS, POSITIONS))) for name in NAMES}
    data["sigma_ablated"][1][:] = 1 + 0.1 * data["sigma_ablated"][1]
    data["sigma_clean"] = (("prompt", "position"), 1 + 0.1 * rng.normal(size=(PROMPTS, POSITIONS)))
    return xr.Dataset(data, attrs={"model": "fake", "architecture": architecture, "ablation": ablation})


def tokens_of(dataset, layer, head, prompts=range(PROMPTS)):
    """Plain numbers of a head's top tokens; a prompt named twice gives its tokens twice."""
    rows = []
    for prompt in range(PROMPTS):
        for position in range(POSITIONS):
            row = {name: float(dataset[name][layer, head, prompt, position]) for name in NAMES}
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
                    assert breakdown.shares[way][part][layer, head, 0] == pytest.approx(found[layer, head][way])
            both = [row for head in range(HEADS) for row in tokens_of(dataset, layer, head)]
            assert by_layer[layer, part, "ratio of means"] == pytest.approx(counted(both, part)["ratio of means"])
            assert by_layer[layer, part, "logits"] == pytest.approx(statistics.fmean(row[part] for row in both))
            for way in WAYS[:-1]:
                assert by_layer[layer, part, way] == pytest.approx(statistics.fmean(found[layer, head][way] for head in range(HEADS)))
        over_tokens, over_heads = breakdown.over_tokens(part), breakdown.over_heads(part)
        ratios = [way["ratio of means"] for way in found.values()]
        assert over_heads["unclipped mean"][0] == pytest.approx(statistics.fmean(ratios))
        assert over_heads["median"][0] == pytest.approx(statistics.median(ratios))
        for way in WAYS[:-1]:
            assert over_tokens[way][0] == pytest.approx(statistics.fmean(one[way] for one in found.values()))


def test_samples_are_of_drawn_prompts():
    """The bootstrap samples of every way are what counting the drawn prompts' tokens anew gives."""
    from selfrepair.statistics import bootstrap_weights

    dataset = fake_sweep(seed=1)
    breakdown = Breakdown.of_sweep(dataset, FRACTION, n_bootstrap=5, seed=3)
    for sample, weights in enumerate(bootstrap_weights(PROMPTS, 5, 3), start=1):
        drawn = [prompt for prompt, count in enumerate(weights) for _ in range(int(count))]
        rows = tokens_of(dataset, 2, 1, drawn)
        for way, value in counted(rows, "heads").items():
            assert breakdown.shares[way]["heads"][2, 1, sample] == pytest.approx(value)


def test_all_tokens_with_a_direct_effect_of_zero_are_counted_without_a_ratio():
    dataset = fake_sweep()
    dataset["direct_effect"][0, 0, 0, :5] = 0
    breakdown = Breakdown.of_sweep(dataset, 1.0, n_bootstrap=5)
    assert all(np.isfinite(breakdown.shares[way][part]).all() for way in WAYS for part in PARTS)


def test_released_tables_are_counted_alike():
    """A heads table of a sweep gives what the sweep gives, as far as it can."""
    dataset = fake_sweep()
    table = heads_table(dataset, FRACTION)
    of_sweep, of_table = Breakdown.of_sweep(dataset, FRACTION, 5), Breakdown.of_table(table)
    for part in PARTS:
        for way, samples in of_table.over_heads(part).items():
            assert samples[0] == pytest.approx(of_sweep.over_heads(part)[way][0])


def test_published_shares():
    shares = {
        model: published_statistics(rows)["clipped LayerNorm share, mean over heads"][0]
        for model, rows in published_heads().groupby("model")
    }
    assert shares == pytest.approx({"pythia-160m": 0.34, "gpt2-small": 0.32, "pythia-410m": 0.25, "gpt2-medium": 0.30}, abs=0.01)


def test_scale_ratios_by_hand():
    dataset = fake_sweep()
    ratios = ScaleRatios.of_sweep(dataset, 3, 1, FRACTION)
    rows = tokens_of(dataset, 3, 1)
    found = ratios.share_above_one()
    assert found["top tokens"] == pytest.approx(statistics.fmean(row["sigma_clean"] / row["sigma_ablated"] > 1 for row in rows))
    assert found["low"] <= found["top tokens"] <= found["high"] and ratios.top.sum() == len(rows)
    table = heads_table(dataset, FRACTION)
    layer, head = strongest_head(table, -1)
    assert layer == 3 and table.query("layer == 3").set_index("head")["direct_effect"].idxmax() == head


def test_claims_by_hand():
    kinds = {kind: fake_sweep(seed, "gpt_neox", kind) for seed, kind in enumerate(("resample", "mean", "zero"))}
    found = {name: samples[0] for name, samples in layernorm_statistics(kinds, FRACTION, 10).items()}
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    shares = [statistics.fmean(counted(tokens_of(one, *head), "layernorm")["clipped"] for head in every) for one in kinds.values()]
    first = kinds["resample"]
    above = [
        statistics.fmean(row["sigma_clean"] > row["sigma_ablated"] for row in tokens_of(first, LAYERS - 1, head)) for head in range(HEADS)
    ]
    later = [row for layer in (2, 3) for head in range(HEADS) for row in tokens_of(first, layer, head)]
    assert list(found.values()) == pytest.approx(
        [shares[0], statistics.fmean(above), max(shares) - min(shares), counted(later, "mlps")["ratio of means"]]
    )
    assert len(layernorm_statistics({"zero": fake_sweep()}, FRACTION, 10)) == 2


@pytest.mark.parametrize("family", ["gpt2", "neox-parallel", "llama-gqa"])
def test_what_remains_with_the_norm_frozen(family, tmp_path):
    """Against a full forward pass with σ_clean forced on the final norm of the ablated run, in float64."""
    tokens = random_tokens()
    model = load_family(family, tmp_path)
    dataset = open_store(sweep(model, Prompts(tokens.numpy(), "random"), "resample", tmp_path / "out", progress=False))
    hf = AutoModelForCausalLM.from_pretrained(save_family(family, tmp_path / "again"), dtype=torch.float64)
    clean = reference.forward(hf, tokens)
    n_layers, n_heads = dataset.sizes["layer"], dataset.sizes["head"]
    norm = hf.base_model.ln_f if family == "gpt2" else hf.base_model.final_layer_norm if family == "neox-parallel" else hf.base_model.norm
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
            change = reference.centred_correct_logit(ablated, tokens) - reference.centred_correct_logit(clean["logits"], tokens)
            total += (change - (wanted["ablated_direct_effect"] - wanted["direct_effect"])).sum().item()
            effect += wanted["direct_effect"].sum().item()
    table = Breakdown.of_sweep(dataset, 1.0, 5).with_norm_frozen().set_index("final norm")
    assert table.loc["frozen", "self-repair over direct effect"] == pytest.approx(total / effect, rel=1e-4)
