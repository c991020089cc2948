"""Small random models of every supported family, made locally and loaded as any model is."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from selfrepair.models.loading import Model, load_model
from selfrepair.paths import MODELS

VOCAB = 61
LENGTH = 12


def _build(family: str, vocab_size: int) -> PreTrainedModel:
    shape = dict(vocab_size=vocab_size, num_hidden_layers=3, num_attention_heads=4, hidden_size=32, max_position_embeddings=32)
    match family:
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=32, n_positions=32))
        case "neox-parallel" | "neox-sequential":
            return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=64, use_parallel_residual=family == "neox-parallel", **shape))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(intermediate_size=48, num_key_value_heads=4, **shape))
        case "llama-gqa":
            return LlamaForCausalLM(LlamaConfig(intermediate_size=48, num_key_value_heads=2, attention_bias=True, **shape))
        case "opt":
            return OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **shape))
        case "gpt-neo":  # the second layer sees the last 5 tokens only
            kinds = [[["global", "local"], 1], [["global"], 1]]
            return GPTNeoForCausalLM(GPTNeoConfig(window_size=5, intermediate_size=64, attention_types=kinds, **_renamed(shape)))
        case "mistral":
            return MistralForCausalLM(MistralConfig(intermediate_size=48, num_key_value_heads=2, sliding_window=LENGTH, **shape))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(intermediate_size=48, num_key_value_heads=2, **shape))
        case "qwen3":  # the heads together are wider than the residual stream
            return Qwen3ForCausalLM(Qwen3Config(intermediate_size=48, num_key_value_heads=2, head_dim=12, **shape))
        case "phi":
            return PhiForCausalLM(PhiConfig(intermediate_size=64, **shape))
    raise ValueError(family)


def _renamed(shape: dict[str, int]) -> dict[str, int]:
    """The shape by the names that GPT-Neo's configuration has for it."""
    names = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    return {names.get(name, name): value for name, value in shape.items()}


FAMILIES = ("gpt2", "neox-parallel", "neox-sequential", "llama", "llama-gqa", "opt")
#: All that are supported; a family's place is the seed of its weights.
ALL_FAMILIES = (*FAMILIES, "gpt-neo", "mistral", "qwen2", "qwen3", "phi")
#: Those whose MLP does not read the attention of its own block.
PARALLEL = ("neox-parallel", "phi")


def build_family(family: str, vocab_size: int = VOCAB) -> PreTrainedModel:
    """Random weights, large enough that every norm, bias and nonlinearity matters."""
    torch.manual_seed(ALL_FAMILIES.index(family))
    model = _build(family, vocab_size)
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
