"""Small random models of every supported family, made locally and loaded as any model is."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from selfrepair.models.architectures import ARCHITECTURES, TINY_SHAPE, is_parallel
from selfrepair.models.loading import Model, load_model
from selfrepair.paths import MODELS

VOCAB = 61
LENGTH = 12

#: (model_type, settings) of every tiny model; a family's place is the seed of its weights.
TINY = {
    family: (record.model_type, settings)
    for record in ARCHITECTURES
    for family, settings in record.tiny.items()
}
ALL_FAMILIES = tuple(TINY)
#: Those of the quick loop: one with LayerNorm, a parallel one, one with RMSNorm and grouped keys.
QUICK_FAMILIES = ("gpt2", "neox-parallel", "llama-gqa")
#: Enough for tests that take long.
FAMILIES = ("gpt2", "neox-parallel", "neox-sequential", "llama", "llama-gqa", "opt")


def tiny_config(family: str, vocab_size: int = VOCAB) -> PretrainedConfig:
    model_type, settings = TINY[family]
    own_names = CONFIG_MAPPING[model_type].attribute_map
    shape = {own_names.get(name, name): size for name, size in TINY_SHAPE.items()}
    return AutoConfig.for_model(model_type, vocab_size=vocab_size, **shape, **settings)


#: Those whose MLP does not read the attention of its own block.
PARALLEL = tuple(family for family in ALL_FAMILIES if is_parallel(tiny_config(family)))


def build_family(family: str, vocab_size: int = VOCAB) -> PreTrainedModel:
    """Random weights, large enough that every norm, bias and nonlinearity matters."""
    torch.manual_seed(ALL_FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.2
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    return model


def save_family(family: str, folder: Path) -> Path:
    build_family(family).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(MODELS / "pocket-gpt2").save_pretrained(folder)
    return folder


def load_family(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(str(save_family(family, folder / family)), device="cpu", dtype=dtype)


def random_tokens(n_prompts: int = 6, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n_prompts, length), generator=torch.Generator().manual_seed(seed))
