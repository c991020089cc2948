"""Shares of the direct effect by part: ways of counting, floors, heads without repair, all tokens."""

import math
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import reference
import torch
from fake_sweeps import (
    FRACTION,
    HEADS,
    LAYERS,
    PROMPTS,
    counted,
    fake_sweep,
    floor,
    tokens_of,
    without_repair,
)
from families import load_family, random_tokens, save_family
from transformers import AutoModelForCausalLM

from selfrepair.analysis.breakdown import FLOOR, RESOLVED, SUMS, WAYS, Breakdown, PartMeans, table_of
from selfrepair.analysis.head_table import heads_table
from selfrepair.analysis.layernorm import published_statistics
from selfrepair.analysis.published import published_heads
from selfrepair.analysis.shares import clipped_floor
from selfrepair.measure.heads import MEASUREMENT
from selfrepair.measure.tokens import of_prompts
from selfrepair.plots import layernorm as plots
from selfrepair.statistics import PARTS, bootstrap_weights, clipped_share
from selfrepair.text.corpora import Prompts


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
                assert breakdown.floors[part][layer, head].value == pytest.approx(floor(rows, part))
            both = [row for head in range(HEADS) for row in tokens_of(dataset, layer, head)]
            assert by_layer[layer, part, "ratio of means"] == pytest.approx(
                counted(both, part)["ratio of means"]
            )
            assert by_layer[layer, part, "logits"] == pytest.approx(
                statistics.fmean(row[part] for row in both)
            )
            assert by_layer[layer, part, FLOOR] == pytest.approx(
                statistics.fmean(floor(tokens_of(dataset, layer, head), part) for head in range(HEADS))
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
    dataset = fake_sweep(seed=1)
    breakdown = Breakdown.of_sweep(dataset, FRACTION, n_bootstrap=5, seed=3)
    for sample, weights in enumerate(bootstrap_weights(PROMPTS, 5, 3)):
        drawn = [prompt for prompt, count in enumerate(weights) for _ in range(int(count))]
        rows = tokens_of(dataset, 2, 1, drawn)
        for way, value in counted(rows, "heads").items():
            assert breakdown.shares[way]["heads"][2, 1].samples[sample] == pytest.approx(value)
        assert breakdown.floors["heads"][2, 1].samples[sample] == pytest.approx(floor(rows, "heads"))


def test_all_tokens_with_a_direct_effect_of_zero_are_counted_without_a_ratio():
    dataset = fake_sweep()
    dataset["direct_effect"][0, 0, 0, :5] = 0
    breakdown = Breakdown.of_sweep(dataset, 1.0, n_bootstrap=5)
    others = [way for way in WAYS if way != "unclipped mean"]
    assert all(np.isfinite(breakdown.shares[way][part].drawn).all() for way in others for part in PARTS)


def test_a_head_with_unresolved_direct_effects_has_no_unclipped_mean():
    """Of these tokens alone that it is judged on, and of either sign; of other heads it is as it was."""
    dataset = fake_sweep()
    effect = dataset["direct_effect"][2, 1].values
    order = np.argsort(-effect, axis=None)
    last = np.unravel_index(order[math.ceil(FRACTION * effect.size) - 1], effect.shape)
    before = Breakdown.of_sweep(dataset, FRACTION, n_bootstrap=5).shares["unclipped mean"]
    effect[effect <= effect[last]] = -1  # the last of the top tokens is the smallest of them below
    for smallest, has_one in ((RESOLVED, True), (0.999 * RESOLVED, False), (-0.999 * RESOLVED, False)):
        effect[last] = smallest
        shares = Breakdown.of_sweep(dataset, FRACTION, n_bootstrap=5).shares["unclipped mean"]
        for part in PARTS:
            assert np.isfinite(shares[part].drawn[2, 1]).all() == has_one
            assert np.isnan(shares[part].drawn[2, 1]).all() != has_one
            np.testing.assert_array_equal(shares[part].drawn[:2], before[part].drawn[:2])


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


def test_tables_have_a_row_for_each_model_and_name():
    breakdown = Breakdown.of_sweep(fake_sweep(), FRACTION, 30)
    measured = breakdown.over_heads("layernorm") | breakdown.floor("layernorm")
    released = Breakdown.of_table(published_heads().query("model == 'gpt2-small'"))
    assert released.floor("layernorm") == {}
    table = table_of({"fake": measured, "published": released.over_heads("layernorm")}, "way")
    assert table["way"].tolist() == [*WAYS, FLOOR, *WAYS]
    assert table["model"].tolist() == 5 * ["fake"] + 4 * ["published"]
    for row in table.iloc[:5].itertuples():
        samples = measured[row.way].samples
        assert row.estimate == measured[row.way].value
        assert (row.low, row.high) == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))
    assert table.loc[5:, ["low", "high"]].isna().all(axis=None) and np.isfinite(table["estimate"]).all()


# --- what clipping makes of noise ---


def test_the_floor_is_what_random_signs_give():
    """The closed form against signs drawn 4,000 times, and against both signs of every token."""
    rng = np.random.default_rng(0)
    part, effect = rng.normal(size=60), rng.lognormal(-0.5, 1, 60)
    part[0] = effect[1] = 0
    closed = clipped_floor(part, effect)
    by_hand = [0 if e == 0 else min(abs(p / e), 1) / 2 for p, e in zip(part, effect, strict=True)]
    assert closed == pytest.approx(np.array(by_hand))
    signs = rng.choice([-1, 1], size=(4000, 60))
    drawn = np.array([clipped_share(sign * part, effect) for sign in signs])
    assert drawn.mean(0) == pytest.approx(closed, abs=4 * 0.5 / np.sqrt(4000))
    assert drawn.mean() == pytest.approx(closed.mean(), abs=4 * drawn.mean(1).std() / np.sqrt(4000))
    assert clipped_floor(part, -effect) == pytest.approx(closed)


def test_noise_has_the_share_of_its_floor():
    """A part without a sign has a share in the paper's range, and a mean repair of about 0."""
    breakdown = Breakdown.of_sweep(without_repair(prompts=60), FRACTION, 200)
    share, level = (one["layernorm"].mean((0, 1)) for one in (breakdown.shares["clipped"], breakdown.floors))
    low, high = (share - level).interval()
    assert low < 0 < high and 0.2 < share.value < 0.4
    assert share.value == pytest.approx(level.value, abs=0.002)
    restored = breakdown.means.restored(["layernorm"])
    low, high = restored.interval()
    assert low < 0 < high and restored.value == pytest.approx(0, abs=0.005)


def test_heads_without_repair_by_hand():
    """One of which repairs nothing at all."""
    dataset = fake_sweep(seed=2)
    dataset["self_repair_mlps"][1, 0] = 0
    breakdown = Breakdown.of_sweep(dataset, FRACTION, 4, seed=5)
    found = breakdown.without_repair("mlps")
    everything = [range(PROMPTS)]
    for weights in bootstrap_weights(PROMPTS, 4, 5):
        everything.append([prompt for prompt, count in enumerate(weights) for _ in range(int(count))])
    for draw, prompts in enumerate(everything):
        heads = [tokens_of(dataset, layer, head, prompts) for layer in range(LAYERS) for head in range(HEADS)]
        none = [rows for rows in heads if sum(row["mlps"] for row in rows) <= 0]
        wanted = {
            "heads": len(none) / len(heads),
            "clipped share": statistics.fmean(counted(rows, "mlps")["clipped"] for rows in none),
            "floor": statistics.fmean(floor(rows, "mlps") for rows in none),
        }
        assert {name: one.drawn[draw] for name, one in found.items()} == pytest.approx(wanted)
    released = Breakdown.of_table(heads_table(dataset, FRACTION))
    assert set(released.without_repair("mlps")) == {"heads", "clipped share"}


# --- what the released numbers say ---


def test_heads_without_repair_have_released_shares():
    found = {
        model: Breakdown.of_table(rows).without_repair("layernorm")
        for model, rows in published_heads().groupby("model")
    }
    heads = {model: round(one["heads"].value, 2) for model, one in found.items()}
    shares = {model: round(one["clipped share"].value, 2) for model, one in found.items()}
    assert heads == {"gpt2-small": 0.4, "gpt2-medium": 0.39, "pythia-160m": 0.57, "pythia-410m": 0.48}
    assert shares == {"gpt2-small": 0.23, "gpt2-medium": 0.24, "pythia-160m": 0.3, "pythia-410m": 0.2}


def test_the_authors_number_of_the_second_to_last_layer():
    for model, wanted in {
        "gpt2-small": 0.25,
        "gpt2-medium": 0.19,
        "pythia-160m": 0.17,
        "pythia-410m": 0.23,
    }.items():
        rows = published_heads()[published_heads()["model"] == model]
        layer = rows["layer"].max() - 1
        ratios = [
            row.self_repair_layernorm / row.direct_effect for row in rows[rows["layer"] == layer].itertuples()
        ]
        found = Breakdown.of_table(rows).second_to_last("layernorm").value
        assert found == pytest.approx(statistics.fmean(ratios)) and round(found, 2) == wanted
    dataset = fake_sweep()
    found = Breakdown.of_sweep(dataset, FRACTION, 5).second_to_last("heads").value
    rows = [tokens_of(dataset, LAYERS - 2, head) for head in range(HEADS)]
    assert found == pytest.approx(statistics.fmean(counted(one, "heads")["ratio of means"] for one in rows))


@pytest.mark.parametrize(
    ("tokens", "model", "part", "wanted"),
    [
        ("top2pct", "gpt2-small", "heads", 0.17),
        ("top2pct", "gpt2-small", "mlps", -0.09),
        ("top2pct", "pythia-160m", "heads", -0.04),
        ("top2pct", "pythia-160m", "mlps", 0.15),
        ("all_tokens", "gpt2-small", "self-repair", -0.44),
        ("all_tokens", "pythia-160m", "self-repair", -0.36),
    ],
)
def test_released_parts_of_the_later_half(tokens, model, part, wanted):
    rows = published_heads(tokens).query("model == @model and layer >= 6")
    columns = SUMS[part]
    total = sum(sum(rows[f"self_repair_{column}"]) for column in columns)
    found = PartMeans.of_table(published_heads(tokens).query("model == @model")).restored_by_part()[part]
    assert found.value == pytest.approx(total / sum(rows["direct_effect"]))
    assert found.value == pytest.approx(wanted, abs=0.0051)


# --- parts ---


def test_parts_over_all_tokens_by_hand():
    dataset = fake_sweep(seed=3)
    dataset["direct_effect"][:] += 0.5
    means = PartMeans.of_sweep(dataset, 1.0, n_bootstrap=3)
    effect, heads, mlps = (
        dataset[name].values[2:].mean() for name in ("direct_effect", "self_repair_heads", "self_repair_mlps")
    )
    change = (dataset["logit_change"] - dataset["ablated_direct_effect"]).values[2:].mean() + effect
    wanted = {"heads": heads, "mlps": mlps, "norm frozen": heads + mlps, "self-repair": change}
    wanted["layernorm"] = change - heads - mlps
    found = {name: one.value for name, one in means.by_part().items()}
    assert found == pytest.approx({"direct effect": effect} | wanted)
    shares = {name: one.value for name, one in means.restored_by_part().items()}
    assert shares == pytest.approx({name: value / effect for name, value in wanted.items()})


def test_there_is_no_share_of_a_negative_direct_effect():
    dataset = fake_sweep()
    dataset["direct_effect"][:] -= 5
    means = PartMeans.of_sweep(dataset, 1.0, n_bootstrap=3)
    assert all(np.isnan(one.drawn).all() for one in means.restored_by_part().values())
    assert all(np.isfinite(one.drawn).all() for one in means.by_part().values())


# --- what the figures plot ---


def test_shares_are_drawn_beside_their_floors():
    measured = {name: Breakdown.of_sweep(fake_sweep(seed), FRACTION, 20) for seed, name in enumerate("ab")}
    released = {
        model: Breakdown.of_table(rows) for model, rows in published_heads().groupby("model", sort=False)
    }
    figure = plots.shares_and_floors(measured, released)
    drawn = iter(figure.axes[0].lines)
    for breakdown in measured.values():
        for part in PARTS:
            share, level = (one[part].mean((0, 1)) for one in (breakdown.shares["clipped"], breakdown.floors))
            interval, value, tick = (next(drawn).get_xdata() for _ in range(3))
            assert list(interval) == pytest.approx(list(share.interval()))
            assert (value[0], tick[0]) == (share.value, level.value)
    for axis, models in zip(figure.axes[1:], (measured, released), strict=True):
        for points, breakdown in zip(axis.collections, models.values(), strict=True):
            x, y = points.get_offsets().data.T
            ratio = breakdown.shares["ratio of means"]["layernorm"].value.ravel()
            assert x == pytest.approx(np.clip(ratio, -1, 1))
            assert y == pytest.approx(breakdown.shares["clipped"]["layernorm"].value.ravel())
    figure.canvas.draw()
    plt.close(figure)


def test_clipped_shares_by_layer_stand_above_dotted_floors():
    table = Breakdown.of_sweep(fake_sweep(), FRACTION, 20).by_layer()
    figure = plots.breakdown_by_layer(table)
    clipped = figure.axes[1 + WAYS.index("clipped")]
    dotted = [line for line in clipped.lines if line.get_linestyle() == ":"]
    for line, part in zip(dotted, PARTS, strict=True):
        wanted = table[(table["part"] == part) & (table["quantity"] == FLOOR)]["estimate"]
        assert line.get_ydata() == pytest.approx(wanted.to_numpy())
    plt.close(figure)


def lying_bars(axis):
    """Ends of the level lines of two points, and their height."""
    lines = (line for line in axis.lines if len(line.get_xdata()) == 2)
    level = [line for line in lines if len(set(line.get_ydata())) == 1 and set(line.get_xdata()) != {0, 1}]
    return [tuple(line.get_xdata()) for line in level]


def test_bars_of_parts_end_where_intervals_do():
    """In every figure of shares; longer above than below."""
    table = pd.DataFrame(
        [
            {"model": "m", "layer": layer, "part": part, "quantity": quantity}
            | {"estimate": 0.2 + layer / 10, "low": 0.15 + layer / 10, "high": 0.4 + layer / 10}
            for quantity in ("logits", *WAYS, FLOOR)
            for part in PARTS
            for layer in (0, 1)
        ]
    )
    for axis in plots.breakdown_by_layer(table).axes:
        for bars in axis.containers:
            ends = [bar[:, 1] for bar in bars[2][0].get_segments()]
            np.testing.assert_allclose(ends, [[0.15, 0.4], [0.25, 0.5]])
    spans = {part: (0.1 + i / 50, 0.4 + i / 50) for i, part in enumerate(plots.SUMS)}
    of_parts = pd.DataFrame(
        [
            {"model": "m", "part": part, "estimate": 0.3, "low": low, "high": high}
            for part, (low, high) in spans.items()
        ]
    )
    for axis in plots.restored_by_part(of_parts, of_parts, "made up").axes:
        assert lying_bars(axis) == list(spans.values())
    ways = {way: (0.1 + i / 50, 0.4 + i / 50) for i, way in enumerate(WAYS)}
    of_ways = pd.DataFrame(
        [
            {"model": "m", "way": way, "estimate": 0.3, "low": low, "high": high}
            for way, (low, high) in ways.items()
        ]
    )
    (axis,) = plots.ways_of_counting(of_ways, of_ways.drop(columns=["low", "high"])).axes
    assert lying_bars(axis) == list(ways.values())
    plt.close("all")


def test_parts_are_drawn_apart_and_what_was_not_released_is_said():
    means = {
        "top only": PartMeans.of_sweep(fake_sweep(), FRACTION, 20),
        "both": PartMeans.of_sweep(fake_sweep(1), FRACTION, 20),
    }
    shares = table_of({name: one.restored_by_part() for name, one in means.items()}, "part")
    logits = table_of({"both": means["both"].by_part()}, "part")
    figure = plots.restored_by_part(shares, logits, "fake")
    top, everywhere = figure.axes
    labels = {label: part for part, label in plots.SUM_LABELS.items()}
    for axis, table in ((top, shares), (everywhere, logits)):
        found = {}
        for line in axis.lines:
            if line.get_label() in labels and len(line.get_xdata()) == 1:
                y = round(float(line.get_ydata()[0]))
                found[list(means)[y], labels[line.get_label()]] = line.get_xdata()[0]
        wanted = table[table["part"] != "direct effect"].set_index(["model", "part"])["estimate"]
        assert found == pytest.approx(wanted.to_dict())
    assert [text.get_text() for text in everywhere.texts] == ["not released"]
    assert [text.get_position()[1] for text in everywhere.texts] == [0] and not top.texts
    figure.canvas.draw()
    plt.close(figure)


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
    found = PartMeans.of_sweep(dataset, 1.0, 5).by_part()
    share = found["norm frozen"].value / found["direct effect"].value
    assert share == pytest.approx(total / effect, rel=1e-4)
