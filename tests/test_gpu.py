"""What an NVIDIA GPU computes must be what the CPU does: heads, layers, training."""

import dataclasses
import shutil

import pytest
import reference
import torch
from families import random_tokens, save_family
from test_head_ablation import FIELDS, replacement, worst

from selfrepair.engine.head_ablation import ablate_heads
from selfrepair.models.devices import set_precision
from selfrepair.models.loading import load_model
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.run.own_model import measure_heads
from selfrepair.training.config import Phase, TrainingConfig
from selfrepair.training.data import prepare
from selfrepair.training.loop import train

pytestmark = pytest.mark.gpu("a GPU gives the numbers of the CPU")
FAMILIES = ("gpt2", "neox-parallel", "llama", "llama-gqa")
CUDA = torch.device("cuda")


def on_gpu(name, folder):
    set_precision("float32", CUDA)
    return load_model(str(save_family(name, folder / name)), CUDA)


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_equal_the_float64_reference(family, name, kind, tmp_path):
    _, hf = family(name)
    model = on_gpu(name, tmp_path)
    tokens = random_tokens()
    found = ablate_heads(model, tokens.cuda(), replacement(kind, model, tokens.cuda()))
    found = dataclasses.replace(found, **{field: getattr(found, field).cpu() for field in FIELDS})
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            wanted = reference.ablate(hf, tokens, layer, head, kind)
            assert worst(found, wanted, layer, head) <= 1e-4, (layer, head)


def test_one_head_at_a_time_is_all_at_once(tmp_path):
    model = on_gpu("gpt2", tmp_path)
    tokens = random_tokens().cuda()
    whole = ablate_heads(model, tokens, replacement("resample", model, tokens))
    one_by_one = ablate_heads(model, tokens, replacement("resample", model, tokens), rows=1)
    for field in FIELDS:
        torch.testing.assert_close(getattr(whole, field), getattr(one_by_one, field), rtol=0, atol=1e-5)


def test_a_pocket_model_is_measured_alike_on_both():
    on_cpu, on_cuda = (measure_heads("pocket-gpt2", n_prompts=8, device=device) for device in ("cpu", "cuda"))
    for name in ("direct_effect", "logit_change", "self_repair_heads", "self_repair_mlps"):
        difference = abs(on_cpu.effects[name] - on_cuda.effects[name]).max()
        assert float(difference) <= 1e-3 * float(abs(on_cpu.effects[name]).max())


def test_training_goes_on_where_it_was_killed(tmp_path, own_cache, monkeypatch):
    config = TrainingConfig(
        name="tiny", architecture="gpt2", n_layers=2, n_heads=2, d_model=32, d_mlp=64, vocab_size=512,
        phases=(Phase(tokens=64 * 4 * 40, gazetteer_share=0.25),), sequence_length=64, batch_size=4,
        precision="float32", head_dropout=0.5,
    )  # fmt: skip
    data = prepare(config, HELD_OUT_TEXT)
    whole = train(config, data, tmp_path / "whole", CUDA, save_every=20)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")  # its last saved state is that of step 20
    again = train(config, data, tmp_path / "killed", CUDA, save_every=20)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
