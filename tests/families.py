"""Small random models of every supported family, made locally and loaded as any model is."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from selfrepair.models import Model, load_model
from selfrepair.paths import MODELS

VOCAB = 61
LENGTH = 12
SHAPE = dict(vocab_size=VOCAB, num_hidden_layers=3, num_attention_heads=4, hidden_size=32, max_position_embeddings=32)


def _build(family: str) -> PreTrainedModel:
    match family:
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_layer=3, n_head=4, n_embd=32, n_positions=32))
        case "neox-parallel" | "neox-sequential":
            return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=64, use_parallel_residual=family == "neox-parallel", **SHAPE))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(intermediate_size=48, num_key_value_heads=4, **SHAPE))
        case "llama-gqa":
            return LlamaForCausalLM(LlamaConfig(intermediate_size=48, num_key_value_heads=2, attention_bias=True, **SHAPE))
        case "opt":
            return OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **SHAPE))
    raise ValueError(family)


FAMILIES = ("gpt2", "neox-parallel", "neox-sequential", "llama", "llama-gqa", "opt")


def save_family(family: str, folder: Path) -> Path:
    """Random weights, large enough that every norm, bias and nonlinearity matters."""
    torch.manual_seed(FAMILIES.index(family))
    model = _build(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.2
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(MODELS / "pocket-gpt2").save_pretrained(folder)
    return folder


def load_family(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(str(save_family(family, folder / family)), device="cpu", dtype=dtype)


def random_tokens(n_prompts: int = 6, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n_prompts, length), generator=torch.Generator().manual_seed(seed))
