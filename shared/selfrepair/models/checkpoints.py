"""Finding checkpoints by name: embedded models, local folders and hub ids, without loading anything heavy."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
import textwrap
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selfrepair.errors import UserError
from selfrepair.paths import MODELS

#: Seconds that the hub has to answer, name resolution included.
HUB_TIMEOUT = 3.0


def embedded_models() -> list[str]:
    """Names of the models that ship with the repository."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def model_folder(model_name: str) -> Path | None:
    """The folder of an embedded or local model; ``None`` for a hub id.

    Raises:
        UserError: ``model_name`` is a path but no folder with a ``config.json``.
    """
    if model_name in embedded_models():
        return MODELS / model_name
    path = Path(model_name)
    if os.path.isdir(model_name):  # False for what can be no path, where Path.is_dir raises
        if not (path / "config.json").is_file():
            raise UserError(f"{model_name}: no config.json in this folder, so it is no Hugging Face model")
        return path
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
            f"{model_name}: its config.json cannot be read ({error}): download it again"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{model_name}: its config.json is no JSON object: download it again")
    return config


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
    return _identity_of(found, (file for pattern in MODEL_FILES for file in found.glob(pattern)))


def dataset_identity(name: str, instead: str) -> str:
    """What tells a data set from others of its name: a hash of a folder's files, or the commit of the hub's.

    Hidden files are left out, which no data set is read from.

    Raises:
        UserError: a file cannot be read, or as :func:`dataset_revision`.
    """
    files = (Path(name, file) for file in glob.iglob("**", root_dir=name, recursive=True))
    return dataset_revision(name, instead) or _identity_of(Path(name), files)


def _identity_of(folder: Path, files: Iterable[Path]) -> str:
    try:
        states = [(file, file.stat()) for file in sorted(set(files)) if file.is_file()]
        return _hash_of(folder, tuple((file, state.st_size, state.st_mtime_ns) for file, state in states))
    except OSError as error:
        raise UserError(f"{folder}: its files cannot be read ({error})") from error


@cache
def _hash_of(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 of files' names in a folder and contents; sizes and times say whether they changed in this
    process."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"{file.relative_to(folder).as_posix()} {size} ".encode(errors="surrogateescape"))
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


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
    from huggingface_hub.constants import HF_HUB_OFFLINE
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
    status = None if HF_HUB_OFFLINE else _hub_status(url)
    if status is None:
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else f"no answer from {url.split('/resolve/')[0]}"
        raise UserError(
            f"{model_name}: wanted from the Hugging Face hub, which was not reachable ({why}): "
            f"{_other_names(model_name)}"
        )
    if status in (401, 403):  # to whom is not logged in, the hub says 401 of models that do not exist, too
        raise UserError(
            f"{model_name}: gated, private or no model on the Hugging Face hub: "
            f"log in with 'hf auth login', or check the name: {_other_names(model_name)}"
        )
    if status == 404:
        raise UserError(
            f"{model_name}: no embedded model, no local folder "
            f"and no model on the Hugging Face hub: check the name: {_other_names(model_name)}"
        )
    if status >= 400:
        raise UserError(
            f"{model_name}: the Hugging Face hub answered with error {status}: "
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


def check_dataset_reachable(name: str, instead: str) -> None:
    """Refuses a data set of a hub that does not answer: its own library tries for half a minute, in many
    lines. With ``HF_HUB_OFFLINE`` that library looks at once for what was downloaded.

    Raises:
        UserError: no answer; ends with what to do ``instead``.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError

    if HF_HUB_OFFLINE or os.path.isdir(name):
        return
    try:
        url = hf_hub_url(name, "README.md", repo_type="dataset")
    except HFValidationError:  # no possible name, which the library says at once
        return
    if _hub_status(url) is None:
        raise UserError(
            f"{name}: wanted from the Hugging Face hub, which was not reachable "
            f"(no answer from {url.split('/resolve/')[0]}): {instead}"
        )


@cache
def dataset_revision(name: str, instead: str) -> str | None:
    """The commit of a data set of the hub, as the hub says it or, without an answer, as it was when last
    downloaded; ``None`` for a folder.

    The hub is asked once by a process, so that all of it takes the data set for the same.

    Raises:
        UserError: the hub has no such data set, or did not answer now nor before; ends with what to do
            ``instead``.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    if os.path.isdir(name):
        return None
    why = "HF_HUB_OFFLINE is set"
    try:
        if not HF_HUB_OFFLINE:
            url = hf_hub_url(name, "README.md", repo_type="dataset")
            why = "" if _hub_status(url) is not None else f"no answer from {url.split('/resolve/')[0]}"
        for file in ("README.md", ".gitattributes"):  # what its library reads; what all repositories have
            with suppress(EntryNotFoundError):
                found = hf_hub_download(name, file, repo_type="dataset", local_files_only=bool(why))
                return Path(found).parent.name
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"{name}: the Hugging Face hub gave nothing for it ({type(error).__name__}); "
            f"check the name and the network, or {instead}"
        ) from error
    said = f"was not reachable ({why})" if why else "shows no file of it"
    raise UserError(f"{name}: wanted from the Hugging Face hub, which {said}: {instead}")


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
        said = textwrap.shorten(str(error), 200, placeholder=" …")
        raise UserError(
            f"{model_name}: the Hugging Face hub did not give its config.json ({said})"
        ) from error


def _hub_status(url: str) -> int | None:
    """HTTP status of a HEAD request with the hub's own client, proxies and token; ``None``: no answer."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    answer: list[int] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
            answer.append(200)
        except HfHubHTTPError as error:
            answer.append(error.response.status_code)
        except Exception:  # whatever the client raises when there is no connection
            return

    asking = threading.Thread(target=ask, daemon=True)  # a resolver of names obeys no timeout
    asking.start()
    asking.join(HUB_TIMEOUT)
    return answer[0] if answer else None
