"""Layers measured on a model whose compensation is planted: it is found, and nothing else."""

import numpy as np
import pytest
import torch
from made_up_facts import ablate_layers, made_up_prompts
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from selfrepair.analysis.layers import LayerRun
from selfrepair.analysis.layers import statistics as layer_statistics
from selfrepair.measure import layer_ablation
from selfrepair.measure.task import described
from selfrepair.models.loading import load_model
from selfrepair.paths import MODELS
from selfrepair.text.facts import draw_donors

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
    pairs = draw_donors(prompts.answers, layer_ablation.N_DONORS["last"], 5)
    for i in range(len(written)):
        lost[i] = centred * (written[i] - np.mean([written[j] for k, j in pairs if k == i]))
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
    run = LayerRun.of("facts", measured.assign_attrs(trained_without_dropout=True), n_bootstrap=50)
    found, means = layer_statistics(run), run.means
    written = np.mean([np.mean(np.array(tokens) + 1.0) for tokens in prompts.tokens])
    late = -SHARE * 7 / 8 * (written + 0.5) if part == "MLP" else 0
    wanted = {
        "downstream-compensation": SHARE,
        "downstream-compensation-without-dropout": SHARE,
        "best-layer-slope": SHARE,
        "best-layer-r2": 1,
        "late-mlps-effect": late,
        "coupled-attention": 1 / 3 * (part == "attention"),
    } | ({"erasing-mlps-change": SHARE} if part == "MLP" else {})
    for statistic, value in wanted.items():
        assert found[f"{statistic}-facts"].value == pytest.approx(value, abs=1e-9), statistic
    assert ("erasing-mlps-change-facts" in found) == (part == "MLP")
    for statistic in list(wanted)[:4]:  # on every prompt alike
        drawn = found[f"{statistic}-facts"].samples
        np.testing.assert_allclose(drawn[np.isfinite(drawn)], wanted[statistic], atol=1e-8)
    assert run.best("attention") == WRITER == run.strongest_below_late_mlps()
    assert run.best("MLP") is None  # none of them differs from prompt to prompt, or has one above
    is_touched = [means.coupling(name).value[2] for name in COMPENSATOR]
    assert is_touched == pytest.approx([float(name == part) / (1, 2)[name == "MLP"] for name in COMPENSATOR])
    assert means.coupling(part, 2 * SHARE).value[2] == 0
