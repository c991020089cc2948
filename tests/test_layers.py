"""The Hydra effect, measured, against a slow float64 reference: one full forward pass per replacement."""

import statistics

import numpy as np
import pytest
import reference
import torch
import xarray as xr
from families import ALL_FAMILIES, random_tokens
from made_up_facts import ablate_layers, made_up_prompts
from transformers import AutoModelForCausalLM

from selfrepair.engine import one_position
from selfrepair.errors import UserError
from selfrepair.measure import layer_ablation, layers, layers_on_prose
from selfrepair.measure.facts import of_facts
from selfrepair.measure.tokens import of_prompts
from selfrepair.models.loading import load_model
from selfrepair.paths import MODELS
from selfrepair.text.corpora import Prompts
from selfrepair.text.facts import draw_donors

SCALARS = ("direct_effect", "total_effect", "compensation", "norm_term")
POSITIONS = ("last", "all")


# ---------------------------------------------------------------- the slow way


@torch.no_grad()
def run(hf, tokens, replace=None):
    """One prompt through the whole model; outputs of all components, final residual, logits.

    ``replace = (component, output)`` puts in an output at every position, or at the last if it is of one.
    """
    blocks, projections, norm = reference.parts(hf)
    modules = [
        module for pair in zip(projections, reference.mlp_projections(hf), strict=True) for module in pair
    ]
    residuals, attention, handles = [], {}, []

    def put_in(_, __, output):
        new = replace[1]
        if new.ndim > 1:
            return new.view_as(output)
        output = output.clone()
        output[..., -1, :] = new
        return output

    for block in blocks:
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs: residuals.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
    handles.append(norm.register_forward_pre_hook(lambda _, args: residuals.append(args[0])))
    if replace is not None:
        handles.append(modules[replace[0]].register_forward_hook(put_in))
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


def effect_on(hf, token, sigma):
    """Reads what is written along the centred unembedding of a token, the norm's formula with σ frozen."""
    norm, W_U = reference.parts(hf)[2], hf.get_output_embeddings().weight

    def effect(written):
        if type(norm).__name__ == "LayerNorm":
            written = written - written.mean()
        logits = W_U @ (norm.weight * written / sigma)
        return (logits - logits.mean())[token]

    return effect


def donors_of(prompts, seed, positions):
    """By prompt: of all lengths for the last position, of its own for all positions."""
    donors = {i: [] for i in range(len(prompts.tokens))}
    groups = [np.arange(len(donors))] if positions == "last" else prompts.groups
    for number, members in enumerate(groups):
        pairs = draw_donors(prompts.answers[members], layer_ablation.N_DONORS[positions], seed + number)
        for i, j in pairs:
            donors[int(members[i])].append(int(members[j]))
    return donors


@torch.no_grad()
def slowly(hf, tokens, ablation, donors, positions="last", of=None):
    """Every quantity of the prompts ``of``, one full forward pass per component and donor.

    By (component, prompt), a list over donors.
    """
    clean = [run(hf, prompt) for prompt in tokens]
    n_components = len(clean[0][0])
    means = [torch.cat([outputs[c][0] for outputs, _, _ in clean]).mean(0) for c in range(n_components)]
    found = {}
    for i in range(len(tokens)) if of is None else of:
        outputs, final, logits = clean[i]
        token = int(logits.argmax())
        effect = effect_on(hf, token, reference.sigma(hf, final))
        constant = logits[token] - effect(final)
        own = [effect(output[0, -1]) for output in outputs]
        for c in range(n_components):
            for donor in donors[i] if ablation == "resample" else [None]:
                given = {"mean": means[c].expand_as(outputs[c]), "zero": torch.zeros_like(outputs[c])}
                new = clean[donor][0][c] if ablation == "resample" else given[ablation]
                ablated, ablated_final, ablated_logits = run(
                    hf, tokens[i], (c, new[0, -1] if positions == "last" else new)
                )
                change = [effect(output[0, -1]) - before for output, before in zip(ablated, own, strict=True)]
                change[c] = torch.tensor(0.0)
                row = {
                    "effect": own[c],
                    "direct_effect": own[c] - effect(new[0, -1]),
                    "total_effect": logits[token] - ablated_logits[token],
                    "compensation": sum(change),
                    "norm_term": ablated_logits[token] - effect(ablated_final) - constant,
                    "change": change,
                    "token": token,
                }
                found.setdefault((c, i), []).append(row)
    return found


def check(measured, found, tolerance):
    measured = measured.transpose("ablated", "observed", "prompt")
    for (c, number), rows in found.items():
        here = measured.sel(prompt=number)
        scale = max(1.0, *(abs(float(row["total_effect"])) for row in rows))
        assert int(here["token"]) == rows[0]["token"]
        assert abs(float(here["effect"][c]) - float(rows[0]["effect"])) < tolerance * scale
        assert int(here["n_donors"]) == len(rows)
        for name in SCALARS:
            values = [float(row[name]) for row in rows]
            off = abs(float(here[name][c]) - statistics.fmean(values))
            assert off < tolerance * scale, (c, number, name)
            spread = float(here[f"{name}_spread"][c])
            if len(values) > 1:
                assert abs(spread - statistics.stdev(values)) < 3 * tolerance * scale
            else:
                assert np.isnan(spread)
        for observed in range(len(rows[0]["change"])):
            wanted = statistics.fmean(float(row["change"][observed]) for row in rows)
            assert abs(float(here["change"][c, observed]) - wanted) < tolerance * scale, (c, observed, number)


# ---------------------------------------------------------------- on facts


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_equals_full_forward_passes(family, name, path):
    model, hf = family(name)
    prompts = made_up_prompts(((3, 12), (2, 9)))
    measured = ablate_layers(path(model), prompts, "resample", seed=3)
    check(measured, slowly(hf, prompts.tokens, "resample", donors_of(prompts, 3, "last")), 1e-4)


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "neox-sequential", "opt", "phi"))
def test_float64_equals_the_reference_to_1e_9(family, name):
    """Attention and MLPs of parallel and sequential blocks, prompts of different lengths, donors of any."""
    model, hf = family(name, torch.float64)
    prompts = made_up_prompts(((3, 12), (2, 7)), seed=1)
    measured = ablate_layers(model, prompts, "resample")
    donors = donors_of(prompts, 0, "last")
    lengths = [len(tokens) for tokens in prompts.tokens]
    assert any(lengths[i] != lengths[j] for i, of_prompt in donors.items() for j in of_prompt)
    check(measured, slowly(hf, prompts.tokens, "resample", donors), 1e-9)


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "llama-gqa"))
def test_all_positions_equal_full_forward_passes(family, monkeypatch, name):
    """Fewer donors than there are: those of each length are drawn apart."""
    monkeypatch.setitem(layer_ablation.N_DONORS, "all", 2)
    model, hf = family(name)
    prompts = made_up_prompts(((5, 12), (6, 9)))
    measured = ablate_layers(model, prompts, "resample", seed=3, positions="all")
    found = slowly(hf, prompts.tokens, "resample", donors_of(prompts, 3, "all"), "all")
    check(measured, found, 1e-4)
    at_last = ablate_layers(model, prompts, "resample", seed=3)
    assert not np.allclose(measured["total_effect"], at_last["total_effect"])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("ablation", ("mean", "zero"))
@pytest.mark.parametrize("name", ("gpt2", "neox-parallel"))
def test_other_ablations_equal_full_forward_passes(family, name, ablation, positions):
    model, hf = family(name)
    prompts = made_up_prompts(((3, 12), (2, 9)))
    measured = ablate_layers(model, prompts, ablation, positions=positions)
    check(measured, slowly(hf, prompts.tokens, ablation, {}, positions), 1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("ablation", reference.KINDS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_decomposition_is_exact(family, name, ablation, positions):
    dtype = (
        torch.float32 if name.startswith("llama") else torch.float64
    )  # transformers' RMSNorm is float32 in any case
    model, _ = family(name, dtype)
    measured = ablate_layers(model, made_up_prompts(), ablation, positions=positions)
    rest = measured["total_effect"] - (
        measured["direct_effect"] - measured["compensation"] - measured["norm_term"]
    )
    assert abs(rest).max() < (1e-10 if dtype == torch.float64 else 1e-4)
    assert all(float(abs(measured[name]).max()) > 0.1 for name in SCALARS)
    xr.testing.assert_allclose(measured["change"].sum("observed"), measured["compensation"], atol=1e-5)


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "opt"))
def test_self_repair_is_compensation_and_the_final_norm(family, name):
    """An attention layer ablated as heads are, all of them at once: z replaced, value biases left out."""
    model, hf = family(name, torch.float64)
    prompts, layer = made_up_prompts(((3, 12), (2, 9)), seed=4), 1
    projections = reference.parts(hf)[1]
    W_O, bias = reference.out_matrix(projections[layer]), reference.value_bias(hf, layer)
    z = {}

    def logits_with(tokens, new=None):
        """Of a full pass, with ``new`` for the layer's z at the last position; keeps the z that it had."""

        def enter(_, args):
            given = args[0].clone()
            z["last"] = given[..., -1, :].flatten().clone()
            if new is not None:
                given[..., -1, :] = new
            return (given,)

        handle = projections[layer].register_forward_pre_hook(enter)
        try:
            return run(hf, tokens)[2]
        finally:
            handle.remove()

    with torch.no_grad():
        every_z = [(logits_with(tokens), z["last"])[1] for tokens in prompts.tokens]
        measured = ablate_layers(model, prompts, "resample").sel(ablated=2 * layer)
        for i, donors in donors_of(prompts, 0, "last").items():
            _, final, logits = run(hf, prompts.tokens[i])
            token = int(logits.argmax())
            effect = effect_on(hf, token, reference.sigma(hf, final))
            direct = effect((every_z[i] - bias) @ W_O)
            repair, lost = [], []
            for donor in donors:
                ablated = logits_with(prompts.tokens[i], every_z[donor])
                ablated_direct = effect((every_z[donor] - bias) @ W_O)
                logit_change = ablated[token] - logits[token]
                repair.append(float(logit_change - (ablated_direct - direct)))
                lost.append((float(direct - ablated_direct), float(-logit_change)))
            here = measured.sel(prompt=i)
            assert abs(statistics.fmean(repair)) > 1e-3
            found = float(here["compensation"] + here["norm_term"])
            assert found == pytest.approx(statistics.fmean(repair), abs=1e-9)
            wanted = [statistics.fmean(values) for values in zip(*lost, strict=True)]
            assert [float(here[q]) for q in ("direct_effect", "total_effect")] == pytest.approx(
                wanted, abs=1e-9
            )


def test_fifteen_donors_of_any_length(family):
    model, _ = family("gpt2")
    prompts = made_up_prompts(((16, 6), (2, 5)))
    prompts.answers[:] = np.arange(18)
    assert (ablate_layers(model, prompts, "resample", components=np.array([2]))["n_donors"] == 15).all()
    few = ablate_layers(model, prompts, "resample", components=np.array([2]), positions="all")
    assert few["n_donors"].values.tolist() == [4] * 16 + [1] * 2


def test_downstream_by_hand():
    sequential, parallel = layer_ablation.downstream(2, False), layer_ablation.downstream(2, True)
    assert sequential.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert parallel.astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_trained_model_equals_the_reference():
    model = load_model("pocket-pythia-small", device="cpu")
    hf = AutoModelForCausalLM.from_pretrained(
        MODELS / "pocket-pythia-small", dtype=torch.float64, attn_implementation="sdpa"
    )
    prompts = made_up_prompts(((3, 10),), vocab=4096)
    found = slowly(hf, prompts.tokens, "resample", donors_of(prompts, 0, "last"))
    check(ablate_layers(model, prompts, "resample"), found, 1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
def test_chunks_do_not_matter(family, monkeypatch, positions):
    model, _ = family("gpt2")
    prompts = made_up_prompts()
    whole = ablate_layers(model, prompts, "resample", positions=positions)
    monkeypatch.setattr(layer_ablation, "TOKENS_AT_ONCE", 30)
    monkeypatch.setattr(one_position, "ROWS_BYTES", 15_000)
    again = ablate_layers(model, prompts, "resample", positions=positions)
    xr.testing.assert_allclose(again, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ablation", reference.KINDS)
def test_shards_together_are_one_computation(family, ablation):
    """Attention layers and MLPs apart: to the last bit, and all else is the same in both."""
    model, _ = family("neox-sequential")
    facts = of_facts(made_up_prompts(((5, 12), (2, 11), (3, 9))))
    settings = {"ablation": ablation, "layer_positions": "last", "seed": 2}
    whole = layer_ablation.ablate_on_facts(model, facts, settings, {})
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


# ---------------------------------------------------------------- on prose


@pytest.mark.parametrize("ablation", reference.KINDS)
@pytest.mark.parametrize("name", ("gpt2", "neox-parallel"))
def test_prose_equals_full_forward_passes(family, monkeypatch, name, ablation):
    """A shard's prompts are each other's donors, drawn apart for each; constants are of all prompts."""
    monkeypatch.setattr(layers_on_prose, "SHARD_PROMPTS", 4)
    monkeypatch.setitem(layer_ablation.N_DONORS, "last", 1)
    model, hf = family(name)
    tokens = random_tokens(6, 10)
    settings = {"ablation": ablation, "layer_positions": "last", "seed": 5, "n_prompts": 6}
    inputs = {"tokens": of_prompts(Prompts(tokens.numpy(), "random tokens"))}
    shards = layers_on_prose.MEASUREMENT.shards(settings)
    assert shards == [0, 3]
    for shard in shards:
        measured = layers_on_prose.MEASUREMENT.compute(model, settings, inputs, shard)
        members = range(shard, shard + 3)
        assert measured["prompt"].values.tolist() == list(members)
        drawn = draw_donors(np.arange(3), 1, 5 + shard)
        donors = {shard + int(i): [shard + int(j)] for i, j in drawn}
        assert set(donors) == set(members)
        check(measured, slowly(hf, tokens.tolist(), ablation, donors, of=members), 1e-4)


@pytest.mark.parametrize(
    ("n_prompts", "sizes"), [(2, [2]), (32, [32]), (34, [17, 17]), (128, [32] * 4), (66, [22] * 3)]
)
def test_no_shard_of_prose_is_left_with_few_donors(n_prompts, sizes):
    starts = list(layers_on_prose.MEASUREMENT.shards({"n_prompts": n_prompts}))
    assert np.diff([*starts, n_prompts]).tolist() == sizes
