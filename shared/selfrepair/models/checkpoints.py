"""Finding checkpoints by name: embedded models, local folders and hub ids, without loading anything heavy."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from functools import cache
from pathlib import Path

from selfrepair.errors import UserError
from selfrepair.paths import MODELS

#: Seconds that the hub has to answer, name resolution included.
HUB_TIMEOUT = 3.0


def embedded_models() -> list[str]:
    """Names of the models that ship with the repository."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def model_folder(name: str) -> Path | None:
    """The folder of an embedded or local model; ``None`` for a hub id.

    Raises:
        UserError: ``name`` is a path but no folder with a ``config.json``.
    """
    if name in embedded_models():
        return MODELS / name
    path = Path(name)
    if os.path.isdir(name):  # False for what can be no path, where Path.is_dir raises
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: no config.json in this folder, so it is no Hugging Face model")
        return path
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder")
    return None


def find_model(name: str) -> str:
    """What to give ``from_pretrained``: the folder of an embedded or local model, else the hub id itself.

    A hub id whose config.json was not downloaded before is asked for, once, at the hub.

    Raises:
        UserError: as :func:`model_folder`, or the hub cannot be reached or refuses the model.
    """
    folder = model_folder(name)
    if folder is not None:
        return str(folder)
    _check_on_hub(name)
    return name


def read_config(name: str) -> dict[str, object]:
    """A model's config.json, from the hub if need be.

    Raises:
        UserError: as :func:`find_model`, or the file is no JSON object.
    """
    found = Path(find_model(name))
    if (found / "config.json").is_file():
        file = found / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(name, "config.json"))
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: its config.json cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{name}: its config.json is no JSON object")
    return config


def short_name(name: str) -> str:
    """A model's name without the folders that it lies in; a hub id as it is."""
    return Path(name).resolve().name if os.path.isdir(name) else name


#: What of a model folder determines its numbers: configuration, weights and tokenizer.
MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json")


def model_identity(name: str) -> str:
    """What tells a model from others of its name: a hash of its files, or the commit of a hub model's snapshot.

    Raises:
        UserError: as :func:`find_model`.
    """
    found = Path(find_model(name))
    if found.is_dir():
        files = sorted({file for pattern in MODEL_FILES for file in found.glob(pattern)})
        return _hash_of(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json")).parent.name


@cache
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 of files' names and contents; sizes and times say whether they changed while this process runs."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def training_metrics(folder: Path) -> dict[str, object]:
    """The ``metrics.json`` that ``selfrepair train`` leaves with a model; empty for models that were trained by others.

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


def _check_on_hub(name: str) -> None:
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        url = hf_hub_url(name, "config.json")
    except HFValidationError as error:
        raise UserError(f"{name}: no embedded model, no folder and no possible id of a model on the Hugging Face hub") from error
    status = None if HF_HUB_OFFLINE else _hub_status(url)
    if status is None:
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else f"no answer from {url.split('/resolve/')[0]}"
        raise UserError(
            f"{name}: wanted from the Hugging Face hub, which was not reachable ({why}): "
            "give the path of a local model folder instead, or use --profile pocket, which needs no network"
        )
    if status in (401, 403):  # to whom is not logged in, the hub says 401 of models that do not exist, too
        raise UserError(f"{name}: gated, private or no model on the Hugging Face hub: log in with 'hf auth login', or check the name")
    if status == 404:
        raise UserError(f"{name}: no embedded model, no local folder and no model on the Hugging Face hub: check the name")
    if status >= 400:
        raise UserError(f"{name}: the Hugging Face hub answered with error {status}: try again later, or give a local model folder")


def _hub_status(url: str) -> int | None:
    """HTTP status of one HEAD request with the hub's own client, proxies and token; ``None`` if nobody answers in time."""
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
