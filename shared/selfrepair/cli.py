"""The ``selfrepair`` command. Every failure that a user can act on is one line and a non-zero exit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from selfrepair import __version__
from selfrepair.errors import UserError

# Imports of torch and transformers wait until a command needs them: --help and bad arguments answer at once.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"selfrepair: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("selfrepair: interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    return 0


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
    return parser


def _train(options: argparse.Namespace) -> None:
    if options.out.exists() and not options.overwrite:
        raise UserError(f"{options.out}: exists already; choose another --out or give --overwrite")
    from transformers.utils import logging

    from selfrepair.devices import resolve_device
    from selfrepair.disk import disk_full_is_said
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
    import json

    from transformers.utils import logging

    from selfrepair.devices import resolve_device
    from selfrepair.models import find_model, load_hf
    from selfrepair.training.card import render_table
    from selfrepair.training.evaluate import evaluate

    logging.disable_progress_bar()
    model, tokenizer = load_hf(options.model, resolve_device(options.device))
    card = Path(find_model(options.model)) / "metrics.json"  # what training measured, the n-gram models' losses among it
    kept = json.loads(card.read_text()) if card.is_file() else {}
    seed = kept["config"]["gazetteer_seed"] if kept else 0
    print(render_table({options.model: kept | evaluate(model, tokenizer, seed)}))


if __name__ == "__main__":
    sys.exit(main())
