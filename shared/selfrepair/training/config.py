"""What determines a training run, read from YAML and checked before any work is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import yaml

from selfrepair.errors import UserError

ARCHITECTURES = ("gpt2", "gpt_neox", "llama")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. ``tokens`` counts every position of the packed rows, BOS included.

    ``warmup`` and ``decay`` are the fractions of steps in which the learning rates rise linearly
    from 0 and fall linearly to 0; between them they are constant. ``bfloat16`` means autocast over
    float32 weights. ``n_checkpoints`` counts step 0 and the final model; 0 keeps the final one only.
    """

    name: str
    architecture: str
    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    tokens: int
    dropout: float = 0.0
    vocab_size: int = 4096
    sequence_length: int = 128
    batch_size: int = 32
    gazetteer_share: float = 0.05
    gazetteer_seed: int = 0
    lr_matrices: float = 0.02
    lr_other: float = 0.003
    weight_decay: float = 0.1
    warmup: float = 0.02
    decay: float = 0.5
    clip: float = 1.0
    seed: int = 0
    precision: str = "bfloat16"
    n_checkpoints: int = 0

    @property
    def n_steps(self) -> int:
        return self.tokens // (self.batch_size * self.sequence_length)

    def data_key(self) -> dict[str, object]:
        """The fields that determine tokenizer and training rows: runs that agree in them share both."""
        fields = ("vocab_size", "sequence_length", "gazetteer_share", "gazetteer_seed")
        return {field: getattr(self, field) for field in fields}


def load_config(path: str | Path) -> TrainingConfig:
    """Reads and checks a YAML configuration.

    Raises:
        UserError: unreadable file, unknown or missing key, wrong type, or impossible value.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold 'key: value' lines")
    hints = get_type_hints(TrainingConfig)
    fields = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{path}: unknown key '{key}'; known are {', '.join(fields)}")
        if hints[key] is float and type(value) is int:
            values[key] = value = float(value)
        if type(value) is not hints[key]:
            raise UserError(f"{path}: {key} must be {hints[key].__name__}, not {value!r}")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    config = TrainingConfig(**values)
    fault = _fault(config)
    if fault:
        raise UserError(f"{path}: {fault}")
    return config


def _fault(config: TrainingConfig) -> str | None:
    positive = ("n_layers", "n_heads", "d_model", "d_mlp", "tokens", "batch_size", "lr_matrices", "lr_other", "clip")
    for field in positive:
        if not getattr(config, field) > 0:
            return f"{field} must be positive, not {getattr(config, field)}"
    if config.architecture not in ARCHITECTURES:
        return f"unknown architecture '{config.architecture}'; known are {', '.join(ARCHITECTURES)}"
    if config.precision not in PRECISIONS:
        return f"unknown precision '{config.precision}'; known are {', '.join(PRECISIONS)}"
    if config.d_model % config.n_heads or (config.d_model // config.n_heads) % 2:
        return f"d_model {config.d_model} must be an even multiple of n_heads {config.n_heads}"
    if config.vocab_size < 257 or config.sequence_length < 2:
        return "vocab_size must be at least 257 (the bytes and BOS) and sequence_length at least 2"
    if not (0 <= config.gazetteer_share < 1 and 0 <= config.dropout < 1):
        return "gazetteer_share and dropout must lie in [0, 1)"
    if not (0 <= config.warmup and 0 <= config.decay and config.warmup + config.decay <= 1):
        return "warmup and decay must be fractions of the steps that sum to at most 1"
    if config.weight_decay < 0 or config.seed < 0 or config.gazetteer_seed < 0:
        return "weight_decay and seeds must not be negative"
    if config.n_checkpoints < 0 or config.n_checkpoints == 1:
        return "n_checkpoints must be 0 (final model only) or at least 2 (step 0 and the final model)"
    if config.n_steps < 1:
        return f"{config.tokens} tokens are less than one batch of {config.batch_size * config.sequence_length}"
    return None
