"""Notebook 03: the final norm's scale, and what the claims are about."""

import statistics

import numpy as np
import pytest
import reference
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
from families import random_tokens

from selfrepair.analysis.breakdown import FLOOR, WAYS, wide
from selfrepair.analysis.claims import claims_table, verdicts
from selfrepair.analysis.head_table import heads_table, strongest_head
from selfrepair.analysis.layernorm import (
    ScaleRatios,
    above_floor,
    breakdowns,
    by_model,
    by_place,
    claimed,
    head_to_show,
    heads_without_repair,
    last_layers_head,
    layer_table,
    layernorm_statistics,
    means_of_all_tokens,
    means_of_top_tokens,
    released_breakdowns,
    restored_logits,
    restored_shares,
    scale_ratios,
    scale_table,
    second_to_last_layer,
    shares_over_heads,
    shares_over_tokens,
)
from selfrepair.analysis.rules import load_claims, load_statistics
from selfrepair.errors import UserError
from selfrepair.measure.heads import MEASUREMENT
from selfrepair.measure.tokens import of_prompts
from selfrepair.plots.layernorm import scale_ratio_histograms
from selfrepair.statistics import bootstrap_weights
from selfrepair.text.corpora import Prompts


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
    assert last_layers_head(dataset, FRACTION) == (layer, head)


def test_the_head_that_is_given_is_shown_if_the_model_has_it():
    dataset = fake_sweep()
    assert head_to_show(dataset, FRACTION) == last_layers_head(dataset, FRACTION)
    assert head_to_show(dataset, FRACTION, (0, HEADS - 1)) == (0, HEADS - 1)
    for head in ((LAYERS, 0), (0, HEADS), (-1, 0)):
        with pytest.raises(UserError, match=rf"layers from 0 to {LAYERS - 1}, heads from 0 to {HEADS - 1}"):
            head_to_show(dataset, FRACTION, head)


def test_histograms_say_how_many_tokens_they_leave_out():
    sweeps = {"m": {kind: fake_sweep(seed) for seed, kind in enumerate(("resample", "zero"))}}
    ratios = scale_ratios(sweeps, FRACTION, (3, 1))
    for axis, one in zip(scale_ratio_histograms(ratios).axes, ratios[0], strict=True):
        edges = np.unique(np.concatenate([patch.get_xy()[:, 0] for patch in axis.patches]))
        for values, label in zip(
            (one.all_tokens, one.all_tokens[one.top]), axis.get_legend_handles_labels()[1], strict=False
        ):
            outside = sum(value < edges[0] or value > edges[-1] for value in values.ravel())
            assert label.endswith(f"{(values > 1).mean():.0%} above 1, {outside} outside")
        for patch, values in zip(axis.patches, (one.all_tokens, one.all_tokens[one.top]), strict=True):
            corners = patch.get_xy()
            bins = np.linspace(edges[0], edges[-1], 45)
            density = np.histogram(values, bins, density=True)[0]
            assert corners[:, 1].max() == pytest.approx(density.max())
            at_largest = corners[corners[:, 1] == corners[:, 1].max(), 0]
            assert bins[density.argmax()] == pytest.approx(at_largest.min())
        (mark,) = [line for line in axis.lines if line.get_marker() == "v"]
        assert mark.get_xdata()[0] == statistics.median(one.all_tokens[one.top].tolist())


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


def test_tables_of_ours_and_of_what_was_released():
    sweeps = {name: {"resample": fake_sweep(seed), "zero": fake_sweep(9)} for seed, name in enumerate("ab")}
    ours, released = breakdowns(sweeps, FRACTION), released_breakdowns()
    assert list(released) == ["gpt2-small", "gpt2-medium", "pythia-160m", "pythia-410m"]
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    found = [counted(tokens_of(sweeps["b"]["resample"], *head), "layernorm") for head in every]
    level = statistics.fmean(floor(tokens_of(sweeps["b"]["resample"], *head), "layernorm") for head in every)
    for table, median in (
        (shares_over_heads(ours), statistics.median(one["ratio of means"] for one in found)),
        (shares_over_tokens(ours), statistics.fmean(one["median"] for one in found)),
    ):
        row = wide(table).loc["b"]
        assert list(row.index) == [*WAYS, FLOOR]
        assert row["clipped"] == pytest.approx(statistics.fmean(one["clipped"] for one in found))
        assert row["median"] == pytest.approx(median) and row[FLOOR] == pytest.approx(level)
    both = ours | released
    assert second_to_last_layer(both)["model"].tolist() == [*both]
    without = wide(heads_without_repair(both))
    assert list(without) == ["heads", "clipped share", "floor"] and list(without.index) == [*both]
    assert without.loc[[*released], "floor"].isna().all() and without.loc["pythia-160m", "heads"] > 0.5
    assert layer_table(ours).groupby("model", sort=False)["layer"].nunique().to_dict() == {"fake": LAYERS}
    by_layer = layer_table({"b": ours["b"]})
    placed = by_place(by_layer)
    assert len(placed) == LAYERS * 3 and set(placed["from_last"] + placed["layer"]) == {LAYERS - 1}
    assert placed[placed["is_later"]]["layer"].unique().tolist() == [2, 3]
    for row in placed.to_dict("records"):
        same = by_layer[(by_layer["layer"] == row["layer"]) & (by_layer["part"] == row["part"])]
        assert {**row, **same.set_index("quantity")["estimate"]} == row
    gap = above_floor(ours, "layernorm").set_index("model").loc["b"]
    assert gap["estimate"] == pytest.approx(statistics.fmean(one["clipped"] for one in found) - level)
    assert gap["low"] < gap["estimate"] < gap["high"]
    top, everywhere = means_of_top_tokens(ours, released), means_of_all_tokens(sweeps)
    assert [*top] == ["a", "b", *(f"{name} (published)" for name in released)]
    assert [*everywhere] == ["a", "b", "gpt2-small (published)", "pythia-160m (published)"]
    effects = sweeps["a"]["resample"]["direct_effect"][2:]
    assert wide(restored_logits(everywhere)).loc["a", "direct effect"] == pytest.approx(float(effects.mean()))
    share = wide(restored_shares(top)).loc["gpt2-small (published)", "heads"]
    assert share == pytest.approx(0.17, abs=0.005)
    measured, published = claimed(sweeps, FRACTION)
    assert measured["a"]["layernorm-clipped-floor"].value == ours["a"].floor("layernorm")[FLOOR].value
    assert [*measured] == ["a", "b"] and [*published] == []  # released at another share of tokens
    assert [*claimed(sweeps, 0.02)[1]] == [*released]


def plain_statistics(kinds, prompts=range(PROMPTS)):
    """Of sweeps by kind of ablation, the prompts as often as they are named."""
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    shares, floors = (
        [statistics.fmean(count(tokens_of(one, *head, prompts)) for head in every) for one in kinds.values()]
        for count in (
            lambda rows: counted(rows, "layernorm")["clipped"],
            lambda rows: floor(rows, "layernorm"),
        )
    )
    first = next(iter(kinds.values()))
    clean, ablated = first["sigma_clean"].values, first["sigma_ablated"].values[-1]
    above = [
        statistics.fmean(
            row["sigma_clean"] > row["sigma_ablated"] for row in tokens_of(first, LAYERS - 1, head, prompts)
        )
        for head in range(HEADS)
    ]
    everywhere = [
        clean[prompt, position] > ablated[head, prompt, position]
        for head in range(HEADS)
        for prompt in prompts
        for position in range(clean.shape[1])
    ]
    later = [tokens_of(first, layer, head, prompts) for layer in (2, 3) for head in range(HEADS)]
    mlps, effects = (
        sum(statistics.fmean(row[name] for row in rows) for rows in later)
        for name in ("mlps", "direct_effect")
    )
    return {
        "layernorm-clipped-share": shares[0],
        "layernorm-clipped-floor": floors[0],
        "sigma-falls-last-layer": statistics.fmean(above),
        "sigma-falls-all-tokens": statistics.fmean(everywhere),
        "layernorm-share-over-ablations": max(shares) - min(shares),
        "layernorm-floor-over-ablations": max(floors) - min(floors),
        "mlp-repair-pythia": mlps / effects,
    }


@pytest.mark.slow("claims on the final norm, and their controls, equal plain loops")
def test_claims_and_their_controls_by_hand():
    """Values, and every sample as counting the drawn prompts anew gives it."""
    kinds = {
        kind: fake_sweep(seed, "gpt_neox", kind) for seed, kind in enumerate(("resample", "mean", "zero"))
    }
    found = layernorm_statistics(kinds, FRACTION, 3, seed=1)
    assert {name: one.value for name, one in found.items()} == pytest.approx(plain_statistics(kinds))
    for sample, weights in enumerate(bootstrap_weights(PROMPTS, 3, 1)):
        drawn = [prompt for prompt, count in enumerate(weights) for _ in range(int(count))]
        for name, value in plain_statistics(kinds, drawn).items():
            assert found[name].samples[sample] == pytest.approx(value), name
    used = {claim.statistic for claim in load_claims() if claim.notebook == "03"}
    assert set(found) == used | {load_statistics()[name].control_id for name in used} - {None}
    alone = layernorm_statistics({"zero": fake_sweep()}, FRACTION, 10)
    assert len(alone) == 4 and not any("over-ablations" in name for name in alone)


def test_of_all_tokens_there_is_no_claim_about_top_tokens():
    """The statistic would be its control; and released means are over the top 2%."""
    sweeps = {"fake": {"zero": fake_sweep()}}
    measured, released = claimed(sweeps, 1)
    assert released == {} and not any("sigma" in name for name in measured["fake"])
    found = verdicts(claims_table("03", measured, released))
    assert found["sigma-falls"] == "not testable here" != found["layernorm-share"]
    measured, released = claimed(sweeps, 0.02)
    assert len(released) == 4 and "sigma-falls-last-layer" in measured["fake"]


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa"])
def test_claims_against_full_forward_passes(family, name):
    """Every statistic and its control, from plain float64 models."""
    model, hf = family(name)
    tokens = random_tokens(8)
    inputs = {"tokens": of_prompts(Prompts(tokens.numpy(), "random"))}
    found = layernorm_statistics(
        {
            kind: MEASUREMENT.compute(model, {"ablation": kind}, inputs, 0).assign_attrs(
                model=model.name, architecture="gpt_neox"
            )
            for kind in ("resample", "zero")
        },
        0.25,
        2,
    )
    n_layers, n_heads = model.n_layers, model.n_heads
    clipped, floors, top_falls, all_falls, mlps, effects = {}, {}, [], [], 0.0, 0.0
    for kind in ("resample", "zero"):
        clipped[kind], floors[kind] = [], []
        for layer in range(n_layers):
            for head in range(n_heads):
                wanted = reference.ablate(hf, tokens, layer, head, kind)
                effect = wanted["direct_effect"].flatten()
                top = effect.argsort(descending=True)[:22]  # a quarter of 88
                ratio = (wanted["layernorm_formula"].flatten() / effect)[top]
                clipped[kind].append(ratio.clamp(0, 1).mean().item())
                floors[kind].append(ratio.abs().clamp(max=1).mean().item() / 2)
                falls = (wanted["sigma_clean"] > wanted["sigma_ablated"]).flatten().double()
                if kind == "resample" and layer == n_layers - 1:
                    top_falls.append(falls[top].mean().item())
                    all_falls.append(falls.mean().item())
                if kind == "resample" and layer >= round(0.5 * n_layers):
                    mlps += wanted["self_repair_mlps"].flatten()[top].sum().item()
                    effects += effect[top].sum().item()
    shares, levels = ([statistics.fmean(of_kind) for of_kind in by.values()] for by in (clipped, floors))
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {
            "layernorm-clipped-share": shares[0],
            "layernorm-clipped-floor": levels[0],
            "sigma-falls-last-layer": statistics.fmean(top_falls),
            "sigma-falls-all-tokens": statistics.fmean(all_falls),
            "layernorm-share-over-ablations": max(shares) - min(shares),
            "layernorm-floor-over-ablations": max(levels) - min(levels),
            "mlp-repair-pythia": mlps / effects,
        },
        rel=1e-3,
        abs=1e-4,
    )


def test_a_model_without_repair_reproduces_nothing():
    """Its clipped share is in the paper's range, but not above its floor."""
    measured = {
        f"model {i}": layernorm_statistics(
            {kind: without_repair(10 * i + k, kind) for k, kind in enumerate(("resample", "mean", "zero"))},
            0.1,
        )
        for i in range(4)
    }
    for found in measured.values():
        share, level = (found[f"layernorm-clipped-{what}"] for what in ("share", "floor"))
        assert 0.2 < share.value < 0.4 and share.value == pytest.approx(level.value, abs=0.005)
    table = claims_table("03", measured)
    assert set(verdicts(table).values()) <= {"undecided", "not reproduced"}
    share = table[table["claim"] == "layernorm-share"]
    assert set(share["holds"]) <= {"open", "no"} and np.isfinite(share["control"]).all()
