"""Optimal ablation: its gradient by plain autograd through a whole model, its constants and what they learn from."""

import numpy as np
import pytest
import reference
import torch
from families import random_tokens, save_family
from tasks import wanted_settings
from transformers import AutoModelForCausalLM

import selfrepair
from selfrepair.engine import optimal, sites
from selfrepair.engine.ablations import Mean, find_ablation
from selfrepair.engine.fast import fast_path
from selfrepair.engine.sites import COMPONENTS, HEADS
from selfrepair.errors import UserError
from selfrepair.measure.task import Task
from selfrepair.models.loading import load_model
from selfrepair.store.stores import open_store
from selfrepair.text.corpora import load_tokens

FEW = 4


def plain_loss(hf, tokens, module, part, constant):
    """Mean next-token loss of a whole forward pass in which ``part`` of what ``module`` is given, or gives
    where ``part`` is ``None``, is ``constant`` everywhere."""

    def given(_, args):
        z = args[0].clone()
        z[..., part] = constant
        return (z,)

    def output(_, __, written):
        return constant.expand_as(written)

    handle = module.register_forward_pre_hook(given) if part else module.register_forward_hook(output)
    try:
        logits = hf(input_ids=tokens, use_cache=False).logits[:, :-1].double()
    finally:
        handle.remove()
    chances = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -chances.gather(-1, tokens[:, 1:, None]).log().mean()


def in_the_plain_model(hf, place, site, part):
    """The module that a place is in a plain model, and which part of its input is replaced."""
    _, projections, _ = reference.parts(hf)
    if site is HEADS:
        width = reference.out_matrix(projections[place]).shape[0] // hf.config.num_attention_heads
        return projections[place], slice(part * width, (part + 1) * width)
    layer, is_mlp = divmod(place, 2)
    return (reference.mlp_projections(hf) if is_mlp else projections)[layer], None


@pytest.mark.parametrize("path", ("plain", "fast"))
@pytest.mark.parametrize("site", (HEADS, COMPONENTS), ids=("heads", "components"))
@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "neox-sequential", "llama-gqa", "opt"))
def test_loss_and_gradient_are_those_of_the_whole_model(family, name, site, path):
    model, hf = family(name)
    tokens = random_tokens(3)
    start = Mean().prepare(model, [tokens], site).values
    with fast_path(model, on=path == "fast") as model, torch.no_grad():
        here = site.prepared(model, tokens)
        for place, mean in enumerate(start):
            values = mean.float().reshape(-1, mean.shape[-1]) * 0.5
            losses, gradients = site.loss_gradient(model, here, place, values)
            for part in {0, len(values) - 1}:
                constant = values[part].double().requires_grad_()
                with torch.enable_grad():
                    wanted = plain_loss(hf, tokens, *in_the_plain_model(hf, place, site, part), constant)
                    (by_autograd,) = torch.autograd.grad(wanted, constant)
                torch.testing.assert_close(losses[part].double(), wanted.detach(), rtol=1e-4, atol=1e-5)
                scale = by_autograd.abs().max()
                torch.testing.assert_close(gradients[part].double(), by_autograd, rtol=0, atol=1e-3 * scale)
    assert all(weight.grad is None for weight in model.hf.parameters())


def test_float64_gradients_agree_to_1e_9(family):
    model, hf = family("neox-sequential", torch.float64)
    tokens = random_tokens(2)
    here = HEADS.prepared(model, tokens)
    values = here.clean.z[1].mean((0, 1))
    _, gradients = HEADS.loss_gradient(model, here, 1, values)
    constant = values[2].clone().requires_grad_()
    loss = plain_loss(hf, tokens, *in_the_plain_model(hf, 1, HEADS, 2), constant)
    (wanted,) = torch.autograd.grad(loss, constant)
    torch.testing.assert_close(gradients[2], wanted, rtol=0, atol=1e-9)


def test_a_pass_holds_few_rows_and_gives_the_same(family, monkeypatch):
    model, _ = family("gpt2")
    here = HEADS.prepared(model, random_tokens(2))
    values = here.clean.z[0].mean((0, 1))
    whole = HEADS.loss_gradient(model, here, 0, values)
    monkeypatch.setattr(sites, "ROWS_AT_ONCE", 2)
    for some, one in zip(whole, HEADS.loss_gradient(model, here, 0, values), strict=True):
        torch.testing.assert_close(some, one, rtol=1e-4, atol=1e-6)


def test_steps_are_those_of_adam_written_out(family, monkeypatch):
    """In units of each head's spread, with a rate that falls; on prompts in a fixed order."""
    monkeypatch.setattr(optimal, "N_STEPS", 3)
    model, _ = family("gpt2", torch.float64)
    tokens = random_tokens(2)
    mean = Mean().prepare(model, [tokens], HEADS).values
    found = find_ablation("optimal").prepare(model, [tokens], HEADS).values
    order = torch.randperm(2, generator=torch.Generator().manual_seed(0)).tolist()
    z = HEADS.activations(model, tokens)
    for layer in range(model.n_layers):
        spread = (z[layer] - mean[layer]).square().mean((0, 1, 3)).sqrt()[:, None]
        theta, first, second = (torch.zeros_like(mean[layer]) for _ in range(3))
        for step, prompt in enumerate([order[0], order[1], order[0]]):
            here = HEADS.prepared(model, tokens[prompt : prompt + 1])
            gradient = HEADS.loss_gradient(model, here, layer, mean[layer] + spread * theta)[1] * spread
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            ahead = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            rate = optimal.FIRST_STEP * (1 - step / 3)
            theta = theta - rate * ahead[0] / (ahead[1].sqrt() + optimal.EPSILON)
        torch.testing.assert_close(found[layer], mean[layer] + spread * theta, rtol=1e-9, atol=1e-9)


def test_what_is_measured_is_never_learnt_from(tmp_path):
    """Heads of a store are ablated by constants of other prompts; a plain model gives the same with these."""
    folder = save_family("gpt2", tmp_path / "tiny-gpt2")
    n = optimal.N_PROMPTS
    np.save(tmp_path / "ids.npy", random_tokens(FEW + n).numpy())
    model = load_model(str(folder), "cpu")
    settings = wanted_settings(tmp_path / "ids.npy", ablation="optimal", n_prompts=FEW)
    task = Task("heads", str(folder), settings, tmp_path / "out")
    found = open_store(task.merge([model]))
    constants = task.needed["constants"]
    unseen = open_store(constants.needed["unseen_tokens"].path)["token"].values
    every = random_tokens(FEW + n).numpy()
    assert np.array_equal(found["token"], every[:FEW]) and np.array_equal(unseen, every[FEW:])
    z = torch.from_numpy(open_store(constants.path)["z"].values)
    mean = torch.stack(Mean().prepare(model, [torch.from_numpy(unseen)], HEADS).values)
    assert (z - mean).abs().amax(-1).min() > 1e-3

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokens = torch.from_numpy(found["token"].values)
    for layer, head in ((0, 1), (2, 0)):
        wanted = reference.ablate(hf, tokens, layer, head, lambda _, own=z[layer, head]: own)
        for name in ("ablated_direct_effect", "logit_change", "self_repair_heads", "self_repair_mlps"):
            np.testing.assert_allclose(found[name][layer, head], wanted[name], atol=1e-4, err_msg=name)


@pytest.mark.slow("the constants of whole layers are fitted on other prompts too")
@pytest.mark.parametrize("name", ("layers", "layers_on_prose"))
def test_layers_learn_from_other_prompts_too(tmp_path, name):
    model = "pocket-pythia-small"
    settings = {"text": None, "dataset": None, "tokens": None, "n_prompts": 4, "prompt_len": 12, "seed": 0}
    settings |= {"dtype": "float32", "ablation": "optimal", "layer_positions": "last", "facts": None}
    task = Task(name, model, settings | {"n_facts": 4}, tmp_path)
    assert "unseen_tokens" in task.needed
    found = open_store(task.merge([load_model(model, "cpu")]))
    assert (
        float(abs(found["direct_effect"]).max()) > 0.1 and not found["direct_effect_spread"].notnull().any()
    )


def test_too_little_text_is_one_line(tmp_path):
    ids = random_tokens(FEW + optimal.N_PROMPTS - 1).numpy()
    with pytest.raises(UserError, match=f"{FEW} and {optimal.N_PROMPTS} others that nothing is measured on"):
        selfrepair.measure_heads(
            "pocket-pythia-small", tokens=ids, n_prompts=FEW, ablation="optimal", device="cpu"
        )


def test_unseen_prompts_are_the_rest_of_the_same_text():
    model = load_model("pocket-pythia-small", "cpu")
    found = load_tokens(model.tokenizer, n_prompts=8, seed=3, n_unseen=20)
    alone = load_tokens(model.tokenizer, n_prompts=8, seed=3)
    assert np.array_equal(found.tokens, alone.tokens) and alone.unseen.shape == (0, 128)
    rows = {row.tobytes() for row in load_tokens(model.tokenizer).tokens}
    unseen = [row.tobytes() for row in found.unseen]
    assert len(set(unseen)) == 20 and set(unseen) <= rows | {found.unseen[-1].tobytes()}
    assert not set(unseen) & {row.tobytes() for row in found.tokens}


@pytest.mark.slow("the constants cost less than the mean on text that they were not fitted on")
def test_it_costs_less_than_the_mean_on_unseen_text():
    model = load_model("pocket-pythia-small", "cpu")
    prompts = load_tokens(model.tokenizer, n_prompts=16, n_unseen=optimal.N_PROMPTS)
    unseen, judged = (torch.from_numpy(tokens) for tokens in (prompts.unseen, prompts.tokens))
    here = HEADS.prepared(model, judged)

    def losses(kind):
        values = find_ablation(kind).prepare(model, [unseen], HEADS).values
        found = [HEADS.loss_gradient(model, here, layer, own.float())[0] for layer, own in enumerate(values)]
        return torch.stack(found)

    gain = losses("mean") - losses("optimal")
    assert (gain > 0).float().mean() > 0.9 and gain.mean() > 0.001
