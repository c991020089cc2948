"""The stages of a run, each of which any machine can take up: what there is to do, and the small files that say it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selfrepair.models.checkpoints import read_config
from selfrepair.errors import UserError
from selfrepair.store.manifest import hash_files, read_manifest, write_manifest
from selfrepair.paths import HELD_OUT_TEXT, NOTEBOOKS
from selfrepair.run.profiles import Profile
from selfrepair.store.datasets import ENGINE, code_version, is_whole, shard_starts, slug, write_atomically

if TYPE_CHECKING:
    from selfrepair.run.study import Study

#: Megabytes that Python, PyTorch and a batch's activations take beside the weights.
BESIDE_WEIGHTS_MB = 2500
#: Of a sweep for each head and token: six variables in float32.
BYTES_PER_EFFECT = 24
BYTES = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


def plan(profile: Profile) -> dict[str, object]:
    """What a run of ``profile`` is made of, as JSON: per model the first pairs of its shards and what a job needs.

    ``code`` changes with the code that makes the numbers, a model's with the engine: what was made by other code is made again.

    Raises:
        UserError: a model that cannot be found or reached.
    """
    models: dict[str, object] = {}
    results: list[float] = []
    for name in profile.models:
        own = profile.of_model(name)
        config = read_config(name)
        layers, heads, width, vocabulary = (_first_of(config, *names) for names in _SIZES)
        results.append(BYTES_PER_EFFECT * layers * heads * own.n_prompts * (own.prompt_len - 1) / 1e6)
        weights = (12 * layers * width**2 + 2 * vocabulary * width) * BYTES[own.dtype] / 1e6
        models[name] = {
            "settings": {"n_prompts": own.n_prompts, "prompt_len": own.prompt_len, "dtype": own.dtype, "dataset": own.dataset},
            "first_pairs": list(shard_starts(own.n_prompts)),
            "mem_mb": round(2 * weights + BESIDE_WEIGHTS_MB),  # on a CPU, weights are kept in a second layout too
            "code": code_version(*ENGINE),
        }
    in_memory = max(2 * sum(results), 4 * max(results))  # of every model with what is made of it, or of one that is split into parts
    notebooks = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    return {
        "models": models,
        "ablations": profile.ablations,
        "fraction": profile.fraction,
        "notebooks": [path.stem for path in notebooks],
        "code": code_version(*sorted(file.name for file in Path(__file__).parent.glob("*.*"))),
        "notebook_code": {path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in notebooks},
        "notebook_mem_mb": round(max(model["mem_mb"] for model in models.values()) + BESIDE_WEIGHTS_MB + in_memory),
    }


#: Names under which configurations give the numbers of layers and heads, d_model and the size of the vocabulary.
_SIZES = (
    ("num_hidden_layers", "n_layer", "num_layers"),
    ("num_attention_heads", "n_head", "num_heads"),
    ("hidden_size", "n_embd", "d_model"),
    ("vocab_size",),
)


def _first_of(config: dict[str, object], *names: str) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def draw_tokens(study: Study, model: str) -> Path:
    """Loads a model and draws the prompts it is measured on; returns their file."""
    study.load(model)
    return study.tokens_file(model)


def compute_shards(study: Study, model: str, ablation: str, first_pairs: Sequence[int]) -> None:
    """Computes the shards of one sweep that begin with these pairs, unless they or the sweep are there already.

    Raises:
        UserError: no shard begins with a pair, or as :func:`selfrepair.measure.heads.sweep`.
    """
    work = study.planned_sweep(model, ablation)
    unknown = sorted(set(first_pairs) - set(work.starts))
    if unknown:
        raise UserError(f"no shard of {model} begins with pair {unknown[0]}; they begin with {', '.join(map(str, work.starts))}")
    if not is_whole(work.path):
        work.compute(first_pairs)
    for first in first_pairs:
        _say_done(study.out_dir / "shards" / slug(model) / ablation / f"{first}.done", store=work.path.name, first_pair=first)


def merge_shards(study: Study, model: str, ablation: str) -> Path:
    """The store of one sweep, from its shards and whatever of them is missing; returns its path."""
    store = study.stored_sweep(model, ablation, progress=True)
    _say_done(study.out_dir / "sweeps" / f"{slug(model)}-{ablation}.done", store=store.name)
    return store


def summarise(study: Study, profile: str) -> str:
    """Writes the manifest of a finished run and its page ``index.html``; returns what to print: the comparison and the page's path.

    Raises:
        UserError: the run left nothing to show, or is of other models than the released numbers of their names.
    """
    from selfrepair.analysis.comparison import report
    from selfrepair.text.corpora import hash_documents, read_documents
    from selfrepair.run.page import write_summary

    out = study.out_dir
    if not any((out / "figures").glob("*.png")):
        raise UserError(f"{out}: holds no figures; run 'selfrepair notebooks' into it first")
    said = report(study.profile, out)
    sweeps = _sweeps_of(study)
    write_manifest(
        out / "manifest.json",
        sum(note["seconds"] for note in sweeps.values()),
        profile=profile,
        settings=dataclasses.asdict(study.profile),
        seed=study.seed,
        held_out_text_sha256=hash_documents(read_documents(HELD_OUT_TEXT)),
        sweeps=sweeps,
        files=hash_files(out),
    )
    return f"{said}\n{write_summary(out)}"


def _sweeps_of(study: Study) -> dict[str, dict[str, object]]:
    """Of each sweep of a run, by model and ablation: its store, and what its manifest says; of several, the last."""
    found: dict[str, dict[str, object]] = {}
    for path in (study.out_dir / "sweeps").glob("*.manifest.json"):
        note = read_manifest(path)
        if not {"source", *_OF_A_SWEEP} <= note.keys():
            raise UserError(f"{path}: not the manifest of a sweep; delete it and the store beside it, and run again")
        if note["source"] not in study.profile.models or note["ablation"] not in study.profile.ablations:
            continue
        own = study.profile.of_model(note["source"])
        made_from = (own.n_prompts, own.prompt_len, own.dtype, study.seed, code_version(*ENGINE))
        name = f"{note['model']} {note['ablation']}"
        last = found.get(name, {}).get("finished", "")
        if tuple(note[key] for key in _SETTINGS) == made_from and note["finished"] > last:
            found[name] = {"store": path.name.replace(".manifest.json", ".zarr"), **{key: note[key] for key in _OF_A_SWEEP}}
    return dict(sorted(found.items()))


#: What a sweep must have been made with to be one of a run.
_SETTINGS = ("n_prompts", "prompt_len", "dtype", "seed", "code")
#: What a run's manifest repeats of its sweeps' own.
_OF_A_SWEEP = ("model", "ablation", *_SETTINGS, "weights_sha256", "corpus", "tokens_sha256", "seconds", "finished")


def _say_done(path: Path, **what: object) -> None:
    write_atomically(path, (json.dumps(what) + "\n").encode())
