"""The Hydra effect, measured, against a slow float64 reference: one full forward pass per replacement."""

import statistics

import numpy as np
import pytest
import reference
import torch
import xarray as xr
from families import ALL_FAMILIES
from made_up_facts import ablate_layers, made_up_prompts
from transformers import AutoModelForCausalLM

from selfrepair.engine.ablations import ABLATIONS
from selfrepair.errors import UserError
from selfrepair.measure import layers
from selfrepair.measure.facts import of_facts
from selfrepair.models.loading import load_model
from selfrepair.paths import MODELS
from selfrepair.text.facts import draw_donors

SCALARS = ("direct_effect", "total_effect", "compensation", "norm_term")


# ---------------------------------------------------------------- the slow way


@torch.no_grad()
def run(hf, tokens, replace=None):
    """One prompt through the whole model, with ``replace = (component, output)``; outputs of all components,
    final residual, logits."""
    blocks, projections, norm = reference._parts(hf)
    modules = [
        module for pair in zip(projections, reference.mlp_projections(hf), strict=True) for module in pair
    ]
    residuals, attention, handles = [], {}, []
    for block in blocks:
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs: residuals.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
    handles.append(norm.register_forward_pre_hook(lambda _, args: residuals.append(args[0])))
    if replace is not None:
        handles.append(modules[replace[0]].register_forward_hook(lambda *_: replace[1]))
    for layer, projection in enumerate(projections):
        handles.append(
            projection.register_forward_hook(
                lambda _, __, output, layer=layer: attention.__setitem__(layer, output)
            )
        )
    try:
        logits = hf(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    outputs = []
    for layer in range(len(blocks)):
        outputs += [attention[layer], residuals[layer + 1] - residuals[layer] - attention[layer]]
    return outputs, residuals[-1][0, -1], logits - logits.mean()


@torch.no_grad()
def slowly(hf, prompts, ablation, seed):
    """Every quantity, one full forward pass per component and donor: lists over (component, prompt) of lists
    over donors."""
    clean = [run(hf, tokens) for tokens in prompts.tokens]
    n_components = len(clean[0][0])
    norm = reference._parts(hf)[2]
    W_U = hf.get_output_embeddings().weight

    def effect(written, sigma, token):
        if type(norm).__name__ == "LayerNorm":
            written = written - written.mean()
        logits = W_U @ (norm.weight * written / sigma)
        return (logits - logits.mean())[token]

    donors = {i: [None] for i in range(len(prompts.tokens))}
    if ablation == "resample":
        donors = {i: [] for i in donors}
        for number, members in enumerate(prompts.groups):
            for i, j in draw_donors(prompts.answers[members], layers.N_DONORS, seed + number):
                donors[int(members[i])].append(int(members[j]))
    means = [torch.cat([outputs[c][0] for outputs, _, _ in clean]).mean(0) for c in range(n_components)]
    found = {}
    for i, (outputs, final, logits) in enumerate(clean):
        token = int(logits.argmax())
        sigma = reference.sigma(hf, final)
        constant = logits[token] - effect(final, sigma, token)
        own = [effect(output[0, -1], sigma, token) for output in outputs]
        for c in range(n_components):
            for donor in donors[i]:
                if ablation == "resample":
                    new = clean[donor][0][c]
                else:
                    new = (
                        means[c].expand_as(outputs[c]) if ablation == "mean" else torch.zeros_like(outputs[c])
                    )
                ablated, ablated_final, ablated_logits = run(hf, prompts.tokens[i], (c, new))
                change = [
                    effect(output[0, -1], sigma, token) - before
                    for output, before in zip(ablated, own, strict=True)
                ]
                change[c] = torch.tensor(0.0)
                row = {
                    "effect": own[c],
                    "direct_effect": own[c] - effect(new[0, -1], sigma, token),
                    "total_effect": logits[token] - ablated_logits[token],
                    "compensation": sum(change),
                    "norm_term": ablated_logits[token] - effect(ablated_final, sigma, token) - constant,
                    "change": change,
                    "token": token,
                }
                found.setdefault((c, i), []).append(row)
    return found


def check(measured, found, tolerance):
    measured = measured.transpose("ablated", "observed", "prompt")
    for (c, i), rows in found.items():
        scale = max(1.0, *(abs(float(row["total_effect"])) for row in rows))
        assert int(measured["token"][i]) == rows[0]["token"]
        assert abs(float(measured["effect"][c, i]) - float(rows[0]["effect"])) < tolerance * scale
        assert int(measured["n_donors"][i]) == len(rows)
        for name in SCALARS:
            values = [float(row[name]) for row in rows]
            assert abs(float(measured[name][c, i]) - statistics.fmean(values)) < tolerance * scale, (
                c,
                i,
                name,
            )
            spread = float(measured[f"{name}_spread"][c, i])
            if len(values) > 1:
                assert abs(spread - statistics.stdev(values)) < 3 * tolerance * scale
            else:
                assert np.isnan(spread)
        for observed in range(len(rows[0]["change"])):
            wanted = statistics.fmean(float(row["change"][observed]) for row in rows)
            assert abs(float(measured["change"][c, observed, i]) - wanted) < tolerance * scale, (
                c,
                observed,
                i,
            )


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_equals_full_forward_passes(family, name):
    model, hf = family(name)
    prompts = made_up_prompts()
    check(ablate_layers(model, prompts, "resample", seed=3), slowly(hf, prompts, "resample", 3), 1e-4)


@pytest.mark.parametrize("ablation", ("mean", "zero"))
@pytest.mark.parametrize("name", ("gpt2", "neox-parallel"))
def test_other_ablations_equal_full_forward_passes(family, name, ablation):
    model, hf = family(name)
    prompts = made_up_prompts(((3, 12), (2, 9)))
    check(ablate_layers(model, prompts, ablation), slowly(hf, prompts, ablation, 0), 1e-4)


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "neox-sequential", "opt"))
def test_float64_equals_the_reference_to_1e_9(family, name):
    model, hf = family(name, torch.float64)
    prompts = made_up_prompts(((3, 12), (2, 7)), seed=1)
    check(ablate_layers(model, prompts, "resample"), slowly(hf, prompts, "resample", 0), 1e-9)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_decomposition_is_exact(family, name, ablation):
    dtype = (
        torch.float32 if name.startswith("llama") else torch.float64
    )  # transformers' RMSNorm is float32 in any case
    model, _ = family(name, dtype)
    measured = ablate_layers(model, made_up_prompts(), ablation)
    rest = measured["total_effect"] - (
        measured["direct_effect"] - measured["compensation"] - measured["norm_term"]
    )
    assert abs(rest).max() < (1e-10 if dtype == torch.float64 else 1e-4)
    assert all(float(abs(measured[name]).max()) > 0.1 for name in SCALARS)
    xr.testing.assert_allclose(measured["change"].sum("observed"), measured["compensation"], atol=1e-5)


def test_downstream_by_hand():
    sequential, parallel = layers.downstream(2, False), layers.downstream(2, True)
    assert sequential.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert parallel.astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_trained_model_equals_the_reference():
    model = load_model("pocket-pythia-small", device="cpu")
    hf = AutoModelForCausalLM.from_pretrained(
        MODELS / "pocket-pythia-small", dtype=torch.float64, attn_implementation="sdpa"
    )
    prompts = made_up_prompts(((3, 10),), vocab=4096)
    check(ablate_layers(model, prompts, "resample"), slowly(hf, prompts, "resample", 0), 1e-4)


def test_chunks_do_not_matter(family, monkeypatch):
    model, _ = family("gpt2")
    prompts = made_up_prompts()
    whole = ablate_layers(model, prompts, "resample")
    monkeypatch.setattr(layers, "TOKENS_AT_ONCE", 30)
    xr.testing.assert_allclose(ablate_layers(model, prompts, "resample"), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_shards_together_are_one_computation(family, ablation):
    """Attention layers and MLPs apart: to the last bit, and all else is the same in both."""
    model, _ = family("neox-sequential")
    facts = of_facts(made_up_prompts(((5, 12), (2, 11), (3, 9))))
    whole = layers.ablate_layers(model, facts, ablation, 2)
    settings = {"ablation": ablation, "seed": 2}
    shards = layers.MEASUREMENT.shards(settings)
    parts = [layers.MEASUREMENT.compute(model, settings, {"facts": facts}, shard) for shard in shards]
    assert len(parts) == 2
    for part in parts:
        assert part.sizes["ablated"] == model.n_layers
        same = [name for name, variable in part.variables.items() if "ablated" not in variable.dims]
        assert {"effect", "token", "n_donors", "answered", "prompt"} <= set(same)
        xr.testing.assert_identical(part[same], whole[same])
        xr.testing.assert_identical(part, whole.sel(ablated=part["ablated"]))
    assert sorted(np.concatenate([part["ablated"] for part in parts])) == list(range(2 * model.n_layers))


def test_refuses_what_it_cannot_measure(family):
    model, _ = family("gpt2")
    with pytest.raises(UserError, match="unknown ablation 'knockout'"):
        ablate_layers(model, made_up_prompts(), "knockout")
