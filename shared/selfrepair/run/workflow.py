"""A run of a profile: what there is to do, in which order, and doing it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from selfrepair.errors import NotMeasurable, UserError
from selfrepair.measure.task import Task
from selfrepair.models.checkpoints import read_config
from selfrepair.run.marks import mark, say_done
from selfrepair.run.notebooks import notebook_keys
from selfrepair.run.study import Study, model_slug, with_needs
from selfrepair.store.code_identity import code_version
from selfrepair.store.files import identity
from selfrepair.store.manifest import manifest_of

BYTES = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}
#: Megabytes that Python, PyTorch and a batch's activations take beside the weights.
BESIDE_WEIGHTS_MB = 2500
#: Megabytes that a notebook takes beside what it reads.
BESIDE_DATA_MB = 2500
#: Of heads' ablations for each head and token: six variables in float32.
BYTES_PER_EFFECT = 24
#: The stage of what needs the network, and the name of all stages together.
NETWORK_STAGE, ALL_STAGES = 0, "all"


def plan(study: Study) -> dict[str, Any]:
    """What a run is made of, as JSON: stages of shards of each model, and keys of notebooks.

    A ``key`` changes with everything that determines results (code, settings, text, weights, released
    tables): what was made under another key is made again.

    Raises:
        UserError: a model that cannot be found or reached.
    """
    models = {name: _plan_of_model(study, name) for name in study.profile.models}
    notebooks = notebook_keys(study)
    return {
        "models": models,
        "notebooks": notebooks,
        "notebook_mem_mb": round(
            max(model["mem_mb"] for model in models.values()) + BESIDE_DATA_MB + _in_memory_mb(study)
        ),
        "page": identity({"code": code_version("selfrepair.run.record"), "notebooks": notebooks}),
    }


def _plan_of_model(study: Study, model_name: str) -> dict[str, Any]:
    tasks = list(study.tasks(model_name))
    weights_mb = _weights_mb(study, model_name)
    stages = [
        [
            f"{task.label}:{shard}"
            for task in with_needs(tasks)
            if stage_of(task) == stage
            for shard in task.shards
        ]
        for stage in range(1 + max(map(stage_of, tasks)))
    ]
    return {
        "slug": model_slug(model_name),
        "key": _key_of(tasks),
        "stages": stages,
        "mem_mb": round(2 * weights_mb + BESIDE_WEIGHTS_MB),  # on a CPU, weights are kept in a second layout
    }


def _key_of(tasks: Sequence[Task]) -> str:
    """Changes with everything that determines what is measured of a model."""
    return identity({task.label: task.path.stem for task in tasks})


def stage_of(task: Task) -> int:
    """When a measurement can be made: 0 with the network, else after the stages of what it needs."""
    if task.measurement.needs_network:
        return NETWORK_STAGE
    return 1 + max((stage_of(needed) for needed in task.needed.values()), default=0)


#: Names under which configurations give the numbers of layers and heads, d_model and the size of the
#: vocabulary.
_SIZES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "vocabulary": ("vocab_size",),
}


def _sizes(model_name: str) -> dict[str, int]:
    config = read_config(model_name)
    return {
        size: next((config[name] for name in names if isinstance(config.get(name), int)), 0)
        for size, names in _SIZES.items()
    }


def _weights_mb(study: Study, model_name: str) -> float:
    size = _sizes(model_name)
    parameters = 12 * size["layers"] * size["width"] ** 2 + 2 * size["vocabulary"] * size["width"]
    return parameters * BYTES[study.profile.of_model(model_name).dtype] / 1e6


def _in_memory_mb(study: Study) -> float:
    """What notebooks hold: every model's heads twice over, or one model's in four parts."""
    results = []
    for name in study.profile.models:
        own, size = study.profile.of_model(name), _sizes(name)
        results.append(
            BYTES_PER_EFFECT * size["layers"] * size["heads"] * own.n_prompts * (own.prompt_len - 1) / 1e6
        )
    return max(2 * sum(results), 4 * max(results))


# ---------------------------------------------------------------- doing it


def measure(study: Study, model_name: str, stage: str = ALL_STAGES, progress: bool = True) -> None:
    """Makes everything that a run measures of a model, or one stage of it, unless it is there already.

    What cannot be measured of this model is said and passed over: the notebooks that need it will say so too.

    Raises:
        UserError: no such stage; or as the measurements say: the others are made all the same.
    """
    every = list(study.tasks(model_name))
    stages = sorted({stage_of(task) for task in with_needs(every)})
    if stage not in (ALL_STAGES, *map(str, stages)):
        raise UserError(
            f"{model_name}: has no stage {stage!r}; its stages are {', '.join(map(str, stages))} and "
            f"{ALL_STAGES}"
        )
    tasks = [task for task in with_needs(every) if stage in (ALL_STAGES, str(stage_of(task)))]
    passed_over = make(study, model_name, tasks, progress)
    stores = [task.path for task in with_needs(tasks) if task.path.is_dir()]
    made = [place for store in stores for place in (store, manifest_of(store))]
    say_done(
        mark(study.out_dir, "measured", f"{model_slug(model_name)}-{stage}"),
        made,
        study.out_dir,
        key=_key_of(every),
        not_measured=passed_over,
    )


def make(study: Study, model_name: str, tasks: Sequence[Task], progress: bool = True) -> list[str]:
    """Makes what is missing of a model, which is loaded only then; returns and says what cannot be measured.

    Raises:
        UserError: as the measurements say: the others are made all the same.
    """
    done = {task.path: task for task in with_needs(tasks) if task.is_done()}
    for task in done.values():
        shutil.rmtree(task.shard_folder, ignore_errors=True)  # a run killed just before it would have
    missing = [task for task in tasks if task.path not in done]
    models = study.load(model_name) if missing else []
    failed: list[str] = []
    passed_over: list[str] = []
    for task in missing:
        try:
            task.merge(models, progress)
        except NotMeasurable as error:
            passed_over.append(f"{task.label}: {error}")
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError("; ".join(dict.fromkeys(failed)))
    for line in passed_over:
        print(line, flush=True)
    return passed_over


def compute_units(study: Study, model_name: str, units: Sequence[str], job: str) -> None:
    """Computes shards, given as ``label:shard`` (see :func:`plan`), unless they are there.

    Raises:
        UserError: no such measurement or shard, a job that is no name of a file, or as the measurements say.
    """
    if not re.fullmatch("[0-9A-Za-z_-]{1,100}", job):
        raise UserError(f"{job!r}: no name for a job; give up to 100 ASCII letters, digits, _ and -")
    tasks = {task.label: task for task in with_needs(list(study.tasks(model_name)))}
    chosen: dict[str, list[int]] = {}
    for label, shard in _parsed(units):
        if label not in tasks:
            raise UserError(
                f"{model_name}: nothing called {label} is measured; there are {', '.join(sorted(tasks))}"
            )
        chosen.setdefault(label, []).append(shard)
    models: list = []
    for label, shards in chosen.items():
        if tasks[label].is_done():
            continue
        models = models or study.load(model_name)
        try:
            tasks[label].compute(models, shards)
        except NotMeasurable as error:
            print(f"{label}: {error}", flush=True)
    say_done(mark(study.out_dir, "shards", model_slug(model_name), job), [], study.out_dir, units=list(units))


def _parsed(units: Sequence[str]) -> Iterator[tuple[str, int]]:
    for unit in units:
        label, _, shard = unit.rpartition(":")
        if not (label and re.fullmatch("[0-9]{1,9}", shard)):
            raise UserError(f"{unit}: not a shard; give label:number, as 'selfrepair plan' does")
        yield label, int(shard)
