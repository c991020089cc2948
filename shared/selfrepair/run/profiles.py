"""Profiles: which models, text and amounts the notebooks run on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from selfrepair.choices import LAYER_POSITIONS, PRECISIONS
from selfrepair.engine.ablations import ABLATIONS
from selfrepair.errors import UserError
from selfrepair.models.checkpoints import read_config, whole_name
from selfrepair.models.support import check_config
from selfrepair.paths import PROFILES, REPOSITORY, RUNS
from selfrepair.statistics import check_fraction
from selfrepair.yaml_files import read_yaml

#: By name, what a value must satisfy, and how to say so.
Possible = Mapping[str, tuple[Callable[[Any], bool], str]]
#: What an entry of ``models`` may set for its model alone.
OF_ONE_MODEL = ("n_prompts", "dtype", "ablations", "donor_draws")


@dataclass(frozen=True)
class Profile:
    """``models`` are embedded names, hub ids and whole paths. ``dataset`` is a hub dataset id or ``pile``;
    without it, the held-out prose is measured on.

    ``dtype`` is that of the weights; ``tf32`` are float32 weights whose products a GPU computes in TF32.
    ``per_model`` holds what models have of their own (``OF_ONE_MODEL``): :meth:`of_model` minds it. A model's
    own ``ablations`` are the profile's and more. ``layer_positions``: where layers are ablated, at the
    ``last`` position (as published) or at ``all``. ``donor_draws``: how often heads are resample-ablated
    again with other donors.
    """

    models: list[str]
    ablations: list[str]
    n_prompts: int
    prompt_len: int = 128
    fraction: float = 0.02
    dataset: str | None = None
    dtype: str = "float32"
    layer_positions: str = "last"
    donor_draws: int = 0
    per_model: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Of its file; not a setting.
    name: str = ""

    def of_model(self, model: str) -> Profile:
        """The settings of one model, as a profile of that model alone."""
        return dataclasses.replace(self, models=[model], per_model={}, **self.per_model.get(model, {}))

    def changed(self, **changes: Any) -> Profile:
        """With the reader's changes, which go before what a model has of its own."""
        kept = {
            model: {key: value for key, value in own.items() if key not in changes}
            for model, own in self.per_model.items()
        }
        return dataclasses.replace(self, per_model=kept, **changes)

    @property
    def kinds(self) -> list[str]:
        """Every kind of ablation of any model: the profile's, then those that models have beside them."""
        of_models = (kind for model in self.models for kind in self.of_model(model).ablations)
        return list(dict.fromkeys([*self.ablations, *of_models]))

    @property
    def run_folder(self) -> Path:
        """Where a run of it goes, unless told otherwise."""
        return RUNS / self.name

    @property
    def amount(self) -> str:
        """For captions: ``788 prompts``, or ``788 to 7876 prompts`` where models differ."""
        amounts = sorted({self.of_model(model).n_prompts for model in self.models})
        return " to ".join(map(str, amounts[:1] + amounts[1:][-1:])) + " prompts"


def load_profile(name: str | Path) -> Profile:
    """A profile of the repository by name, or any YAML file by path.

    The file alone says which models are meant: relative paths in it begin at its folder, in a profile of the
    repository at the repository.

    Raises:
        UserError: no such profile, unreadable, not YAML, unknown, missing or repeated key, wrong type or
        impossible value, or a folder that lies in the working directory alone.
    """
    path = Path(whole_profile(name)) if _is_path(name) else PROFILES / f"{name}.yaml"
    folder = REPOSITORY if path.parent.resolve() == PROFILES else path.parent
    try:
        return dataclasses.replace(_profile(read_yaml(path), folder), name=path.stem)
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise UserError(
            f"{name}: no such profile; there are {known}, or give the path of a .yaml file"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_models(profile: Profile, models: Sequence[str]) -> None:
    """Refuses what no stage of a run could measure, before anything is loaded.

    Raises:
        UserError: a model that cannot be found, or as :func:`~selfrepair.models.support.check_config`.
    """
    for model in models:
        check_config(read_config(model), profile.of_model(model).prompt_len, model)


def whole_profile(name: str | Path) -> str:
    """What names the same profile in every process: the whole path of a file, a name as it is."""
    return os.path.abspath(name) if _is_path(name) else str(name)


def _is_path(name: str | Path) -> bool:
    return str(name).endswith((".yaml", ".yml"))


def _profile(values: object, folder: Path) -> Profile:
    fields = {f.name: f for f in dataclasses.fields(Profile) if f.name not in ("per_model", "name")}
    required = [f.name for f in fields.values() if f.default is dataclasses.MISSING]
    if not isinstance(values, dict):
        others = ", ".join(name for name in fields if name not in required)
        raise UserError(f"must give {', '.join(required)} as 'key: value' lines; it may also give {others}")
    _refuse_unknown(values, fields)
    missing = [name for name in required if name not in values]
    if missing:
        raise UserError(f"missing {', '.join(missing)}")
    models, per_model = _models(values["models"], folder)
    for own in ({}, *per_model.values()):
        settings: dict[str, Any] = {f.name: f.default for f in fields.values()} | values | own
        refuse_impossible({key: settings[key] for key in POSSIBLE}, POSSIBLE)
        if settings["ablations"][: len(values["ablations"])] != values["ablations"]:
            raise UserError(
                f"ablations of a model must begin with the profile's, {', '.join(values['ablations'])}, not "
                f"be {', '.join(settings['ablations'])}"
            )
        check_fraction(settings["fraction"], settings["n_prompts"] * (settings["prompt_len"] - 1))
    return Profile(**{**values, "models": models, "per_model": per_model})


def _models(entries: object, folder: Path) -> tuple[list[str], dict[str, dict[str, object]]]:
    """Whole names, in order, and what each model that has settings of its own sets."""
    if not isinstance(entries, list) or not entries:
        raise UserError(f"models must be a list of names, not {shown(entries)}")
    settings: dict[str, dict[str, object]] = {}
    for entry in entries:
        own = dict(entry) if isinstance(entry, dict) else {"name": entry}
        _refuse_unknown(own, ("name", *OF_ONE_MODEL))
        name = own.pop("name", None)
        if not _is_name(name):
            raise UserError(
                f"models must be names, or a name with {' or '.join(OF_ONE_MODEL)}, not {shown(entry)}"
            )
        whole = whole_name(name, folder)
        if whole == name != whole_name(name):
            raise UserError(
                f"{name}: is a folder here, but paths in this profile begin at {folder}; give its whole path"
            )
        if whole in settings:
            raise UserError(f"models has {shown(name)} twice")
        settings[whole] = own
    return list(settings), {name: own for name, own in settings.items() if own}


def refuse_impossible(values: Mapping[str, object], possible: Possible) -> None:
    """Refuses values that cannot be.

    Raises:
        UserError: one of them; says what is wanted.
    """
    for key, value in values.items():
        is_possible, wanted = possible[key]
        if not is_possible(value):
            raise UserError(f"{key} must be {wanted}, not {' '.join(shown(value).split())}")


def _refuse_unknown(values: dict[object, object], known: Collection[str]) -> None:
    unknown = [shown(key) for key in values if key not in known]
    if unknown:
        raise UserError(f"unknown {', '.join(unknown)}; known keys are {', '.join(known)}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != "" and value == value.strip()


def _are_ablations(value: object) -> bool:
    return (
        isinstance(value, list)
        and value != []
        and all(kind in ABLATIONS and value.count(kind) == 1 for kind in value)
    )


#: Of settings (``True`` is an int in Python, and no number here).
POSSIBLE: Possible = {
    "ablations": (_are_ablations, f"a list of different ones of {', '.join(ABLATIONS)}"),
    "n_prompts": (
        lambda value: type(value) is int and value >= 2 and value % 2 == 0,
        "a positive even number",
    ),
    "prompt_len": (lambda value: type(value) is int and value >= 2, "a whole number of at least 2"),
    "fraction": (
        lambda value: type(value) in (int, float) and 0 < value <= 1,
        "a number above 0 and at most 1",
    ),
    "donor_draws": (lambda value: type(value) is int and value >= 0, "a whole number that is not negative"),
    "dataset": (lambda value: value is None or _is_name(value), "a dataset id or pile"),
    "layer_positions": (lambda value: value in LAYER_POSITIONS, f"one of {', '.join(LAYER_POSITIONS)}"),
    "dtype": (lambda value: value in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
}
