"""Finding checkpoints by name: embedded models, local folders and hub ids, without loading anything heavy."""

from __future__ import annotations

import difflib
import json
import os
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selfrepair.errors import UserError
from selfrepair.file_identity import identity_of_files
from selfrepair.models.hub import ask_hub
from selfrepair.paths import MODELS


def embedded_models() -> list[str]:
    """Names of the models that ship with the repository."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def model_folder(model_name: str) -> Path | None:
    """The folder of an embedded or local model; ``None`` for a hub id.

    Raises:
        UserError: ``model_name`` is a file, or a path but no folder with a ``config.json``.
    """
    if model_name in embedded_models():
        return MODELS / model_name
    path = Path(model_name)
    if os.path.isdir(model_name):  # False for what can be no path, where Path.is_dir raises
        if not (path / "config.json").is_file():
            raise UserError(f"{model_name}: no config.json in this folder, so it is no Hugging Face model")
        return path
    if os.path.isfile(model_name):
        raise UserError(f"{model_name}: a file, not a model's folder: give the folder that it lies in")
    if model_name.count("/") > 1 or model_name.startswith((".", "/", "~")):
        raise UserError(f"{model_name}: no such folder")
    return None


def find_model(model_name: str) -> str:
    """What to give ``from_pretrained``: the folder of an embedded or local model, else the hub id itself.

    A hub id whose config.json was not downloaded before is asked for, once, at the hub.

    Raises:
        UserError: as :func:`model_folder`, or the hub cannot be reached or refuses the model.
    """
    folder = model_folder(model_name)
    if folder is not None:
        return str(folder)
    _check_on_hub(model_name)
    return model_name


def read_config(model_name: str) -> dict[str, Any]:
    """A model's config.json, from the hub if need be.

    Raises:
        UserError: as :func:`find_model`, or the file is no JSON object.
    """
    found = Path(find_model(model_name))
    file = found / "config.json" if found.is_dir() else _config_from_hub(model_name)
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_name}: its config.json cannot be read ({error}): {what_to_mend(model_name)}"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{model_name}: its config.json is no JSON object: {what_to_mend(model_name)}")
    return config


CHECK_FOLDER = "check the files of its folder"


def what_to_mend(model_name: str) -> str:
    """What to do about a damaged model: of a folder, nobody knows here where it came from."""
    return "download it again" if model_folder(model_name) is None else CHECK_FOLDER


def whole_name(model_name: str, folder: str | Path = "") -> str:
    """A name that means the same model in every process: of a local folder, its whole path.

    Relative paths begin at ``folder``, by default the working directory. Embedded names and hub ids stay.
    """
    place = os.path.join(folder, model_name)
    is_local = model_name not in embedded_models() and os.path.isdir(place)
    return os.path.abspath(place) if is_local else model_name


def short_name(model_name: str) -> str:
    """A model's name without the folders that it lies in; a hub id as it is."""
    return Path(os.path.abspath(model_name)).name if os.path.isdir(model_name) else model_name


#: What of a model folder is its tokenizer.
TOKENIZER_FILES = (
    *("*.model", "tokenizer*", "vocab.*", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json"),
)
#: What of a model folder determines its numbers: configuration, weights and tokenizer.
MODEL_FILES = ("config.json", "*.index.json", "*.safetensors", "*.bin", *TOKENIZER_FILES)


def model_identity(model_name: str) -> str:
    """What tells a model from others of its name: a hash of its files, or the commit of a hub model.

    Raises:
        UserError: as :func:`find_model`, or a file cannot be read.
    """
    found = Path(find_model(model_name))
    if not found.is_dir():
        return _config_from_hub(model_name).parent.name
    try:
        return identity_of_files(found, (file for pattern in MODEL_FILES for file in found.glob(pattern)))
    except OSError as error:
        raise UserError(f"{found}: its files cannot be read ({error})") from error


def training_metrics(folder: Path) -> dict[str, Any]:
    """The ``metrics.json`` that ``selfrepair train`` leaves with a model; empty for models trained by others.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    try:
        metrics = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({error}); copy the model again") from error
    config = metrics.get("config") if isinstance(metrics, dict) else None
    seed = config.get("gazetteer_seed") if isinstance(config, dict) else None
    return metrics if type(seed) is int and seed >= 0 else {}


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was after ``step`` training steps; ``model_name`` is what to load."""

    step: int
    model_name: str


def checkpoints(model_name: str) -> list[Checkpoint]:
    """A model's saved training checkpoints, in order, and last the model itself; empty if it has none."""
    folder = model_folder(model_name)
    if folder is None:
        return []
    saved = [
        Checkpoint(int(named[1]), str(path))
        for path in folder.glob("checkpoints/step-*")
        if (named := re.fullmatch("step-([0-9]+)", path.name))
    ]
    steps = training_metrics(folder).get("steps")
    if not saved or steps is None:
        return []
    return [*sorted(saved, key=lambda checkpoint: checkpoint.step), Checkpoint(int(steps), model_name)]


def _check_on_hub(model_name: str) -> None:
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(model_name, "config.json"), str):
            return
        url = hf_hub_url(model_name, "config.json")
    except HFValidationError as error:
        raise UserError(
            f"{model_name}: no embedded model, no folder and no possible id of a model on the Hugging Face "
            f"hub: {_other_names(model_name)}"
        ) from error
    answer = ask_hub(url)
    if answer.status is None:
        raise UserError(
            f"{model_name}: wanted from the Hugging Face hub, which was not reachable ({answer.why}): "
            f"{_other_names(model_name)}"
        )
    if answer.status in (
        401,
        403,
    ):  # to whom is not logged in, the hub says 401 of models that do not exist, too
        raise UserError(
            f"{model_name}: gated, private or no model on the Hugging Face hub: "
            f"log in with 'hf auth login', or check the name: {_other_names(model_name)}"
        )
    if answer.status == 404:
        raise UserError(
            f"{model_name}: no embedded model, no local folder "
            f"and no model on the Hugging Face hub: check the name: {_other_names(model_name)}"
        )
    if answer.status >= 400:
        raise UserError(
            f"{model_name}: the Hugging Face hub answered with error {answer.status}: "
            "try again later, or give a local model folder"
        )


def _other_names(model_name: str) -> str:
    """What may have been meant, and what there is without a network."""
    embedded = embedded_models()
    close = difflib.get_close_matches(model_name, embedded, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    return (
        f"{meant}embedded models, which need no network, are {', '.join(embedded)}; or give the path of a "
        "local model folder"
    )


@cache
def _config_from_hub(model_name: str) -> Path:
    """Where config.json of a hub model lies once it is downloaded: in a folder named after its commit.

    The hub is asked once by a process, so that all of it takes the model for the same.

    Raises:
        UserError: the hub does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(model_name, "config.json"))
    except (OSError, HfHubHTTPError) as error:
        said = textwrap.shorten(str(error), 200)
        raise UserError(
            f"{model_name}: the Hugging Face hub did not give its config.json ({said})"
        ) from error
