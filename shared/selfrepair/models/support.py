"""What is measured and what is refused, decided from the configuration before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from selfrepair.errors import UserError
from selfrepair.models.architectures import ARCHITECTURES, CONDITIONS, SUPPORTED, Architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Refusal:
    """Why architectures, given as ``model_type: well-known models``, break the definitions."""

    reason: str
    models: Mapping[str, str]


#: Architectures that were looked at and break the definitions.
REFUSALS: tuple[Refusal, ...] = tuple(
    Refusal(**row) for row in yaml.safe_load(Path(__file__).with_name("refusals.yaml").read_text("utf-8"))
)

#: What every configuration gives, by these names or others that stand for them.
SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")
#: Names under which config.json gives the longest prompt.
CONTEXT = ("max_position_embeddings", "n_positions")
UNKNOWN = "its definitions were not checked"
SHORT_WINDOW = "only prompts that lie within the sliding window were checked"


def find_architecture(model_type: str | None, model_name: str) -> Architecture:
    """The record of an architecture, by its ``model_type`` in config.json.

    Raises:
        UserError: it breaks the definitions or was not checked; says why.
    """
    if model_type not in SUPPORTED:
        reasons = [refusal.reason for refusal in REFUSALS if model_type in refusal.models]
        raise _refused(model_name, model_type, reasons[0] if reasons else UNKNOWN)
    return SUPPORTED[model_type]


def check_architecture(config: Mapping[str, Any], model_name: str) -> Architecture:
    """The record of an architecture, by what config.json gives.

    Raises:
        UserError: as :func:`find_architecture` and :func:`check_stock`.
    """
    architecture = find_architecture(config.get("model_type") and str(config["model_type"]), model_name)
    check_stock(config, architecture.causal_lm, model_name)
    return architecture


def check_stock(config: Mapping[str, Any], causal_lm: str, model_name: str) -> None:
    """Refuses a checkpoint of another model than transformers' own class of language models ``causal_lm``.

    Raises:
        UserError: its config.json names other classes, or code of its own; says that the class would be
            loaded instead.
    """
    instead = f"transformers' {causal_lm} would be measured in its place"
    if config.get("auto_map"):
        raise UserError(
            f"{model_name}: not supported: by auto_map in its config.json it is computed by code of its own, "
            f"which is never run, and {instead}: if that is the same model, take auto_map out"
        )
    named = config.get("architectures") or [causal_lm]
    if causal_lm not in (named if isinstance(named, list) else [named]):
        raise UserError(
            f"{model_name}: not supported: by architectures in its config.json it is {named}, no language "
            f"model, or one of another kind; {instead}"
        )


def check_supported(config: PretrainedConfig, model_name: str) -> None:
    """Refuses a model for which direct effects and self-repair are not what the definitions say.

    Raises:
        UserError: the architecture or a setting of it breaks the definitions, or a size is none; says which.
    """
    architecture = find_architecture(config.model_type, model_name)
    _check_sizes(config, architecture, model_name)
    for condition in (*architecture.conditions, *CONDITIONS):
        if condition.breaks(config):
            setting = condition.setting.replace("`", "")
            raise _refused(model_name, config.model_type, f"with {setting}: {condition.reason}")


def _check_sizes(config: PretrainedConfig, architecture: Architecture, model_name: str) -> None:
    for setting in SIZES:
        size = getattr(config, setting, None)
        if type(size) is not int or size < 1:
            raise UserError(
                f"{model_name}: {setting} must be a positive whole number, in its config.json it is {size!r}"
            )
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
    if width is None and config.hidden_size % heads:
        raise UserError(
            f"{model_name}: not a loadable causal language model "
            f"(hidden_size {config.hidden_size} is no multiple of num_attention_heads {heads})"
        )
    groups = getattr(config, "num_key_value_heads", None)
    plain = width in (None, config.hidden_size // heads) and groups in (None, heads)
    if not (plain or architecture.any_heads):
        raise UserError(
            f"{model_name}: head_dim and num_key_value_heads in its config.json are none of a "
            f"'{config.model_type}': take them out"
        )


def check_config(config: Mapping[str, Any], prompt_len: int, model_name: str) -> None:
    """Refuses by what config.json gives, before anything is loaded, what is refused later in any case.

    Raises:
        UserError: as :func:`check_architecture`, :func:`check_context` and :func:`check_window`.
    """
    switch = check_architecture(config, model_name).sliding_window
    window = config.get("sliding_window")
    if type(window) is int and (config.get(switch) if isinstance(switch, str) else switch):
        _check_window(window, prompt_len, model_name)
    for context in (config[name] for name in CONTEXT if type(config.get(name)) is int):
        check_context(context, prompt_len, model_name)


def check_context(context: int, prompt_len: int, model_name: str) -> None:
    """Refuses prompts that are longer than the model's context.

    Raises:
        UserError: they are; says how long prompts may be.
    """
    if prompt_len > context:
        raise UserError(
            f"{model_name}: prompts of {prompt_len} tokens do not fit its context: "
            f"give prompts (prompt_len) of {context} tokens or less"
        )


def check_window(config: PretrainedConfig, prompt_len: int, model_name: str) -> None:
    """Refuses prompts that are longer than the model's sliding attention window.

    Raises:
        UserError: they are; says how long prompts may be.
    """
    _check_window(getattr(config, "sliding_window", None), prompt_len, model_name)


def _check_window(window: object, prompt_len: int, model_name: str) -> None:
    """``window`` (tokens) is that of a configuration; ``None``: attention looks back over all of them."""
    if window is not None and not (type(window) is int and prompt_len <= window):
        raise UserError(
            f"{model_name}: its attention looks back {window} tokens and {SHORT_WINDOW}: "
            f"give prompts (prompt_len) of {window} tokens or less"
        )


def check_reads_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that knows special tokens alone: of a folder without one, transformers makes some.

    Raises:
        UserError: it does.
    """
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"{tokenizer.name_or_path or 'tokenizer'}: no tokenizer with a vocabulary, so it reads no text: "
            "save the model's tokenizer in its folder"
        )


def _refused(model_name: str, model_type: str | None, reason: str) -> UserError:
    return UserError(
        f"{model_name}: architecture '{model_type}' is not supported: {reason}; "
        f"supported are {', '.join(sorted(SUPPORTED))}"
    )


def support_table() -> str:
    """Markdown table of what is supported and what is refused, why."""
    known = sorted(ARCHITECTURES, key=lambda architecture: architecture.model_type)
    rows = [("`model_type`", "models", "supported"), ("---", "---", "---")]
    rows += [(f"`{one.model_type}`", one.models, f"yes: {one.blocks}") for one in known]
    windowed = ", ".join(f"`{one.model_type}`" for one in known if one.sliding_window)
    rows.append((f"{windowed} with `sliding_window` shorter than the prompts", "", f"no: {SHORT_WINDOW}"))
    conditions = [(f"`{one.model_type}`", condition) for one in known for condition in one.conditions]
    for kind, condition in [*conditions, *(("any", condition) for condition in CONDITIONS)]:
        rows.append((f"{kind} with {condition.setting}", condition.models, f"no: {condition.reason}"))
    for refusal in REFUSALS:
        kinds, models = (f"`{kind}`" for kind in refusal.models), dict.fromkeys(refusal.models.values())
        rows.append((", ".join(kinds), ", ".join(models), f"no: {refusal.reason}"))
    rows.append(("any other", "", f"no: {UNKNOWN}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
