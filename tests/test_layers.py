"""The Hydra effect, measured, against a slow float64 reference and a model whose compensation is planted."""

import statistics

import numpy as np
import pytest
import reference
import torch
import xarray as xr
from families import ALL_FAMILIES, VOCAB
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from selfrepair.analysis.layer_means import LayerMeans
from selfrepair.analysis.layers import statistics as layer_statistics
from selfrepair.engine.ablations import ABLATIONS
from selfrepair.errors import UserError
from selfrepair.measure import layers
from selfrepair.measure.facts import of_facts
from selfrepair.measure.task import described
from selfrepair.models.loading import load_model
from selfrepair.paths import MODELS
from selfrepair.text.facts import AskedFact, FactPrompts, draw_donors

SCALARS = ("direct_effect", "total_effect", "compensation", "norm_term")


def ablate_layers(model, prompts, ablation, seed=0, components=None):
    return layers.ablate_layers(model, of_facts(prompts), ablation, seed, components)


def made_up_prompts(sizes=((5, 12), (3, 9)), vocab=VOCAB, seed=0):
    """Random prompts, ``sizes`` = (how many, how long) of each length."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(vocab, size=length).tolist() for n, length in sizes for _ in range(n)]
    ends = np.cumsum([n for n, _ in sizes])
    groups = [np.arange(end - n, end) for end, (n, _) in zip(ends, sizes, strict=True)]
    n = len(tokens)
    facts = [
        AskedFact(f"prompt {i}", " answer", "relation", "trained" if i % 2 else "held out") for i in range(n)
    ]
    return FactPrompts(facts, tokens, rng.integers(3, size=n), groups, n, n, 0)


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
                    new = means[c].expand_as(outputs[c]) if ablation == "mean" else torch.zeros_like(outputs[c])
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


# ---------------------------------------------------------------- a model whose compensation is planted

SHARE = 0.4
WRITER = 4  # attention of layer 2
COMPENSATOR = {"attention": 6, "MLP": 7}  # of layer 3


def pair(k, d_model=20):
    vector = torch.zeros(d_model, dtype=torch.float64)
    vector[2 * k], vector[2 * k + 1] = 0.5**0.5, -(0.5**0.5)
    return vector


@pytest.fixture(scope="module", params=("attention", "MLP"))
def planted(request, tmp_path_factory):
    """Attention 2 writes the mean of the tokens' feature F so far along U; in layer 3 one part takes away
    ``SHARE`` of what lies along U.

    Other parts write nothing or a constant along U. Norms have so large an ε that they are linear, so that
    the final norm does nothing.
    """
    config = GPT2Config(
        vocab_size=8,
        n_positions=8,
        n_embd=20,
        n_layer=4,
        n_head=1,
        n_inner=2,
        activation_function="relu",
        layer_norm_epsilon=1e16,
        tie_word_embeddings=False,
    )
    hf = GPT2LMHeadModel(config).double()
    U, F = pair(8), pair(9)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        for name, parameter in hf.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.fill_(1e8)
        base = hf.transformer
        base.wte.weight.copy_(torch.outer(torch.arange(1.0, 9.0), F))
        base.wpe.weight.copy_(torch.stack([pair(k) for k in range(8)]))
        hf.lm_head.weight[0] = U
        base.h[2].attn.c_attn.weight[:, 40:] = torch.eye(20)
        base.h[2].attn.c_proj.weight.copy_(torch.outer(F, U))
        base.h[0].mlp.c_proj.bias.copy_(0.3 * U)
        base.h[1].attn.c_proj.bias.copy_(0.2 * U)
        last = base.h[3]
        if request.param == "attention":
            positions = sum(torch.outer(pair(k), pair(k)) for k in range(8))
            last.attn.c_attn.weight[:, :20] = last.attn.c_attn.weight[:, 20:40] = (
                1e3 * positions
            )  # every position sees itself alone
            last.attn.c_attn.weight[:, 40:] = torch.eye(20)
            last.attn.c_proj.weight.copy_(-SHARE * torch.outer(U, U))
        else:
            last.mlp.c_fc.weight.copy_(torch.stack([U, -U], dim=1))
            last.mlp.c_proj.weight.copy_(SHARE * torch.stack([-U, U]))
    folder = tmp_path_factory.mktemp("planted") / "planted"
    hf.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(MODELS / "pocket-gpt2").save_pretrained(folder)
    return request.param, load_model(str(folder), device="cpu", dtype=torch.float64)


def test_planted_compensation_is_found_and_nothing_else(planted):
    part, model = planted
    prompts = made_up_prompts(((6, 5), (4, 7)), vocab=8)
    measured = ablate_layers(model, prompts, "resample", seed=5).transpose("ablated", "observed", "prompt")
    written = np.array([np.mean(np.array(tokens) + 1.0) for tokens in prompts.tokens])
    centred = 7 / 8  # the logit of one of eight tokens when the others' are 0
    np.testing.assert_allclose(measured["clean_logit"], centred * (1 - SHARE) * (written + 0.5), atol=1e-9)
    assert (measured["token"] == 0).all()
    wanted_effect = np.zeros((8, len(written)))
    wanted_effect[[1, 2, WRITER, COMPENSATOR[part]]] = (
        np.full_like(written, 0.3),
        np.full_like(written, 0.2),
        written,
        -SHARE * (written + 0.5),
    )
    np.testing.assert_allclose(measured["effect"], centred * wanted_effect, atol=1e-9)
    lost = np.zeros_like(written)
    for number, members in enumerate(prompts.groups):
        pairs = draw_donors(prompts.answers[members], layers.N_DONORS, 5 + number)
        for i, member in enumerate(members):
            lost[member] = centred * (
                written[member] - np.mean([written[members[j]] for k, j in pairs if k == i])
            )
    assert np.abs(lost).max() > 0.5
    np.testing.assert_allclose(measured["direct_effect"][WRITER], lost, atol=1e-9)
    np.testing.assert_allclose(measured["compensation"][WRITER], SHARE * lost, atol=1e-9)
    np.testing.assert_allclose(measured["total_effect"][WRITER], (1 - SHARE) * lost, atol=1e-9)
    np.testing.assert_allclose(measured["norm_term"], 0, atol=1e-9)
    change = measured["change"].values.copy()
    np.testing.assert_allclose(change[WRITER, COMPENSATOR[part]], SHARE * lost, atol=1e-9)
    change[WRITER, COMPENSATOR[part]] = 0
    np.testing.assert_allclose(change, 0, atol=1e-9)


def test_planted_compensation_in_what_the_notebook_says(planted):
    part, model = planted
    prompts = made_up_prompts(((12, 5),), vocab=8, seed=2)
    measured = ablate_layers(model, prompts, "resample").assign_attrs(described(model))
    means = LayerMeans.of(measured, n_bootstrap=50)
    found = layer_statistics(means, without_dropout=True)
    written = np.mean([np.mean(np.array(tokens) + 1.0) for tokens in prompts.tokens])
    late = -SHARE * 7 / 8 * (written + 0.5) if part == "MLP" else 0
    wanted = {
        "downstream-compensation": SHARE,
        "downstream-compensation-without-dropout": SHARE,
        "compensation-slope": SHARE,
        "coupled-layers": 1 / 3 / 4,
        "late-mlps-effect": late,
        "late-mlps-change": SHARE * (part == "MLP"),
    }
    for statistic, value in wanted.items():
        assert found[statistic].value == pytest.approx(value, abs=1e-9), statistic
    for statistic in list(wanted)[:3]:
        np.testing.assert_allclose(found[statistic].samples, SHARE, atol=1e-8)  # on every prompt alike
    assert means.coupling().value[2] == pytest.approx(1 / 3) and means.coupling(2 * SHARE).value[2] == 0
    assert means.strongest_below_late_mlps()[0] == WRITER
