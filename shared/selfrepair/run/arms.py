"""Arms: models that differ in dropout and seed, trained and measured by one command; and their table."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any, cast

import torch
import xarray as xr
from filelock import FileLock, Timeout

from selfrepair import __version__
from selfrepair.analysis.arms import COMPENSATIONS, PROFILE, arms_dataset, arms_table, effects_of_arm
from selfrepair.analysis.estimates import Estimate
from selfrepair.errors import NotMeasurable, UserError
from selfrepair.models.checkpoints import checkpoints, find_model, short_name, training_metrics
from selfrepair.models.devices import resolve_device
from selfrepair.models.loading import load_hf
from selfrepair.run.study import Study
from selfrepair.store.code_identity import code_version
from selfrepair.store.files import slug, write_atomically
from selfrepair.store.stores import attributes_of, open_store, write_store
from selfrepair.training.config import TrainingConfig, config_of, load_mapping
from selfrepair.training.data import prepare
from selfrepair.training.evaluate import evaluate
from selfrepair.training.folders import put_in_place
from selfrepair.training.loop import run_identity, save_model, train


@dataclass(frozen=True)
class Arm:
    """One model of a comparison: to be trained by ``config``, or there already as ``model_name``.

    ``step`` counts training steps of a checkpoint; -1 is the end of training.
    """

    name: str
    group: str
    config: TrainingConfig | None = None
    model_name: str = ""
    step: int = -1

    @property
    def file_name(self) -> str:
        """What its row and its trained model are called, whatever its name."""
        return slug(self.name)


def load_arms(path: Path) -> list[Arm]:
    """The arms of a YAML file: groups that are ``trained``, and groups that are ``given``.

    A trained group has one configuration and values to ``vary`` in it, all combined; a given one names
    ``models``, or one model with its checkpoints (``checkpoints_of``).

    Raises:
        UserError: unreadable file, unknown or missing key, or as :func:`config_of`.
    """
    values: dict[str, Any] = load_mapping(path)
    unknown = values.keys() - {"trained", "given"}
    if unknown:
        raise UserError(f"{path}: unknown key {shown(min(unknown, key=str))}; known are trained, given")
    for key, groups in values.items():
        _check(isinstance(groups, list), path, f"{key} must be a list of groups")
    arms = [arm for group in values.get("trained", []) for arm in _trained(group, path)]
    arms += [arm for group in values.get("given", []) for arm in _given(group, path)]
    names = [arm.file_name for arm in arms]
    for arm in arms:
        if names.count(arm.file_name) > 1:
            raise UserError(
                f"{path}: two arms are called '{arm.name}'; their groups, or folders, need other names"
            )
    return arms


def _trained(group: object, path: Path) -> Iterator[Arm]:
    known = _checked(group, ("group", "config", "vary"), path)
    _check(isinstance(known["config"], dict), path, "config must be 'key: value' lines")
    is_lists = isinstance(known["vary"], dict) and all(
        isinstance(one, list) for one in known["vary"].values()
    )
    _check(is_lists, path, "vary must give a list of values for each key")
    for values in itertools.product(*known["vary"].values()):
        own = dict(zip(known["vary"], values, strict=True))
        says = "-".join(f"{key}-{value}" for key, value in own.items())
        name = f"{known['group']}-{says}".replace(", ", "-").replace(" ", "-")
        yield Arm(name, known["group"], config_of({**known["config"], **own, "name": name}, str(path)))


def _given(group: object, path: Path) -> Iterator[Arm]:
    if isinstance(group, dict) and "checkpoints_of" in group:
        known = _checked(group, ("group", "checkpoints_of"), path)
        _check(isinstance(known["checkpoints_of"], str), path, "checkpoints_of must be the name of a model")
        for saved in checkpoints(known["checkpoints_of"]):
            name = f"{short_name(known['checkpoints_of'])}-step-{saved.step}"
            yield Arm(name, known["group"], model_name=saved.model_name, step=saved.step)
        return
    known = _checked(group, ("group", "models"), path)
    is_names = isinstance(known["models"], list) and all(isinstance(name, str) for name in known["models"])
    _check(is_names, path, "models must be a list of names")
    for name in known["models"]:
        yield Arm(short_name(name), known["group"], model_name=name)


def _checked(group: object, keys: tuple[str, ...], path: Path) -> dict[str, Any]:
    if not isinstance(group, dict) or group.keys() != set(keys):
        raise UserError(f"{path}: every group must have the keys {', '.join(keys)}, and no other")
    _check(isinstance(group["group"], str), path, "group must be a name")
    return group


def _check(is_right: bool, path: Path, wanted: str) -> None:
    if not is_right:
        raise UserError(f"{path}: {wanted}")


def run_arms(file: Path, text: Path | None, folder: Path, device: str) -> Path | None:
    """Makes every arm of ``file`` that is not there yet, and then the table beside it; returns its path.

    What was made of another configuration, text, model, code or settings of :data:`PROFILE` is made again;
    without ``text``, of trained models the text is not compared.

    The same command started several times shares the work: an arm that another process is making is passed
    over and tried again at the end, and who is last writes the table (others: ``None``). Killed, it goes on
    where it was. Models, stores and one small store for each arm go into ``folder``.

    Raises:
        UserError: a model that is missing, text that is needed and not given, or as training and measuring.
    """
    arms = load_arms(file)
    for arm in arms:
        if arm.config is None:
            find_model(arm.model_name)
    rows = {arm.name: folder / "rows" / f"{arm.file_name}.zarr" for arm in arms}
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    left = arms
    while left:
        others = [arm for arm in left if not _is_made(arm, text, folder, device, rows[arm.name])]
        if len(others) == len(left):  # a round in which none was free: who makes these writes the table
            names = ", ".join(arm.name for arm in others)
            print(f"being made by another process: {names}", file=sys.stderr)
            return None
        left = others
    with FileLock(folder / "table.lock"):  # two may find that all arms are made
        return _write_table(file, [open_store(row) for row in rows.values()])


def _is_made(arm: Arm, text: Path | None, folder: Path, device: str, row: Path) -> bool:
    """Leaves an arm's ``row`` on the disk; whether it could, as no other process is making it."""
    try:
        with FileLock(row.with_suffix(".lock"), blocking=False):
            _make(arm, text, folder, device, row)
    except Timeout:
        return False
    return True


def _make(arm: Arm, text: Path | None, folder: Path, device: str, row: Path) -> None:
    """Leaves an arm's ``row``, what :func:`arms_dataset` gives of it, on the disk, unless it is there."""
    model_name = arm.model_name if arm.config is None else str(_train(arm, text, folder, device))
    study = Study.of(PROFILE, model_name, device=device, out_dir=folder)
    metrics = training_metrics(Path(find_model(model_name))) if arm.step < 0 else {}
    config: dict[str, Any] = metrics.get("config", {})
    known = {
        "name": arm.name,
        "group": arm.group,
        "step": arm.step,
        **{key: float(config.get(key, 0)) for key in ("dropout", "head_dropout", "attention_dropout_layer")},
        "seed": int(config.get("seed", 0)),
        "start": str(config.get("start", "")),
        "tokens": int(metrics.get("training_tokens", 0)),
    }
    determined_by = json.dumps(known | _measured_by(study), sort_keys=True)
    attributes = attributes_of(row)
    if attributes is not None and attributes["determined_by"] == determined_by:
        return
    print(f"{arm.name}: measuring", file=sys.stderr)
    measured, effects = _measured(arm, study, config)
    made = arms_dataset([(known | measured, effects)])
    write_store([made.assign_attrs(determined_by=determined_by, version=__version__)], row, "arm")


def _measured_by(study: Study) -> dict[str, object]:
    """What determines all that is measured of the study's model: stores' names say which model, settings,
    text and code."""
    (model_name,) = study.profile.models
    tasks = [study.task(name, model_name) for name in ("heads", *COMPENSATIONS.values())]
    return {
        "stores": [task.path.stem for task in tasks],
        "fraction": study.profile.fraction,
        "code": code_version("selfrepair.run.arms"),
    }


def _measured(
    arm: Arm, study: Study, config: dict[str, Any]
) -> tuple[dict[str, object], dict[str, Estimate]]:
    """What is measured of the study's model, trained by ``config``, and its effects."""
    (model_name,) = study.profile.models
    (sweep,) = study.measured("heads").values()
    layers = {}
    for name in COMPENSATIONS.values():
        try:
            (layers[name],) = study.measured(name).values()
        except NotMeasurable as why:  # a model that answers no facts
            print(f"{arm.name}: {why}", file=sys.stderr)
    hf, tokenizer = load_hf(model_name, resolve_device(study.device))
    can_do = evaluate(
        hf, tokenizer, int(config.get("gazetteer_seed", 0)), int(config.get("sequence_length", 128))
    )
    about: dict[str, object] = {
        "loss_held_out_prose": can_do["loss_held_out_prose"],
        "fact_recall": can_do["fact_recall_held_out_phrasings"],
        "weights_sha256": str(sweep.attrs["weights_sha256"])[:16],
        "made_on": _made_on(study.device),
    }
    return about, effects_of_arm(sweep, layers, study.profile.fraction)


def _made_on(device: str) -> str:
    found = resolve_device(device)
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else found.type
    return f"{name}, torch {torch.__version__}"


def _train(arm: Arm, text: Path | None, folder: Path, device: str) -> Path:
    """Trains an arm unless its folder is there already, of the same configuration, start, text and code."""
    out = folder / "trained" / arm.file_name
    config = cast(TrainingConfig, arm.config)  # of what is trained
    found = training_metrics(out).get("trained_from", {})
    data = None if text is None else prepare(config, text)
    of_text = found.get("text or tokenizer", "")
    trained_from = run_identity(config, data.digest(data.training_rows(config)) if data else of_text)
    if found == trained_from:
        return out
    if data is None:
        others = [what for what, own in trained_from.items() if found.get(what) != own]
        why = f"again: its model is of another {others[0]}" if found else "first"
        raise UserError(f"{arm.name}: must be trained {why}; give the folder of its text with --text")
    print(f"{arm.name}: training", file=sys.stderr)
    work = out.with_name(f"{out.name}.training")
    model = train(config, data, work, resolve_device(device))
    save_model(model, data, work / "finished")
    metrics = {
        "config": dataclasses.asdict(config),
        "steps": config.n_steps,
        "training_tokens": config.n_steps * config.batch_size * config.sequence_length,
        "trained_from": trained_from,
    }
    put_in_place(work, metrics, out)
    return out


def _write_table(file: Path, rows: list[xr.Dataset]) -> Path:
    """``arms.csv`` and ``arms.zarr`` beside the file of arms."""
    loaded = [row.load().drop_attrs() for row in rows]
    arms = xr.concat(loaded, "arm", data_vars="minimal", coords="minimal", compat="equals", join="exact")
    write_store([arms], file.with_suffix(".zarr"), "arm", to_be_merged=True)
    table = file.with_suffix(".csv")
    write_atomically(table, arms_table(arms).to_csv(index=False, float_format="%.6g").encode())
    return table
