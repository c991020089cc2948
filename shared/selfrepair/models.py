"""Finding and loading models: embedded names, local folders and hub ids, by one path."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from selfrepair.errors import UserError
from selfrepair.paths import MODELS


def embedded_models() -> list[str]:
    """Names of the models that ship with the repository."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def find_model(name: str) -> str:
    """What to give ``from_pretrained``: the folder of an embedded or local model, else the hub id itself.

    Raises:
        UserError: ``name`` is a path but no folder with a ``config.json``.
    """
    if name in embedded_models():
        return str(MODELS / name)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: no config.json in this folder, so it is no Hugging Face model")
        return str(path)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder")
    return name


def load_hf(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The Hugging Face causal language model and tokenizer of an embedded name, local folder or hub id.

    Raises:
        UserError: it cannot be found, read or reached.
    """
    where = find_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_why_not_loaded(name, where, error)) from error
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def _why_not_loaded(name: str, where: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if Path(where).is_dir():
        return f"{name}: not a loadable causal language model: {reason[:200]}"
    return (
        f"{name}: neither an embedded model ({', '.join(embedded_models())}) nor a local folder, and the Hugging Face hub "
        f"gave nothing for it; check the name and the network, or give a local folder ({reason[:120]})"
    )
