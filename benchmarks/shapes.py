"""Models of named shapes with random weights, made in the dtype and on the device in which they are used."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass

import torch
from machine import free_memory
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from selfrepair.errors import UserError
from selfrepair.models.loading import Model, name_parts
from selfrepair.paths import MODELS
from selfrepair.training.config import load_config


@dataclass(frozen=True)
class Shape:
    """``d_mlp`` is the number of neurons; architectures are Hugging Face's names for them."""

    architecture: str
    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    vocab_size: int
    context_length: int

    def config(self) -> PretrainedConfig:
        if self.architecture == "gpt2":
            return GPT2Config(
                n_layer=self.n_layers,
                n_head=self.n_heads,
                n_embd=self.d_model,
                n_inner=self.d_mlp,
                vocab_size=self.vocab_size,
                n_positions=self.context_length,
            )
        kind = {"gpt_neox": GPTNeoXConfig, "llama": LlamaConfig}[self.architecture]
        return kind(
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context_length,
        )


def _pocket_shapes() -> dict[str, Shape]:
    names = [field.name for field in dataclasses.fields(Shape)]
    found = {}
    for path in sorted((MODELS / "configs").glob("*.yaml")):
        values = vars(load_config(path))
        found[path.stem] = Shape(
            **{name: values["sequence_length" if name == "context_length" else name] for name in names}
        )
    return found


SHAPES: dict[str, Shape] = {
    "gpt2-small": Shape("gpt2", 12, 12, 768, 3072, 50257, 1024),
    "gpt2-medium": Shape("gpt2", 24, 16, 1024, 4096, 50257, 1024),
    "gpt2-large": Shape("gpt2", 36, 20, 1280, 5120, 50257, 1024),
    "pythia-160m": Shape("gpt_neox", 12, 12, 768, 3072, 50304, 2048),
    "pythia-410m": Shape("gpt_neox", 24, 16, 1024, 4096, 50304, 2048),
    "pythia-1b": Shape("gpt_neox", 16, 8, 2048, 8192, 50304, 2048),
    "llama-7b": Shape("llama", 32, 32, 4096, 11008, 32000, 2048),
    "tiny-gpt2": Shape("gpt2", 2, 4, 64, 256, 256, 128),
    "tiny-pythia": Shape("gpt_neox", 2, 4, 64, 256, 256, 128),
    "tiny-llama": Shape("llama", 2, 4, 64, 172, 256, 128),
    **_pocket_shapes(),
}


def weight_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Memory of all weights; none is made."""
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    return sum(parameter.numel() * parameter.itemsize for parameter in hf.parameters())


def make_model(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Model:
    """A model of that shape, its weights made once, on ``device`` in ``dtype``, and never on disk.

    They are random and large enough that every head, bias and norm counts in a comparison.

    Raises:
        UserError: the weights do not fit into the device's free memory.
    """
    needed, free = weight_bytes(shape, dtype), free_memory(device)
    if needed > free:
        narrower = "" if dtype.itemsize == 2 else "--dtype bfloat16 or "
        raise UserError(
            f"{name}: weights in {str(dtype).removeprefix('torch.')} take {needed / 1e9:.3g} GB, "
            f"{free / 1e9:.3g} GB are free on {device}; use {narrower}a device with more memory"
        )
    torch.manual_seed(0)
    with device:
        hf: PreTrainedModel = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=min(parameter.shape) ** -0.5)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<bos>": 0}, unk_token="<bos>")),
        bos_token="<bos>",
        eos_token="<bos>",
    )
    with tempfile.TemporaryDirectory() as folder:  # a bridge takes its tokenizer from a folder
        hf.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=hf, device=device, dtype=dtype)
    return name_parts(name, bridge)
