"""Profiles: which models, text and amounts the notebooks run on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml

from selfrepair.errors import UserError
from selfrepair.paths import PROFILES
from selfrepair.replacement import ABLATIONS


@dataclass(frozen=True)
class Profile:
    """``dataset`` is a hub dataset id or ``pile``; without it, the held-out prose is measured on."""

    models: list[str]
    ablations: list[str]
    n_prompts: int
    prompt_len: int = 128
    fraction: float = 0.02
    dataset: str | None = None


def load_profile(name: str | Path) -> Profile:
    """A profile of the repository by name, or any YAML file by path.

    Raises:
        UserError: no such profile, unknown or missing key, wrong type or impossible value.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise UserError(f"{name}: no such profile; there are {known}, or give the path of a .yaml file")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    fields = {field.name: field for field in dataclasses.fields(Profile)}
    if not isinstance(values, dict) or not set(values) <= set(fields):
        unknown = sorted(set(values) - set(fields)) if isinstance(values, dict) else values
        raise UserError(f"{path}: unknown {unknown}; known keys are {', '.join(fields)}")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    defaults = {f.name: f.default for f in fields.values() if f.default is not dataclasses.MISSING}
    fault = _fault(defaults | values)
    if fault:
        raise UserError(f"{path}: {fault}")
    return Profile(**values)


def _fault(values: dict[str, object]) -> str | None:
    for key in ("models", "ablations"):
        value = values[key]
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            return f"{key} must be a list of names, not {value!r}"
    if set(values["ablations"]) - set(ABLATIONS):
        return f"ablations must be among {', '.join(ABLATIONS)}, not {values['ablations']}"
    if type(values["n_prompts"]) is not int or values["n_prompts"] < 2 or values["n_prompts"] % 2:
        return f"n_prompts must be a positive even number, not {values['n_prompts']!r}"
    if type(values["prompt_len"]) is not int or values["prompt_len"] < 2:
        return f"prompt_len must be at least 2, not {values['prompt_len']!r}"
    if type(values["fraction"]) not in (int, float) or not 0 < values["fraction"] <= 1:
        return f"fraction must lie in (0, 1], not {values['fraction']!r}"
    if not isinstance(values["dataset"], str | None):
        return f"dataset must be a name, not {values['dataset']!r}"
    return None
