"""16-bit weights with a float32 residual stream, and what may be asked for on which device."""

import contextlib
import weakref

import pytest
import torch
from families import random_tokens

from selfrepair.choices import PRECISIONS
from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.forward import Replay, float32_residual, run_clean
from selfrepair.engine.head_ablation import ablate_heads
from selfrepair.engine.sites import HEADS
from selfrepair.errors import UserError
from selfrepair.models.devices import (
    all_devices,
    precision,
    resolve_device,
    set_precision,
    unless_out_of_memory,
)
from selfrepair.models.loading import load_model
from selfrepair.text.corpora import load_tokens


def self_repair(logit_change, ablated_direct_effect, direct_effect, **_):
    return logit_change - (ablated_direct_effect - direct_effect)


@pytest.mark.slow("with 16-bit weights, the residual stream and all results stay float32")
@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "llama-gqa", "opt"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_residual_stream_and_results_are_float32(family, name, dtype, path):
    model = path(family(name, dtype)[0])
    tokens = random_tokens()
    clean = run_clean(model, tokens)
    assert {residual.dtype for residual in (*clean.residuals, clean.final_residual)} == {torch.float32}
    assert {z.dtype for z in clean.z} == {dtype}
    assert Replay(model, tokens.shape[1]).block(1, clean.residuals[1]).dtype == torch.float32
    found = ablate_heads(model, tokens, find_ablation("resample").prepare(model, [], HEADS))
    assert found.logit_change.dtype == found.sigma_clean.dtype == torch.float32
    assert not model.blocks[0]._forward_pre_hooks  # nothing is left on the model
    assert {weight.dtype for weight in model.hf.parameters()} == {dtype}


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_norms_are_narrow_again_after_a_failure(family, name):
    """And the weights are the very ones that they share with TransformerLens' view."""
    model, _ = family(name, torch.bfloat16)
    weights = list(model.hf.parameters())
    with contextlib.suppress(ZeroDivisionError), float32_residual(model):
        wide = {
            weight.dtype
            for norm in model.hf.modules()
            if type(norm) is torch.nn.LayerNorm
            for weight in norm.parameters()
        }
        assert wide == ({torch.float32} if name == "gpt2" else set())
        assert model.final_norm(torch.randn(3, 32)).dtype == torch.float32
        raise ZeroDivisionError
    assert all(now is before for now, before in zip(model.hf.parameters(), weights, strict=True))
    assert not model.blocks[0]._forward_pre_hooks


@pytest.fixture
def removing():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.slow("with 16-bit weights, small changes of the residual stream are not lost")
def test_float32_residual_stream_is_worth_it(removing):
    """Against float64 with the same (rounded) weights, the error is smaller than with one in bfloat16."""
    model, exact = (load_model("pocket-gpt2", "cpu", dtype) for dtype in (torch.bfloat16, torch.float64))
    weights = model.hf.state_dict()
    exact.hf.load_state_dict({name: weights[name] for name in exact.hf.state_dict()})
    tokens = torch.from_numpy(load_tokens(model.tokenizer, n_prompts=4).tokens)

    def repair(model):
        return self_repair(
            **vars(ablate_heads(model, tokens, find_ablation("resample").prepare(model, [], HEADS)))
        )

    wanted = repair(exact)

    def error():
        return ((repair(model) - wanted).square().mean() / wanted.square().mean()).sqrt()

    mixed = error()
    assert mixed < 0.1
    for block in model.blocks:
        removing.callback(block.register_forward_pre_hook(narrowed, with_kwargs=True).remove)
    assert mixed < 0.9 * error()


def narrowed(_, given, named):
    """A block's arguments with the residual stream rounded to bfloat16."""
    if given:
        return (given[0].bfloat16().float(), *given[1:]), named
    return given, named | {"hidden_states": named["hidden_states"].bfloat16().float()}


def test_precision_has_the_weights_type_and_tf32_needs_a_gpu():
    cpu = torch.device("cpu")
    for name in set(PRECISIONS) - {"tf32"}:
        assert precision(cpu, set_precision(name, cpu)) == name
    with pytest.raises(UserError, match="TF32 needs an NVIDIA GPU"):
        set_precision("tf32", cpu)
    with pytest.raises(UserError, match="unknown precision 'int8'"):
        set_precision("int8", cpu)
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_another_precision_than_float32(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    try:
        assert precision(gpu, set_precision("tf32", gpu)) == "tf32"
        assert precision(gpu, set_precision("bfloat16", gpu)) == "bfloat16"
        assert precision(gpu, set_precision("float32", gpu)) == "float32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_auto_is_every_gpu(monkeypatch):
    assert all_devices("cpu") == [torch.device("cpu")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert all_devices("auto") == [torch.device("cuda", index) for index in range(3)]


def test_a_device_without_float64_is_refused_even_where_there_is_one(monkeypatch):
    """Apple's: means, and the constants of ablations, are summed in float64."""
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'mps' is not available here; use cpu or auto"):
        resolve_device("mps")


def test_out_of_memory_leaves_nothing_behind():
    held = []

    def work(fail):
        tensor = torch.empty(10)
        held.append(weakref.ref(tensor))
        if fail:
            raise torch.OutOfMemoryError
        return "done"

    assert unless_out_of_memory(lambda: work(False)) == "done"
    assert unless_out_of_memory(lambda: work(True)) is None
    assert held[1]() is None
    with pytest.raises(ZeroDivisionError):
        unless_out_of_memory(lambda: 1 / 0)
