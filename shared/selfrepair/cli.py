"""The ``selfrepair`` command. Every failure that a user can act on is one line and a non-zero exit."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from selfrepair import __version__
from selfrepair.models.checkpoints import find_model, training_metrics
from selfrepair.choices import PRECISIONS
from selfrepair.engine.ablations import ABLATIONS
from selfrepair.errors import UserError
from selfrepair.run.profiles import load_profile

if TYPE_CHECKING:
    from selfrepair.run.study import Study

# Imports of torch and transformers wait until a command needs them: --help and bad arguments answer at once.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)} (see {self.prog} --help)\n")


#: Longest message that is shown whole, and how much of both ends of a longer one.
LONGEST, ENDS = 2000, 500


def _one_line(message: object) -> str:
    """The message with escapes for line breaks and whatever else cannot be printed, and without the middle if it is very long."""
    text = str(message)
    text = text if len(text) <= LONGEST else f"{text[:ENDS]} … {text[-ENDS:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    if not _is_unicode("".join(arguments)):
        parser.error("an argument is no UTF-8 text; rename the file that it names")
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"selfrepair: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("selfrepair: interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        path = error.filename2 or error.filename
        if path is None:  # not about a file that was given, or that was to be written
            raise
        print(f"selfrepair: error: {_one_line(os.fsdecode(path))}: cannot be read or written ({error.strerror})", file=sys.stderr)
        return 1
    return 0


def _is_unicode(text: str) -> bool:
    """False if it holds bytes that were no UTF-8, which Python keeps as lone surrogates and no file format does."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="selfrepair", description="Measure self-repair in language models.")
    parser.add_argument("--version", action="version", version=f"selfrepair {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    train = commands.add_parser("train", help="train a pocket model", description="Train a pocket model; resumes if it was interrupted.")
    train.add_argument("config", type=Path, help="YAML configuration, as in shared/models/configs/")
    train.add_argument("--text", type=Path, required=True, help="folder of .txt or .txt.gz files to train on")
    train.add_argument("--out", type=Path, required=True, help="model folder to write")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    train.add_argument("--overwrite", action="store_true", help="replace the model folder if it exists")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="loss, recall of planted facts and induction of a model")
    evaluate.add_argument("model", help="embedded name, local folder or hub id")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    evaluate.set_defaults(run=_evaluate)

    sweep = commands.add_parser("sweep", help="ablate every head of a model; prints the store's path last")
    sweep.add_argument("--model", required=True, help="embedded name, local folder or hub id")
    sweep.add_argument("--tokens", type=Path, help=".npy of token ids [n_prompts, prompt_len]")
    sweep.add_argument("--text", type=Path, help="text file or folder of .txt/.txt.gz (default: the held-out prose)")
    sweep.add_argument("--dataset", help="dataset id on the Hugging Face hub, or 'pile' for its Pile sample")
    sweep.add_argument("--n-prompts", type=int, help="even number of prompts (default: all)")
    sweep.add_argument("--prompt-len", type=int, help="tokens per prompt, BOS included (default 128; not with --tokens)")
    sweep.add_argument("--ablation", default="resample", choices=ABLATIONS)
    sweep.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    sweep.add_argument(
        "--dtype", default="float32", choices=PRECISIONS, help="of the weights; tf32: float32 weights, TF32 products (default float32)"
    )
    sweep.add_argument("--compile", action="store_true", help="compile the norms (torch.compile; pays for RMSNorm on long runs)")
    sweep.add_argument("--seed", type=int, default=0, help="which prompts are taken, in which order (default 0)")
    sweep.add_argument("--out", type=Path, required=True, help="folder for the store")
    sweep.set_defaults(run=_sweep)

    heads = commands.add_parser("heads", help="table of a store's heads")
    heads.add_argument("store", type=Path)
    heads.add_argument("--fraction", type=float, default=0.02, help="top fraction of tokens by direct effect (default 0.02)")
    heads.add_argument("--csv", type=Path, help="write the table here instead of printing it")
    heads.set_defaults(run=_heads)

    verify = commands.add_parser("verify", help="check a results folder: files, checksums, and a hundredth of the shards computed again")
    verify.add_argument("results", type=Path)
    verify.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    verify.set_defaults(run=_verify)

    notebooks = commands.add_parser("notebooks", help="run the notebooks of a profile into a results folder")
    notebooks.add_argument("--profile", default="pocket", help="name of a profile or path of a .yaml file (default pocket)")
    notebooks.add_argument("--only", nargs="+", default=[], metavar="NN", help="numbers or beginnings of names (default: all)")
    notebooks.add_argument("--model", help="measure this model instead of the profile's")
    notebooks.add_argument("--out", type=Path, help="results folder (default: results/<profile>)")
    notebooks.add_argument("--jobs", type=int, default=1, help="notebooks run side by side (default 1)")
    notebooks.set_defaults(run=_notebooks)
    _add_stages(commands)
    update = commands.add_parser("update", help="refresh the committed notebooks, figures and README from a run of the pocket profile")
    update.set_defaults(run=_update)
    return parser


def _add_stages(commands: argparse._SubParsersAction) -> None:
    """The commands that the workflow (Snakefile) is made of."""
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument("--profile", default="pocket", help="name of a profile or path of a .yaml file (default pocket)")
    run.add_argument("--out", type=Path, help="results folder (default: results/<profile>)")
    run.add_argument("--seed", type=int, default=0, help="which prompts are taken, in which order (default 0)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--model", required=True, help="a model of the profile")
    kind = argparse.ArgumentParser(add_help=False)
    kind.add_argument("--ablation", required=True, choices=ABLATIONS)
    stages = {
        "plan": (_plan, [run], "what a run of a profile is made of, as JSON"),
        "tokens": (_tokens, [run, one], "draw the prompts of one model"),
        "shard": (_shard, [run, one, kind], "compute some shards of one sweep"),
        "merge": (_merge, [run, one, kind], "make one sweep's store from its shards; missing ones are computed"),
        "summary": (_summary, [run], "compare a finished run with the released numbers; write its manifest and page"),
    }
    for name, (stage, parents, says) in stages.items():
        command = commands.add_parser(name, parents=parents, help=f"{says} (a stage of the workflow)")
        command.set_defaults(run=stage)
        if name == "shard":
            command.add_argument("--first", type=int, nargs="+", required=True, metavar="PAIR", help="first pairs of the shards (see plan)")


def _study(options: argparse.Namespace) -> Study:
    """The run that a stage belongs to. What is wrong with its arguments is said before seconds of imports."""
    if options.seed < 0:
        raise UserError(f"seed must not be negative, not {options.seed}")
    profile = load_profile(options.profile)
    if "model" in options:
        if options.model not in profile.models:
            raise UserError(f"{options.model}: not a model of {options.profile}; it has {', '.join(profile.models)}")
        find_model(options.model)
    if "ablation" in options and options.ablation not in profile.ablations:
        raise UserError(f"{options.ablation}: not an ablation of {options.profile}; it has {', '.join(profile.ablations)}")
    from selfrepair.run.study import Study

    return Study.of(options.profile, seed=options.seed, device=options.device, out_dir=options.out)


def _plan(options: argparse.Namespace) -> None:
    import json

    from selfrepair.run.workflow import plan

    print(json.dumps(plan(load_profile(options.profile)), indent=1))


def _tokens(options: argparse.Namespace) -> None:
    from selfrepair.store.disk_full import disk_full_is_said
    from selfrepair.run.workflow import draw_tokens

    study = _study(options)
    with disk_full_is_said(study.out_dir):
        print(draw_tokens(study, options.model))


def _shard(options: argparse.Namespace) -> None:
    from selfrepair.store.disk_full import disk_full_is_said
    from selfrepair.run.workflow import compute_shards

    study = _study(options)
    with disk_full_is_said(study.out_dir):
        compute_shards(study, options.model, options.ablation, options.first)


def _merge(options: argparse.Namespace) -> None:
    from selfrepair.store.disk_full import disk_full_is_said
    from selfrepair.run.workflow import merge_shards

    study = _study(options)
    with disk_full_is_said(study.out_dir):
        print(merge_shards(study, options.model, options.ablation))


def _update(options: argparse.Namespace) -> None:
    from selfrepair.run.study import Study
    from selfrepair.run.committed import update_committed

    study = Study.of("pocket")
    if not (study.out_dir / "index.html").is_file():
        raise UserError(f"{study.out_dir}: holds no finished run; ./run_all.sh --update makes one first")
    update_committed(study, "pocket")


def _summary(options: argparse.Namespace) -> None:
    from selfrepair.store.disk_full import disk_full_is_said
    from selfrepair.run.workflow import summarise

    study = _study(options)
    with disk_full_is_said(study.out_dir):
        print(summarise(study, str(options.profile)))


def _train(options: argparse.Namespace) -> None:
    if options.out.exists() and not options.overwrite:
        raise UserError(f"{options.out}: exists already; choose another --out or give --overwrite")
    from transformers.utils import logging

    from selfrepair.models.devices import resolve_device
    from selfrepair.store.disk_full import disk_full_is_said
    from selfrepair.paths import cache_dir
    from selfrepair.training.card import finish
    from selfrepair.training.config import load_config
    from selfrepair.training.data import prepare
    from selfrepair.training.loop import train

    logging.disable_progress_bar()
    config = load_config(options.config)
    device = resolve_device(options.device)
    work = options.out.with_name(options.out.name + ".training")
    with disk_full_is_said(work, cache_dir()):
        print(f"{config.name}: reading {options.text} (tokenized once, then cached)", file=sys.stderr)
        data = prepare(config, options.text)
        model = train(config, data, work, device)
        print(f"{config.name}: measuring", file=sys.stderr)
        metrics = finish(model, config, data, work, options.text, options.out)
    print(
        f"held-out prose {metrics['loss_held_out_prose']:.3f} nats/token (trigram {metrics['trigram_loss_held_out_prose']:.3f}), "
        f"facts {metrics['fact_recall_held_out_phrasings']:.0%}",
        file=sys.stderr,
    )
    print(options.out)


def _evaluate(options: argparse.Namespace) -> None:
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


def _sweep(options: argparse.Namespace) -> None:
    if options.seed < 0:
        raise UserError(f"seed must not be negative, not {options.seed}")
    if options.tokens is not None and options.prompt_len is not None:
        raise UserError("--prompt-len is not for --tokens, whose rows are taken as long as they are")
    find_model(options.model)  # what is wrong with the name is said before seconds of imports
    from transformers.utils import logging

    from selfrepair.text.corpora import load_tokens
    from selfrepair.models.devices import all_devices, set_precision
    from selfrepair.store.disk_full import disk_full_is_said
    from selfrepair.engine.fast.linear_maps import compile_norms
    from selfrepair.models.loading import load_model
    from selfrepair.measure.heads import sweep

    logging.disable_progress_bar()
    device, *more_devices = all_devices(options.device)
    model = load_model(options.model, device, set_precision(options.dtype, device))
    if options.compile:
        compile_norms(model.hf)
    prompts = load_tokens(
        model.tokenizer,
        text=options.text,
        dataset=options.dataset,
        tokens=options.tokens,
        n_prompts=options.n_prompts,
        prompt_len=128 if options.prompt_len is None else options.prompt_len,
        seed=options.seed,
    )
    with disk_full_is_said(options.out):
        print(sweep(model, prompts, options.ablation, options.out, options.seed, more_devices=more_devices))


def _heads(options: argparse.Namespace) -> None:
    from selfrepair.analysis.head_table import heads_table
    from selfrepair.store.disk_full import disk_full_is_said
    from selfrepair.store.datasets import open_store, write_atomically

    store = open_store(options.store)
    if "self_repair_heads" not in store:
        raise UserError(f"{options.store}: no sweep of heads; give a store that 'selfrepair sweep' wrote")
    table = heads_table(store, options.fraction).to_csv(index=False, float_format="%.6g")
    if options.csv is None:
        print(table, end="")
    else:
        with disk_full_is_said(options.csv.parent):
            write_atomically(options.csv, table.encode())


def _verify(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    from selfrepair.run.verify import verify

    logging.disable_progress_bar()
    findings = []
    for finding in verify(options.results, options.device):
        findings.append(finding)
        print(finding, flush=True)
    differing = sum(finding.agrees is False for finding in findings)
    if differing:
        raise UserError(f"{options.results}: {differing} of {len(findings)} checks differ; what differs is named above")
    print("all that was checked agrees")


def _notebooks(options: argparse.Namespace) -> None:
    if options.jobs < 1:
        raise UserError(f"jobs must be at least 1, not {options.jobs}")
    for model in load_profile(options.profile).models if options.model is None else [options.model]:
        find_model(model)
    from selfrepair.analysis.comparison import report
    from selfrepair.store.disk_full import disk_full_is_said
    from selfrepair.run.notebooks import run_notebooks
    from selfrepair.run.study import Study

    study = Study.of(options.profile, options.model, out_dir=options.out)
    out = study.out_dir
    parameters = {} if options.model is None else {"model": options.model}
    with disk_full_is_said(out):
        if not options.only:  # what most notebooks read, made once, with all cores
            for model, ablation in itertools.product(study.profile.models, study.profile.ablations):
                study.sweep(model, ablation, progress=True)
        run_notebooks(options.profile, out, parameters, options.jobs, options.only)
        if not options.only:
            print(report(study.profile, out))
    print(out)


if __name__ == "__main__":
    sys.exit(main())
