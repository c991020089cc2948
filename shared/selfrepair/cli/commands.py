"""What each command does; torch and transformers wait until needed: bad arguments answer at once."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrepair.errors import UserError
from selfrepair.models.checkpoints import find_model, training_metrics, whole_name
from selfrepair.run.profiles import check_models, load_profile, whole_profile
from selfrepair.store.disk_full import disk_full_is_said
from selfrepair.training.folders import check_replaceable, check_working_folder, training_folders

if TYPE_CHECKING:
    from selfrepair.run.study import Study


def _study(options: argparse.Namespace) -> Study:
    """The run that a stage belongs to. What is wrong with its arguments is said before seconds of imports."""
    if options.seed < 0:
        raise UserError(f"seed must not be negative, not {options.seed}")
    profile = load_profile(options.profile)
    if "model" in options:
        options.model = whole_name(options.model)
        if options.model not in profile.models:
            raise UserError(
                f"{options.model}: not a model of {options.profile}; it has {', '.join(profile.models)}"
            )
        check_models(profile, [options.model])
    elif options.run == "plan":
        check_models(profile, profile.models)
    from selfrepair.run.study import Study

    folder = profile.run_folder if options.out is None else options.out
    return Study.of(options.profile, seed=options.seed, device=options.device, out_dir=folder)


def plan(options: argparse.Namespace) -> None:
    import json

    from selfrepair.run.marks import forget_stale
    from selfrepair.run.workflow import plan

    study = _study(options)
    planned = plan(study)
    forget_stale(study.out_dir, planned)
    print(json.dumps(planned, indent=1))


def measure(options: argparse.Namespace) -> None:
    from selfrepair.run import workflow

    study = _study(options)
    with disk_full_is_said(study.out_dir):
        if options.units:
            workflow.compute_units(study, options.model, options.units, options.job)
        else:
            workflow.measure(study, options.model, options.stage)


def notebook(options: argparse.Namespace) -> None:
    from selfrepair.run.notebooks import notebook_keys, run_notebook_of

    study = _study(options)
    key = options.key
    if key is None:  # the workflow has found it; that takes seconds
        keys = {stem[:2]: key for stem, key in notebook_keys(study).items()}
        key = keys.get(options.number, "")
    with disk_full_is_said(study.out_dir):
        run_notebook_of(study, options.profile, options.number, key)


def summary(options: argparse.Namespace) -> None:
    from selfrepair.run.record import summarise
    from selfrepair.run.workflow import plan

    study = _study(options)
    planned = plan(study)
    with disk_full_is_said(study.out_dir):
        print(summarise(study, planned["notebooks"], options.key or planned["page"]))


def update(options: argparse.Namespace) -> None:
    from selfrepair.run.committed import update_committed
    from selfrepair.run.record import summarise
    from selfrepair.run.study import Study
    from selfrepair.run.workflow import plan

    study = Study.of("pocket", out_dir=load_profile("pocket").run_folder)
    planned = plan(study)
    update_committed(study, lambda: summarise(study, planned["notebooks"], planned["page"]))


def train(options: argparse.Namespace) -> None:
    out, work = training_folders(options.out)
    if out.exists() or out.is_symlink():
        if not options.overwrite:
            raise UserError(f"{options.out}: exists already; choose another --out or give --overwrite")
        check_replaceable(out)
    check_working_folder(work)
    from transformers.utils import logging

    from selfrepair.models.devices import resolve_device
    from selfrepair.paths import cache_dir
    from selfrepair.training.card import finish
    from selfrepair.training.config import load_config
    from selfrepair.training.data import prepare
    from selfrepair.training.loop import train

    logging.disable_progress_bar()
    config = load_config(options.config)
    device = resolve_device(options.device)
    with disk_full_is_said(work, cache_dir()):
        if out.exists():
            print(f"{config.name}: replaces {out} when it is done", file=sys.stderr)
        print(f"{config.name}: reading {options.text} (tokenized once, then cached)", file=sys.stderr)
        data = prepare(config, options.text)
        model = train(config, data, work, device)
        print(f"{config.name}: measuring", file=sys.stderr)
        metrics = finish(model, config, data, work, options.text, out)
    print(
        f"held-out prose {metrics['loss_held_out_prose']:.3f} nats/token (trigram "
        f"{metrics['trigram_loss_held_out_prose']:.3f}), "
        f"facts {metrics['fact_recall_held_out_phrasings']:.0%}",
        file=sys.stderr,
    )
    print(options.out)


def arms(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    from selfrepair.paths import cache_dir
    from selfrepair.run.arms import run_arms

    logging.disable_progress_bar()
    with disk_full_is_said(options.out, options.file.parent, cache_dir()):
        table = run_arms(options.file, options.text, options.out, options.device)
    if table is not None:
        print(table)


def evaluate(options: argparse.Namespace) -> None:
    kept = training_metrics(Path(find_model(options.model)))  # the n-gram models' losses among them
    from transformers.utils import logging

    from selfrepair.models.devices import resolve_device
    from selfrepair.models.loading import load_hf
    from selfrepair.training.card import render_table
    from selfrepair.training.evaluate import evaluate

    logging.disable_progress_bar()
    model, tokenizer = load_hf(options.model, resolve_device(options.device))
    seed = kept["config"]["gazetteer_seed"] if kept else 0
    print(render_table({options.model: kept | evaluate(model, tokenizer, seed)}))


def sweep(options: argparse.Namespace) -> None:
    if options.seed < 0:
        raise UserError(f"seed must not be negative, not {options.seed}")
    if options.tokens is not None and options.prompt_len is not None:
        raise UserError("--prompt-len is not for --tokens, whose rows are taken as long as they are")
    options.model = whole_name(options.model)
    find_model(options.model)  # what is wrong with the name is said before seconds of imports
    import torch
    from transformers.utils import logging

    from selfrepair.engine.ablations import find_ablation
    from selfrepair.engine.identity_check import check_tokens
    from selfrepair.engine.optimal import N_PROMPTS
    from selfrepair.measure.task import Task
    from selfrepair.models.devices import all_devices, set_precision
    from selfrepair.models.loading import load_model
    from selfrepair.text.corpora import load_tokens, remarks_on_pairs

    logging.disable_progress_bar()
    devices = all_devices(options.device)
    dtype = set_precision(options.dtype, devices[0])
    models = [load_model(options.model, device, dtype) for device in devices]
    source = {
        "text": None if options.text is None else str(options.text.resolve()),
        "dataset": options.dataset,
        "tokens": None if options.tokens is None else str(options.tokens.resolve()),
        "seed": options.seed,
    }
    prompt_len = 128 if options.prompt_len is None else options.prompt_len
    amount = {"n_prompts": options.n_prompts, "prompt_len": prompt_len}
    kind = find_ablation(options.ablation)
    n_unseen = N_PROMPTS if kind.fits_unseen else 0
    drawn = load_tokens(models[0].tokenizer, **source, **amount, n_unseen=n_unseen)
    prompts = torch.from_numpy(drawn.tokens)
    check_tokens(models[0], prompts, drawn.source)  # what is wrong is said before anything is written
    for line in remarks_on_pairs(drawn, options.ablation, kind.has_donors):
        print(line, file=sys.stderr)
    amount = {"n_prompts": len(prompts), "prompt_len": prompts.shape[1]}
    wanted = {**source, **amount, "dtype": options.dtype, "ablation": options.ablation}
    with disk_full_is_said(options.out):
        print(Task("heads", options.model, wanted, options.out).merge(models, progress=True))


def heads(options: argparse.Namespace) -> None:
    import pandas as pd

    from selfrepair.analysis.head_table import heads_table
    from selfrepair.statistics import check_fraction
    from selfrepair.store.files import write_atomically
    from selfrepair.store.stores import open_store

    tables = []
    for path in options.stores:
        store = open_store(path)
        if "self_repair_heads" not in store:
            raise UserError(f"{path}: no sweep of heads; give a store that 'selfrepair sweep' wrote")
        check_fraction(options.fraction, store.sizes["prompt"] * store.sizes["position"])
        tables.append(heads_table(store, options.fraction))
        if len(options.stores) > 1:  # of one model perhaps, on other prompts
            tables[-1].insert(0, "store", str(path))
    table = pd.concat(tables).to_csv(index=False, float_format="%.6g")
    if options.csv is None:
        print(table, end="")
    else:
        with disk_full_is_said(options.csv.parent):
            write_atomically(options.csv, table.encode())


def verify(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    from selfrepair.run.verify import verify

    logging.disable_progress_bar()
    findings = []
    for finding in verify(options.results, options.device):
        findings.append(finding)
        print(finding, flush=True)
    differing = sum(finding.agrees is False for finding in findings)
    if differing:
        raise UserError(
            f"{options.results}: {differing} of {len(findings)} checks differ; what differs is named above"
        )
    print("all that was checked agrees")


def notebooks(options: argparse.Namespace) -> None:
    if options.jobs < 1:
        raise UserError(f"jobs must be at least 1, not {options.jobs}")
    parameters: dict[str, Any] = {"profile": whole_profile(options.profile)}
    parameters |= {} if options.model is None else {"model": whole_name(options.model)}
    parameters |= {} if options.out is None else {"out_dir": os.path.abspath(options.out)}
    profile = load_profile(options.profile)
    check_models(profile, profile.models if options.model is None else [parameters["model"]])
    from selfrepair.analysis.comparison import report
    from selfrepair.run.marks import belongs_to_a_run
    from selfrepair.run.notebooks import run_notebooks
    from selfrepair.run.study import Study
    from selfrepair.run.workflow import make

    study = Study.of(**parameters)
    out, profile = study.out_dir, study.profile
    if belongs_to_a_run(out):
        raise UserError(f"{out}: belongs to a run of the workflow; give another --out")
    with disk_full_is_said(out):
        if not options.only:  # what notebooks read, made once, with all cores
            for model_name in profile.models:
                make(study, model_name, list(study.tasks(model_name)))
        run_notebooks(out, parameters, options.jobs, options.only)
        if not options.only:
            print(report(out, profile.ablations, profile.fraction, profile.amount, profile.dataset))
    print(out)
