"""Updates of the residual stream and the loss' gradient, against autograd through plain models."""

import numpy as np
import pytest
import reference
import torch
from families import ALL_FAMILIES, load_family, random_tokens
from readings import close, measured, prompts, tokens_of
from reference import parts

from selfrepair.engine.forward import Replay
from selfrepair.measure import alignment as measure
from selfrepair.measure.alignment import residual_gradients


def loss_of(hf, tokens):
    logits = hf(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    return -logits.gather(-1, tokens[:, 1:, None]).sum()


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_gradients_equal_central_differences(family, name, tmp_path):
    _, hf = family(name)
    model = load_family(name, tmp_path, torch.float64)
    reference.in_float64(model.hf)
    tokens = random_tokens(2, 7)
    gradients = residual_gradients(model, Replay(model, 7), tokens).gradients
    blocks = parts(hf)[0]
    generator = torch.Generator().manual_seed(5)
    step = 1e-5
    for layer in range(3):
        for position in (0, 3, 5):
            nudge = torch.zeros(2, 7, 32, dtype=torch.float64)
            nudge[1, position] = torch.randn(32, generator=generator, dtype=torch.float64)

            def moved(by, layer=layer, nudge=nudge):
                def enter(_, args, kwargs):
                    if args:
                        return (args[0] + by * nudge, *args[1:]), kwargs
                    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + by * nudge}

                handle = blocks[layer].register_forward_pre_hook(enter, with_kwargs=True)
                with torch.no_grad():
                    loss = loss_of(hf, tokens)
                handle.remove()
                return loss

            wanted = (moved(step) - moved(-step)) / (2 * step)
            assert wanted.abs() > 1e-3
            assert abs((gradients[layer] * nudge).sum() - wanted) < 1e-6 * max(1, wanted.abs())


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_alignment_equals_autograd_through_the_plain_model(family, name, monkeypatch):
    model, hf = family(name)
    here = prompts(6, 10)
    tokens = tokens_of(here)
    wanted_grad = [parameter.requires_grad for parameter in model.hf.parameters()]
    found = measured("alignment", model, here)
    assert [parameter.requires_grad for parameter in model.hf.parameters()] == wanted_grad
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    blocks, _, norm = parts(hf)
    residuals = []

    def keep(residual):
        residual.retain_grad()
        residuals.append(residual)

    handles = [
        block.register_forward_pre_hook(
            lambda _, a, k: keep(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for block in blocks
    ]
    handles.append(norm.register_forward_pre_hook(lambda _, args: keep(args[0])))
    loss_of(hf, tokens).backward()
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for layer in range(3):
            update, final = (residuals[layer + 1] - residuals[layer])[:, :-1], residuals[3][:, :-1]
            down = -residuals[layer].grad[:, :-1]
            cosine = (update * down).sum(-1) / (update.norm(dim=-1) * down.norm(dim=-1))
            close(found["gradient"][layer], cosine.mean(1))
            cosine = (update * final).sum(-1) / (update.norm(dim=-1) * final.norm(dim=-1))
            close(found["final"][layer], cosine.mean(1))
        for layer in range(4):
            logits = hf.get_output_embeddings()(norm(residuals[layer]))[:, :-1]
            loss = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
            close(found["loss"][layer], loss.mean(1))
    monkeypatch.setattr(measure, "GRADIENT_BYTES", 1)
    one_by_one = measured("alignment", model, here)
    np.testing.assert_allclose(one_by_one["gradient"], found["gradient"], atol=1e-5)
    np.testing.assert_allclose(one_by_one["loss"], found["loss"], rtol=1e-5)
