"""The folders that a training writes, and which of them it may replace or remove."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from selfrepair.errors import UserError
from selfrepair.models.checkpoints import training_metrics

#: What a training leaves in a model's folder, as it is now and as earlier ones left it.
OF_A_MODEL = (
    *("config.json", "generation_config.json", "model.safetensors", "checkpoints"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("metrics.json", "training_curve.csv", "README.md"),
)
#: And without what it makes none.
ALWAYS_THERE = ("config.json", "metrics.json", "training_curve.csv")
#: What it keeps in its working folder until it is done.
AT_WORK = ("state.pt", "state.unfinished", "curve.csv", "checkpoints", "finished", "finished.unfinished")


def training_folders(out: Path) -> tuple[Path, Path]:
    """The model folder, by its whole path, and the folder beside it that a training works in.

    Raises:
        UserError: it holds the working directory.
    """
    whole = Path(os.path.abspath(out))
    here = Path.cwd()
    if whole == here or whole in here.parents:
        raise UserError(f"{out}: is or holds the folder that you are in; give --out another one")
    return whole, whole.with_name(f"{whole.name}.training")


def check_replaceable(model_folder: Path) -> None:
    """Refuses to replace anything but a folder that a training made, with nothing else in it.

    Raises:
        UserError: it is something else; says what shows it.
    """
    if model_folder.is_symlink() or not model_folder.is_dir():
        raise UserError(f"{model_folder}: is no folder, so no training made it; choose another --out")
    missing = [name for name in ALWAYS_THERE if not (model_folder / name).is_file()]
    if missing or not training_metrics(model_folder):
        raise UserError(
            f"{model_folder}: no training made this folder ({', '.join(missing) or 'its metrics.json'} is "
            "not as one leaves it), so --overwrite does not replace it; choose another --out"
        )
    _refuse_others(model_folder, OF_A_MODEL, "--overwrite would delete that with the model")


def check_working_folder(work: Path) -> None:
    """Refuses to work in, and in the end remove, a folder with anything else in it.

    Raises:
        UserError: it holds something else, or is no folder; says what.
    """
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise UserError(f"{work}: a training works there, and it is no folder; choose another --out")
    if work.exists():
        _refuse_others(work, AT_WORK, "a training works there and removes it in the end")


def put_in_place(work: Path, metrics: dict[str, Any], out: Path) -> None:
    """Moves the model in ``work/finished`` to ``out``, with its metrics and the curve of its training; what
    is there, and ``work``, go."""
    folder = work / "finished"
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    shutil.copy(work / "curve.csv", folder / "training_curve.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        shutil.rmtree(out)
    shutil.move(folder, out)
    shutil.rmtree(work)


def _refuse_others(folder: Path, known: Collection[str], why: str) -> None:
    others = sorted({entry.name for entry in folder.iterdir()} - set(known))
    if others:
        raise UserError(f"{folder}: holds {others[0]}, which no training made; {why}: move it elsewhere")
