"""Small models of random weights that nobody has seen, and the texts that assignments measure."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from selfrepair.course.plain import PlainModel
from selfrepair.course.seed import hidden_seed
from selfrepair.models.architectures import ARCHITECTURES, TINY_SHAPE
from selfrepair.models.loading import load_model
from selfrepair.paths import MODELS
from selfrepair.text.corpora import load_tokens

#: GPT-2 has LayerNorm and biases, Llama RMSNorm and no biases; in Pythia, attention and MLP run side by side.
FAMILIES = {"gpt2": "gpt2", "llama": "llama", "pythia": "neox-parallel"}
VOCABULARY = 61
POCKET = "pocket-gpt2"

logging.disable_progress_bar()  # a test cell that writes to the error stream gets no points


class Example(NamedTuple):
    """A model and some prompts of random tokens for it; the donor of prompt ``i`` is half a batch away."""

    family: str
    model: PlainModel
    tokens: Int[Tensor, "prompt position"]


def random_example(family: str, seed: int, n_prompts: int = 6, length: int = 10) -> Example:
    """A tiny random model in float64 of one of :data:`FAMILIES`, and random prompts: the same for a seed."""
    return Example(family, _random_model(family, seed), random_tokens(n_prompts, length, seed))


def random_tokens(n_prompts: int, length: int, seed: int) -> Int[Tensor, "prompt position"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (n_prompts, length), generator=generator)


def hidden_examples() -> Iterator[Example]:
    """One example of each family, made from the instructor's seed.

    Raises:
        UserError: there is no seed (see :mod:`selfrepair.course.seed`).
    """
    seed = hidden_seed()
    for place, family in enumerate(FAMILIES):
        yield random_example(family, seed + place)


def pocket_example(n_prompts: int = 8, length: int = 48) -> Example:
    """The pocket model of the course in float32, and the first prompts of the held-out text."""
    return Example(POCKET, _pocket_model(), held_out_tokens(n_prompts, length))


@functools.cache
def _pocket_model() -> PlainModel:
    return PlainModel.load(POCKET)


@functools.cache
def held_out_tokens(n_prompts: int, length: int) -> Int[Tensor, "prompt position"]:
    """Prompts of the text that no pocket model was trained on.

    Raises:
        UserError: an odd number of prompts, or more than there are.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODELS / POCKET, trust_remote_code=False)
    return torch.from_numpy(load_tokens(tokenizer, n_prompts=n_prompts, prompt_len=length).tokens)


@functools.cache
def _random_model(family: str, seed: int) -> PlainModel:
    (model_type, settings) = next(
        (record.model_type, record.tiny[FAMILIES[family]])
        for record in ARCHITECTURES
        if FAMILIES[family] in record.tiny
    )
    own_names = CONFIG_MAPPING[model_type].attribute_map
    shape = {own_names.get(name, name): size for name, size in TINY_SHAPE.items()}
    no_ends = dict(bos_token_id=None, eos_token_id=None)  # the usual ones are not in so small a vocabulary
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **no_ends, **shape, **settings)
    hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            spread = 0.3 if weight.ndim > 1 else 0.2
            centre = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0
            weight.copy_(centre + spread * torch.randn(weight.shape, generator=generator))
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODELS / POCKET, trust_remote_code=False).save_pretrained(folder)
        model = load_model(folder, "cpu", torch.float64)
    for module in model.hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)
    return PlainModel(model)


def _rms_norm(norm: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """In the precision of ``x``; Hugging Face's computes in float32 whatever it gets."""
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
