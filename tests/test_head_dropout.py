"""Training with dropout of whole heads and layers, and fine-tuning: masks, scale, seeds, and a float64 reference."""

import copy
import dataclasses

import pytest
import torch

from selfrepair.errors import UserError
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.training import head_dropout
from selfrepair.training.architecture import build_model, start_from
from selfrepair.training.config import Phase, TrainingConfig
from selfrepair.training.data import prepare
from selfrepair.training.head_dropout import heads_dropped, keep_mask
from selfrepair.training.loop import save_model, train

N_HEADS, D_HEAD = 4, 8
TINY = TrainingConfig(
    name="tiny", architecture="gpt2", n_layers=2, n_heads=N_HEADS, d_model=N_HEADS * D_HEAD, d_mlp=48,
    phases=(Phase(tokens=64 * 4 * 6, gazetteer_share=0.25),), vocab_size=512, sequence_length=64, batch_size=4,
    precision="float32",
)  # fmt: skip
CPU = torch.device("cpu")
of_each_architecture = pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])


@pytest.fixture(scope="module")
def data(own_cache):
    return prepare(TINY, HELD_OUT_TEXT)


def tiny(architecture="gpt2", **changes):
    return dataclasses.replace(TINY, architecture=architecture, **changes)


def out_projections(model):
    """The attention's output maps with what they read first in their weight, found by shape and order."""
    blocks = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    for block in blocks:
        attention = next(
            getattr(block, name) for name in ("attn", "attention", "self_attn") if hasattr(block, name)
        )
        yield next(
            getattr(attention, name) for name in ("c_proj", "dense", "o_proj") if hasattr(attention, name)
        )


def with_masks_in_the_weights(model, of_heads, of_layers):
    """Of one sequence's masks, a float64 model that has them in ``W_O`` and its bias: no hook, no dropout."""
    exact = copy.deepcopy(model).double().eval()
    for projection, heads, layer in zip(out_projections(exact), of_heads, of_layers, strict=True):
        by_input = torch.tensor(heads, dtype=torch.float64).repeat_interleave(D_HEAD)
        with torch.no_grad():
            if type(projection).__name__ == "Conv1D":  # reads by rows
                projection.weight.mul_(by_input[:, None] * layer)
            else:
                projection.weight.mul_(by_input[None, :] * layer)
            if projection.bias is not None:
                projection.bias.mul_(layer)
    return exact


@of_each_architecture
def test_equals_a_model_that_has_the_masks_in_its_weights(architecture, monkeypatch):
    config = tiny(architecture, head_dropout=0.5, attention_dropout_layer=0.25)
    model = build_model(config, 0).train()
    with torch.no_grad():
        for parameter in model.parameters():  # biases are 0 at first
            parameter.add_(0.05 * torch.randn_like(parameter))
    drawn = []

    def remembered(*arguments):
        drawn.append(keep_mask(*arguments))
        return drawn[-1]

    monkeypatch.setattr(head_dropout, "keep_mask", remembered)
    tokens = torch.randint(0, 512, (3, 16))
    torch.manual_seed(0)
    with heads_dropped(model, config), torch.no_grad():
        logits = model(input_ids=tokens).logits
    of_heads, of_layers = drawn[0::2], drawn[1::2]
    assert len(of_heads) == len(of_layers) == config.n_layers
    assert {float(value) for mask in of_heads for value in mask.flatten()} == {0, 2}
    for sequence in range(len(tokens)):
        exact = with_masks_in_the_weights(
            model,
            [mask[sequence].flatten().tolist() for mask in of_heads],
            [float(mask[sequence]) for mask in of_layers],
        )
        with torch.no_grad():
            expected = exact(input_ids=tokens[sequence : sequence + 1]).logits[0]
        torch.testing.assert_close(logits[sequence].double(), expected, atol=1e-4, rtol=0)


def test_what_is_kept_is_scaled_to_the_same_mean():
    torch.manual_seed(0)
    mask = keep_mask(0.25, torch.zeros(1), 40_000)
    assert {round(float(value), 6) for value in mask.unique()} == {0, round(4 / 3, 6)}
    assert (mask == 0).double().mean() == pytest.approx(0.25, abs=0.01)
    assert mask.double().mean() == pytest.approx(1, abs=0.015)


@of_each_architecture
def test_nothing_is_dropped_in_evaluation_or_afterwards(architecture):
    config = tiny(architecture, head_dropout=0.5, attention_dropout_layer=0.5)
    model = build_model(config, 0)
    tokens = torch.randint(0, 512, (2, 16))
    with torch.no_grad():
        plain = model.eval()(input_ids=tokens).logits
        with heads_dropped(model, config):
            assert torch.equal(model(input_ids=tokens).logits, plain)
            assert not torch.equal(model.train()(input_ids=tokens).logits, plain)
        assert torch.equal(model(input_ids=tokens).logits, plain)


def test_same_seed_same_masks():
    config = tiny(head_dropout=0.5)
    model = build_model(config, 0).train()
    tokens = torch.randint(0, 512, (4, 16))

    def logits(seed):
        torch.manual_seed(seed)
        with heads_dropped(model, config), torch.no_grad():
            return model(input_ids=tokens).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))


def test_fine_tuning_begins_where_the_other_training_ended(tmp_path, data):
    first = train(tiny(), data, tmp_path / "first.training", CPU)
    save_model(first, data, tmp_path / "first")
    config = tiny(start=str(tmp_path / "first"), optimizer="adamw", lr_other=1e-3, head_dropout=0.5)
    model = build_model(config, 0)
    start_from(model, config.start, data.tokenizer)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight.half().float(), atol=0, rtol=0)
    tuned = train(config, data, tmp_path / "tuned.training", CPU)
    again = train(config, data, tmp_path / "again.training", CPU)
    moved = 0.0
    for name, weight in tuned.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        moved = max(moved, float((weight - first.state_dict()[name]).abs().max()))
    assert 1e-3 < moved < 0.1  # each step of AdamW moves a weight by at most about its rate


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_mlp": 64}, "not of the architecture and shape"),
        ({"architecture": "llama"}, "not of the architecture and shape"),
        ({"start": "nowhere"}, "nowhere"),
    ],
)
def test_a_start_that_does_not_fit_is_said(tmp_path, data, changes, said):
    save_model(build_model(tiny(), data.tokenizer.bos_token_id), data, tmp_path / "start")
    config = tiny(**({"start": str(tmp_path / "start")} | changes))
    with pytest.raises(UserError, match=said):
        train(config, data, tmp_path / "work", CPU)


def test_a_start_with_another_tokenizer_is_said(tmp_path, data):
    other = tiny(gazetteer_seed=1, phases=(Phase(tokens=64 * 4 * 6, gazetteer_share=0.9),))
    vocabulary = prepare(other, HELD_OUT_TEXT).tokenizer.get_vocab()
    assert len(vocabulary) == len(data.tokenizer.get_vocab()) and vocabulary != data.tokenizer.get_vocab()
    save_model(build_model(other, 0), prepare(other, HELD_OUT_TEXT), tmp_path / "start")
    with pytest.raises(UserError, match="another tokenizer"):
        train(tiny(start=str(tmp_path / "start")), data, tmp_path / "work", CPU)
