"""Data sets of the Hugging Face hub, or of folders like its repositories: which one it is, and its rows."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selfrepair.errors import UserError
from selfrepair.file_identity import identity_of_files
from selfrepair.models.hub import ask_hub


@dataclass(frozen=True)
class _Commit:
    """A data set of the hub as it is now or, ``unanswered`` says why, as it was when last downloaded."""

    revision: str
    unanswered: str


def dataset_identity(name: str, instead: str) -> str:
    """What tells a data set from others of its name: a hash of a folder's files, or the commit of the hub's.

    Hidden files are left out, which no data set is read from.

    Raises:
        UserError: a file cannot be read, or the hub has no such data set, or did not answer now nor before;
            ends with what to do ``instead``.
    """
    commit = _commit_of(name, instead)
    if commit is not None:
        return commit.revision
    files = (Path(name, file) for file in glob.iglob("**", root_dir=name, recursive=True))
    try:
        return identity_of_files(Path(name), files)
    except OSError as error:
        raise UserError(f"{name}: its files cannot be read ({error})") from error


def dataset_rows(name: str, instead: str, *, streaming: bool) -> Iterator[dict[str, Any]]:
    """The rows of a data set's ``train`` part, of the commit that :func:`dataset_identity` tells.

    ``streaming`` fetches rows as they are asked for, instead of all of the data set first.

    Raises:
        UserError: as :func:`dataset_identity`, or the hub does not answer or give the rows. It is not tried
            again and again then, as its own library does for half a minute; with ``HF_HUB_OFFLINE`` that
            library looks at once for what was downloaded.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    commit = _commit_of(name, instead)
    if commit is not None and commit.unanswered and not HF_HUB_OFFLINE:
        raise _not_reached(name, commit.unanswered, instead)
    import datasets

    revision = None if commit is None else commit.revision
    try:
        yield from datasets.load_dataset(name, split="train", streaming=streaming, revision=revision)
    except Exception as error:  # the hub's libraries raise many types when a name or the network is missing
        raise _nothing_given(name, error, instead) from error


@cache
def _commit_of(name: str, instead: str) -> _Commit | None:
    """``None`` for a folder. A process asks the hub once, so that all of it means the same data set."""
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    if os.path.isdir(name):
        return None
    try:
        unanswered = ask_hub(hf_hub_url(name, "README.md", repo_type="dataset")).why
        for file in ("README.md", ".gitattributes"):  # what its library reads; what all repositories have
            with suppress(EntryNotFoundError):
                found = hf_hub_download(name, file, repo_type="dataset", local_files_only=bool(unanswered))
                return _Commit(Path(found).parent.name, unanswered)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise _nothing_given(name, error, instead) from error
    if unanswered:
        raise _not_reached(name, unanswered, instead)
    raise UserError(f"{name}: the Hugging Face hub shows no file of this data set: {instead}")


def _not_reached(name: str, why: str, instead: str) -> UserError:
    return UserError(f"{name}: wanted from the Hugging Face hub, which was not reachable ({why}): {instead}")


def _nothing_given(name: str, error: Exception, instead: str) -> UserError:
    return UserError(
        f"{name}: the Hugging Face hub gave nothing for it ({type(error).__name__}); "
        f"check the name and the network, or {instead}"
    )
