"""The engine against a slow float64 reference that patches one head at a time with a full forward pass."""

import dataclasses

import jaxtyping
import pytest
import reference
import torch
from families import ALL_FAMILIES, LENGTH, load_family, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from selfrepair.engine import head_ablation as ablation
from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.direct_effect import token_directions
from selfrepair.engine.fast import fast_path
from selfrepair.engine.forward import Replay, run_clean
from selfrepair.engine.head_ablation import HeadAblations, ablate_heads
from selfrepair.engine.identity_check import check_identity
from selfrepair.engine.sites import HEADS
from selfrepair.errors import UserError
from selfrepair.models.loading import load_model

FIELDS = [field.name for field in dataclasses.fields(HeadAblations)]


def replacement(kind, model, tokens):
    return find_ablation(kind).prepare(model, [tokens], HEADS)


def by_both_paths(model, tokens, kind):
    """(name of the path, what it finds), for either."""
    for name in ("plain", "fast"):
        with fast_path(model, on=name == "fast") as chosen:
            assert chosen.fast == (name == "fast")
            yield name, ablate_heads(chosen, tokens, replacement(kind, chosen, tokens))


def worst(found, wanted, layer, head):
    """The largest difference of any field, in units of the largest logit change or value of the field."""
    scale = wanted["logit_change"].abs().max()
    differences = []
    for field in FIELDS:
        got = getattr(found, field)
        got = got if field == "sigma_clean" else got[layer, head]
        differences.append((got - wanted[field]).abs().max() / max(scale, wanted[field].abs().max()))
    return max(differences)


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_equals_one_full_forward_per_head(family, name, kind):
    model, hf = family(name)
    tokens = random_tokens()
    found = list(by_both_paths(model, tokens, kind))
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            wanted = reference.ablate(hf, tokens, layer, head, kind)
            for path, here in found:
                assert worst(here, wanted, layer, head) <= 1e-4, (path, layer, head)


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "neox-sequential", "opt"))
def test_float64_equals_the_reference_to_1e_9(family, name):
    model, hf = family(name, torch.float64)
    tokens = random_tokens()
    found = list(by_both_paths(model, tokens, "resample"))
    for layer in range(model.n_layers):
        wanted = reference.ablate(hf, tokens, layer, 1, "resample")
        for _, here in found:
            for field in FIELDS:
                got = getattr(here, field)
                got = got if field == "sigma_clean" else got[layer, 1]
                torch.testing.assert_close(got, wanted[field], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_layernorm_part_is_its_direct_formula(family, name, path):
    model, hf = family(name)
    model = path(model)
    tokens = random_tokens()
    found = ablate_heads(model, tokens, replacement("resample", model, tokens))
    repair = found.logit_change - (found.ablated_direct_effect - found.direct_effect)
    layernorm = repair - found.self_repair_heads - found.self_repair_mlps
    for layer in range(model.n_layers):
        wanted = reference.ablate(hf, tokens, layer, 2, "resample")["layernorm_formula"]
        assert (layernorm[layer, 2] - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_direct_effects_sum_to_the_centred_logit(family, name, dtype, tolerance, path):
    plain, hf = family(name, dtype)
    model = path(plain)
    tokens = random_tokens()
    clean = run_clean(model, tokens)
    direction, constant = token_directions(model, tokens)
    sigma = reference.sigma(hf, clean.final_residual)[:, :-1]

    def effect(written):
        return (written[:, :-1] * direction).sum(-1) / sigma

    total = constant + effect(clean.residuals[0])  # embeddings
    residuals = [*clean.residuals, clean.final_residual]
    heads = ablate_heads(model, tokens, replacement("zero", model, tokens)).direct_effect
    for layer in range(model.n_layers):
        attention = clean.attention_outputs[layer]
        mlp = residuals[layer + 1] - residuals[layer] - attention
        # the projection's own bias, with the value biases that leave the heads folded into it
        biases = attention - torch.einsum(
            "pkhe,hed->pkd", clean.z[layer] - model.value_biases[layer], model.W_O(layer)
        )
        assert (biases - biases[:1, :1]).abs().max() < 1e3 * tolerance * biases.abs().max().clamp_min(
            1
        )  # the same everywhere
        total = total + heads[layer].sum(0) + effect(biases) + effect(mlp)
    norm, residual = model.final_norm, clean.final_residual
    if isinstance(norm, torch.nn.LayerNorm):
        normed = norm(residual)
    else:  # their own code computes in float32
        normed = norm.weight * residual / reference.sigma(hf, residual)[..., None]
    wanted = reference.centred_correct_logit(model.hf.get_output_embeddings()(normed), tokens)
    assert (total - wanted).abs().max() < tolerance * max(1.0, wanted.abs().max())


class Oneself:
    has_donors = False

    def __call__(self, place, clean, donors=None):
        return clean


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_ablating_with_oneself_changes_nothing_at_all(family, name, path):
    model = path(family(name)[0])
    found = ablate_heads(model, random_tokens(), Oneself())
    for field in ("logit_change", "self_repair_heads", "self_repair_mlps"):
        assert (getattr(found, field) == 0).all()
    assert torch.equal(found.direct_effect, found.ablated_direct_effect)
    assert torch.equal(found.sigma_ablated, found.sigma_clean.expand_as(found.sigma_ablated))


def test_zero_ablating_a_head_that_writes_nothing_changes_nothing(tmp_path, path):
    model = path(load_family("gpt2", tmp_path))
    with torch.no_grad():
        model.output_projections[1].weight[:8] = 0
    tokens = random_tokens()
    found = ablate_heads(model, tokens, replacement("zero", model, tokens))
    assert found.direct_effect[1, 0].abs().max() == 0
    assert found.logit_change[1, 0].abs().max() < 1e-5 < found.logit_change[1, 1].abs().max()


@pytest.mark.parametrize("rows", (1, 6, 13, 24, 1000))
def test_independent_of_the_chunk_size(family, rows, path):
    for name in ("gpt2", "neox-parallel"):
        model = path(family(name)[0])
        tokens = random_tokens()
        here = replacement("resample", model, tokens)
        a, b = ablate_heads(model, tokens, here), ablate_heads(model, tokens, here, rows=rows)
        for field in FIELDS:
            torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-5, atol=1e-5)


def test_independent_of_the_order_of_layers(family, path):
    model = path(family("llama-gqa")[0])
    tokens = random_tokens()
    here = replacement("resample", model, tokens)
    whole = ablate_heads(model, tokens, here)
    for layer in (2, 0, 1):
        alone = ablate_heads(model, tokens, here, layers=range(layer, layer + 1))
        assert torch.equal(alone.logit_change[0], whole.logit_change[layer])


def test_out_of_memory_halves_the_chunk_and_goes_on(family, monkeypatch):
    model, _ = family("gpt2")
    tokens = random_tokens()
    here = replacement("resample", model, tokens)
    wanted = ablate_heads(model, tokens, here)
    real, sizes = ablation.carry, []

    def cramped(model, replay, clean, layer, delta):
        sizes.append(len(delta))
        if len(delta) > 1:
            raise torch.OutOfMemoryError
        return real(model, replay, clean, layer, delta)

    monkeypatch.setattr(ablation, "carry", cramped)
    found = ablate_heads(model, tokens, here, rows=24)
    assert max(sizes) == 4 and sizes.count(1) == model.n_layers * model.n_heads
    torch.testing.assert_close(found.logit_change, wanted.logit_change, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(
        ablation, "carry", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        ablate_heads(model, tokens, here)


@settings(max_examples=15, deadline=None)
@given(
    n_pairs=st.integers(1, 4), length=st.integers(2, LENGTH), layer=st.integers(0, 2), seed=st.integers(0, 99)
)
def test_any_shape(family, n_pairs, length, layer, seed):
    model, hf = family("neox-sequential")
    tokens = random_tokens(2 * n_pairs, length, seed)
    found = ablate_heads(
        model, tokens, replacement("resample", model, tokens), layers=range(layer, layer + 1)
    )
    assert found.logit_change.shape == (1, 4, 2 * n_pairs, length - 1)
    assert found.sigma_clean.shape == (2 * n_pairs, length - 1)
    wanted = reference.ablate(hf, tokens, layer, 3, "resample")
    assert (found.logit_change[0, 3] - wanted["logit_change"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "llama-gqa", "opt"))
def test_equals_transformer_lens_hooks(family, name, path):
    model = path(family(name)[0])
    tokens = random_tokens()
    found = ablate_heads(model, tokens, replacement("resample", model, tokens))
    with torch.no_grad():
        clean = reference.centred_correct_logit(model.bridge(tokens), tokens)
        for layer, head in ((0, 0), (1, 3), (2, 1)):

            def donate(z, hook, head=head):
                ablated = z.clone()  # in place, some architectures would ignore it
                part = z.unflatten(-1, (model.n_heads, -1)) if z.ndim == 3 else z
                view = ablated.unflatten(-1, (model.n_heads, -1)) if z.ndim == 3 else ablated
                view[:, :, head] = part[:, :, head].roll(len(z) // 2, 0)
                return ablated

            logits = model.bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", donate)])
            change = reference.centred_correct_logit(logits, tokens) - clean
            assert change.abs().max() > 1e-2  # the hook did something
            assert (found.logit_change[layer, head] - change).abs().max() < 1e-4 * change.abs().max()


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_unhooked_twin_is_the_model_and_shares_its_weights(family, name, path):
    model, hf = family(name)
    model = path(model)
    tokens = random_tokens()
    with torch.no_grad():
        twin, bridge, wanted = model.hf(tokens).logits, model.bridge(tokens), hf(tokens).logits
    for logits in (twin, bridge):
        assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    names = dict(model.bridge.original_model.named_parameters())
    assert all(any(p.data_ptr() == q.data_ptr() for q in names.values()) for p in model.hf.parameters())
    assert not any("Bridge" in type(module).__name__ for module in model.hf.modules())


def test_trained_model_equals_the_reference():
    model = load_model("pocket-pythia-small", device="cpu")
    hf = AutoModelForCausalLM.from_pretrained(
        model.bridge.cfg.model_name, dtype=torch.float64, attn_implementation="sdpa"
    )
    tokens = torch.randint(4096, (4, 40), generator=torch.Generator().manual_seed(1))
    found = list(by_both_paths(model, tokens, "resample"))
    for layer, head in ((0, 2), (2, 5), (3, 1)):
        wanted = reference.ablate(hf, tokens, layer, head, "resample")
        for path, here in found:
            for field in FIELDS:
                got = getattr(here, field)
                got = got if field == "sigma_clean" else got[layer, head]
                bound = 1e-4 * wanted["logit_change"].abs().max().clamp_min(1)
                assert (got - wanted[field]).abs().max() < bound, (path, field)


def test_identity_check_refuses_a_model_that_breaks_it(tmp_path):
    model = load_family("gpt2", tmp_path)
    tokens = random_tokens()
    check_identity(model, tokens)
    model.hf.lm_head.register_forward_hook(lambda _, __, logits: 30 * torch.tanh(logits / 30))  # a soft cap
    with pytest.raises(UserError, match="do not sum to the logits"):
        check_identity(model, tokens)
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        check_identity(model, tokens)


def test_the_plain_path_replaces_no_forward_and_leaves_no_hook(family, monkeypatch):
    """By it, modules run the ``forward`` of their class."""
    model, _ = family("neox-sequential")
    tokens = random_tokens()
    parts = dict(model.hf.named_modules())
    own, real = [], ablation.carry

    def watched(*arguments):
        final = real(*arguments)
        own.append([name for name, part in parts.items() if "forward" in vars(part)])
        return final

    monkeypatch.setattr(ablation, "carry", watched)
    ablate_heads(model, tokens, replacement("mean", model, tokens))
    assert own and not any(own)
    assert dict(model.hf.named_modules()) == parts
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts.values())


def test_a_block_that_fails_has_its_attention_again(family):
    model, _ = family("gpt2")
    clean, replay = run_clean(model, random_tokens()), Replay(model, LENGTH)
    wanted = replay.block(1, clean.residuals[1])
    with pytest.raises(RuntimeError):
        replay.block_given_attention(1, clean.residuals[1][..., :5], clean.residuals[1][..., :5])
    assert model.blocks[1].attn is model.attentions[1]
    assert torch.equal(replay.block(1, clean.residuals[1]), wanted)
    given = replay.block_given_attention(1, clean.residuals[1], clean.attention_outputs[1])
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_a_prompt_without_a_partner_is_refused(family, n_prompts):
    """Its donor would be the prompt itself, and every effect 0; other ablations need none."""
    model, _ = family("gpt2")
    tokens = random_tokens(n_prompts)
    with pytest.raises(UserError, match=rf"give an even number of prompts, not {n_prompts}$"):
        ablate_heads(model, tokens, replacement("resample", model, tokens))
    assert ablate_heads(model, tokens, replacement("zero", model, tokens)).logit_change.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_token_ids_are_whole_numbers(family, dtype, monkeypatch):
    model, _ = family("gpt2")
    tokens = random_tokens(2)
    put_in = replacement("zero", model, tokens)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(UserError, match=f"token ids must be whole numbers .* not {dtype}"):
        ablate_heads(model, tokens.to(dtype), put_in)
    wanted = ablate_heads(model, tokens, put_in).logit_change
    assert torch.equal(ablate_heads(model, tokens.int(), put_in).logit_change, wanted)
