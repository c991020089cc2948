"""The faster kernels compute what the modules they stand in for compute."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from selfrepair.engine.fast.linear_maps import use_fast_kernels


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
    fast = copy.deepcopy(mlp)
    use_fast_kernels(fast)
    return mlp, fast


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize(
    ("names", "kind"),
    [(("c_fc", "c_proj"), Conv1D), (("dense_h_to_4h", "dense_4h_to_h"), nn.Linear), (("fc1", "fc2"), nn.Linear)],
    ids=["gpt2", "neox", "other"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_the_module(names, kind, activation, dtype):
    slow, fast = build(names, kind, activation, dtype)
    x = torch.randn(3, 5, 24, dtype=dtype)
    with torch.no_grad():
        wanted, got = slow(x), fast(x)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 3e-2}[dtype]
    assert got.dtype == dtype
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_weights_changed_later_are_used_and_keep_their_names():
    slow, fast = build()
    assert fast.state_dict().keys() == slow.state_dict().keys()
    x = torch.randn(2, 24)
    with torch.no_grad():
        for mlp in (slow, fast):
            mlp.c_proj.weight[3:].zero_()
            mlp.c_fc.bias.add_(1)
        torch.testing.assert_close(fast(x), slow(x))


def test_gradients_are_those_of_the_module():
    slow, fast = build()
    x = torch.randn(2, 24)
    for mlp in (slow, fast):
        mlp(x).square().sum().backward()
    torch.testing.assert_close(fast.c_fc.weight.grad, slow.c_fc.weight.grad)
