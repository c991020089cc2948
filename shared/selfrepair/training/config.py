"""What determines a training run, read from YAML and checked before any work is done."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any, TypeVar, cast, get_type_hints

from selfrepair.errors import UserError
from selfrepair.yaml_files import read_yaml

ARCHITECTURES = ("gpt2", "gpt_neox", "llama")
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("muon", "adamw")
T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """A stretch of training: ``tokens`` counts every position of the packed rows, BOS included.

    ``warmup`` and ``decay`` are the fractions of the phase's steps in which the learning rates rise
    linearly from 0 and fall linearly to 0; between them they are ``lr_factor`` times the run's.
    ``gazetteer_share`` of the rows is gazetteer text, in the first ``gazetteer_phrasings`` phrasings.
    """

    tokens: int
    gazetteer_share: float = 0.05
    gazetteer_phrasings: int = 16
    lr_factor: float = 1.0
    warmup: float = 0.02
    decay: float = 0.5


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. ``bfloat16`` means autocast over float32 weights.

    ``n_checkpoints`` counts step 0, log-spaced steps of the first phase, and the final model; 0 keeps
    the final one only. Every phase after the first starts with fresh optimizer states from the
    weights as they would be stored.

    ``start`` is what is fine-tuned, an embedded model's name or a folder, of the same shape and tokenizer;
    without one, weights are random. ``muon`` trains the blocks' matrices with Muon at ``lr_matrices`` and the
    rest with AdamW at ``lr_other``; ``adamw`` all with AdamW at ``lr_other``, undecayed. ``head_dropout`` is
    the probability that a head's ``z`` is dropped for a whole sequence, ``attention_dropout_layer`` that an
    attention layer's output is.
    """

    name: str
    architecture: str
    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    phases: tuple[Phase, ...]
    dropout: float = 0.0
    head_dropout: float = 0.0
    attention_dropout_layer: float = 0.0
    start: str = ""
    optimizer: str = "muon"
    vocab_size: int = 4096
    sequence_length: int = 128
    batch_size: int = 32
    gazetteer_seed: int = 0
    lr_matrices: float = 0.02
    lr_other: float = 0.003
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    precision: str = "bfloat16"
    n_checkpoints: int = 0

    @property
    def phase_steps(self) -> list[int]:
        """Steps of each phase."""
        return [phase.tokens // (self.batch_size * self.sequence_length) for phase in self.phases]

    @property
    def n_steps(self) -> int:
        return sum(self.phase_steps)

    def data_key(self) -> dict[str, object]:
        """What determines the tokenizer and the corpus rows: runs that agree in it share both."""
        first = self.phases[0]
        fields = ("vocab_size", "sequence_length", "gazetteer_seed")
        gazetteer = {
            "gazetteer_share": first.gazetteer_share,
            "gazetteer_phrasings": first.gazetteer_phrasings,
        }
        return {field: getattr(self, field) for field in fields} | gazetteer


def load_config(path: str | Path) -> TrainingConfig:
    """Reads and checks a YAML configuration.

    Raises:
        UserError: unreadable file, unknown or missing key, wrong type, or impossible value.
    """
    return config_of(load_mapping(path), str(path))


def load_mapping(path: str | Path) -> dict[str, object]:
    """What a YAML file of 'key: value' lines holds.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = read_yaml(Path(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold 'key: value' lines")
    return values


def config_of(values: dict[str, object], where: str) -> TrainingConfig:
    """A configuration from its YAML values; ``where`` they stand is said of what is wrong.

    Raises:
        UserError: unknown or missing key, wrong type, or impossible value.
    """
    phases = values.get("phases")
    if phases is not None:
        if not isinstance(phases, list) or not phases or not all(isinstance(phase, dict) for phase in phases):
            raise UserError(f"{where}: phases must be a list of phases, each 'key: value' lines")
        built = tuple(_build(Phase, dict(phase), where, "phases: ") for phase in phases)
        values = {**values, "phases": built}
    config = _build(TrainingConfig, dict(values), where)
    fault = _fault(config)
    if fault:
        raise UserError(f"{where}: {fault}")
    return config


def _build(kind: type[T], values: dict[str, object], path: str, where: str = "") -> T:
    """``kind(**values)``, if the keys are its fields and the values of their types."""
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{path}: {where}unknown key {shown(key)}; known are {', '.join(fields)}")
        if hints[key] is float and type(value) is int and value.bit_length() < 1024:
            values[key] = value = float(value)
        if key != "phases" and type(value) is not hints[key]:
            raise UserError(f"{path}: {where}{key} must be {hints[key].__name__}, not {shown(value)}")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UserError(f"{path}: {where}missing {', '.join(missing)}")
    return kind(**values)


def _fault(config: TrainingConfig) -> str | None:
    for part in (config, *config.phases):
        for field, value in vars(part).items():
            if isinstance(value, float) and not math.isfinite(value):
                return f"{field} must be finite, not {value}"
    positive = ("n_layers", "n_heads", "d_model", "d_mlp", "batch_size", "lr_matrices", "lr_other", "clip")
    for field in positive:
        if not getattr(config, field) > 0:
            return f"{field} must be positive, not {getattr(config, field)}"
    if not (config.name.isprintable() and config.name.strip()):
        return f"name must be one line of text, not {shown(config.name)}"
    if config.architecture not in ARCHITECTURES:
        return f"unknown architecture '{config.architecture}'; known are {', '.join(ARCHITECTURES)}"
    if config.precision not in PRECISIONS:
        return f"unknown precision '{config.precision}'; known are {', '.join(PRECISIONS)}"
    if config.d_model % config.n_heads or (config.d_model // config.n_heads) % 2:
        return f"d_model {config.d_model} must be an even multiple of n_heads {config.n_heads}"
    if config.vocab_size < 257 or config.sequence_length < 5:
        return (
            "vocab_size must be at least 257 (the bytes and BOS) and sequence_length at least 5 (BOS and "
            "twice two tokens)"
        )
    if config.optimizer not in OPTIMIZERS:
        return f"unknown optimizer '{config.optimizer}'; known are {', '.join(OPTIMIZERS)}"
    for field in ("dropout", "head_dropout", "attention_dropout_layer"):
        if not 0 <= getattr(config, field) < 1:
            return f"{field} must lie in [0, 1)"
    for phase, steps in zip(config.phases, config.phase_steps, strict=True):
        if steps < 1:
            return (
                f"{phase.tokens} tokens are less than one batch of "
                f"{config.batch_size * config.sequence_length}"
            )
        if not 0 <= phase.gazetteer_share < 1 or phase.gazetteer_phrasings < 1:
            return "gazetteer_share must lie in [0, 1) and gazetteer_phrasings be positive"
        if not phase.lr_factor > 0:
            return f"lr_factor must be positive, not {phase.lr_factor}"
        if not (0 <= phase.warmup and 0 <= phase.decay and phase.warmup + phase.decay <= 1):
            return "warmup and decay must be fractions of the steps that sum to at most 1"
    if config.weight_decay < 0 or config.seed < 0 or config.gazetteer_seed < 0:
        return "weight_decay and seeds must not be negative"
    if config.n_checkpoints < 0 or config.n_checkpoints == 1:
        return "n_checkpoints must be 0 (final model only) or at least 2 (step 0 and the final model)"
    return None
