"""The faster kernels compute what the modules they stand in for compute."""

import contextlib
import copy
import ctypes
import threading

import pytest
import torch
from families import FAMILIES, random_tokens
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from selfrepair.engine.fast import fast_path, switch
from selfrepair.engine.fast.linear_maps import faster_modules


class MLP(nn.Module):
    """As GPT-2 names its parts (Conv1D) or as Pythia does (Linear)."""

    def __init__(self, names, kind, activation):
        super().__init__()
        self.names = names
        make = (lambda i, o: Conv1D(o, i)) if kind is Conv1D else nn.Linear
        setattr(self, names[0], make(24, 96))
        self.act = ACT2FN[activation]
        setattr(self, names[1], make(96, 24))

    def forward(self, x):
        return getattr(self, self.names[1])(self.act(getattr(self, self.names[0])(x)))


def build(names=("c_fc", "c_proj"), kind=Conv1D, activation="gelu_new", dtype=torch.float32):
    torch.manual_seed(0)
    mlp = MLP(names, kind, activation).to(dtype)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.4)
    return mlp, copy.deepcopy(mlp)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("c_fc", "c_proj"), Conv1D),
        (("dense_h_to_4h", "dense_4h_to_h"), nn.Linear),
        (("fc1", "fc2"), nn.Linear),
    ],
    ids=["gpt2", "neox", "other"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_the_module(names, kind, activation, dtype):
    slow, fast = build(names, kind, activation, dtype)
    x = torch.randn(3, 5, 24, dtype=dtype)
    with torch.no_grad(), faster_modules(fast):
        wanted, got = slow(x), fast(x)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 3e-2}[dtype]
    assert got.dtype == dtype
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_weights_changed_later_are_used_and_keep_their_names():
    slow, fast = build()
    x = torch.randn(300, 24)
    with torch.no_grad(), faster_modules(fast):
        assert fast.state_dict().keys() == slow.state_dict().keys()
        fast(x)
        for mlp in (slow, fast):
            mlp.c_proj.weight[3:].zero_()
            mlp.c_fc.bias.add_(1)
        torch.testing.assert_close(fast(x), slow(x))


def test_gradients_are_those_of_the_module():
    slow, fast = build()
    x = torch.randn(2, 24)
    with faster_modules(fast):
        for mlp in (slow, fast):
            mlp(x).square().sum().backward()
    torch.testing.assert_close(fast.c_fc.weight.grad, slow.c_fc.weight.grad)


def swapped(model):
    """What the fast path changes on a model: modules with a ``forward`` of their own, and which modules."""
    parts = list(model.hf.named_modules())
    return [name for name, part in parts if "forward" in vars(part)], [
        (name, id(part)) for name, part in parts
    ]


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "llama"))
def test_everything_is_put_back(family, name):
    model, _ = family(name)
    before = swapped(model)
    assert not before[0]
    with contextlib.suppress(ZeroDivisionError), fast_path(model, on=True) as fast:
        assert fast.fast and not model.fast and fast.hf is model.hf
        assert len(swapped(model)[0]) >= 4 * model.n_layers
        raise ZeroDivisionError
    assert swapped(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_once_more_inside_changes_nothing(family, name):
    """Whether the fast model is given or, a second time, the plain one."""
    model, _ = family(name)
    tokens, before = random_tokens(), swapped(model)
    with torch.no_grad():
        with fast_path(model, on=True) as fast:
            wanted, inside = fast.hf(tokens).logits, swapped(model)
            for again in (fast, model):
                with fast_path(again, on=True) as twice:
                    assert twice.fast and torch.equal(twice.hf(tokens).logits, wanted)
                assert swapped(model) == inside and torch.equal(fast.hf(tokens).logits, wanted)
        assert swapped(model) == before
        torch.testing.assert_close(model.hf(tokens).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "is_fast"), [(None, True), ("0", True), ("", True), ("1", False), ("yes", False)]
)
def test_the_environment_decides_where_nobody_does(family, monkeypatch, said, is_fast):
    model, _ = family("gpt2")
    monkeypatch.delenv("SELFREPAIR_PLAIN", raising=False)
    if said is not None:
        monkeypatch.setenv("SELFREPAIR_PLAIN", said)
    with fast_path(model) as chosen:
        assert chosen.fast == is_fast
        assert is_fast or chosen is model
    with fast_path(model, on=not is_fast) as chosen:
        assert chosen.fast != is_fast


def test_models_of_several_threads_do_not_meet(tmp_path):
    from families import load_family

    models = [load_family("gpt2", tmp_path / str(number)) for number in range(2)]
    tokens, met, found = random_tokens(), threading.Barrier(2, timeout=60), {}

    def work(number):
        with torch.no_grad():
            if number:
                met.wait()
            with fast_path(models[number], on=True) as model:
                if not number:
                    met.wait()
                met.wait()
                found[number] = model.hf(tokens).logits

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.equal(found[0], found[1]) and not any(swapped(model)[0] for model in models)


def test_packed_weights_are_kept_for_the_next_time(monkeypatch):
    _, mlp = build()
    packs, real = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda *them: packs.append(1) or real(*them)
    )
    for _ in range(2):
        with torch.no_grad(), faster_modules(mlp):
            mlp(torch.randn(300, 24))
    assert len(packs) == 2  # one for each map


def test_the_allocator_is_told_when_the_fast_path_is_entered(family, monkeypatch):
    told = []

    class Glibc:
        def mallopt(self, *setting):
            told.append(setting)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Glibc())
    model, _ = family("gpt2")
    with fast_path(model, on=False):
        assert not told
    with fast_path(model, on=True):
        assert told == [(-1, 2**31 - 1), (-3, 2**25)]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    switch.keep_freed_memory()  # another C library has no such settings
