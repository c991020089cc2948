"""What the ``selfrepair`` command takes: its commands and their arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from selfrepair import __version__
from selfrepair.choices import PRECISIONS
from selfrepair.engine.ablations import ABLATIONS


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


#: Longest message that is shown whole, and how much of both ends of a longer one.
LONGEST, ENDS = 2000, 500


def one_line(message: object) -> str:
    """The message, what cannot be printed escaped, without its middle if it is very long."""
    text = str(message)
    text = text if len(text) <= LONGEST else f"{text[:ENDS]} … {text[-ENDS:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _name(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("is empty")
    return value


def _path(value: str) -> Path:
    """An empty one would be the working directory."""
    return Path(_name(value))


def command_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="selfrepair", description="Measure self-repair in language models.")
    parser.set_defaults(is_stage=False)
    parser.add_argument("--version", action="version", version=f"selfrepair {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    train = parsers.add_parser(
        "train",
        help="train a pocket model",
        description="Train a pocket model; resumes if it was interrupted.",
    )
    train.add_argument("config", type=_path, help="YAML configuration, as in shared/models/configs/")
    train.add_argument(
        "--text", type=_path, required=True, help="folder of .txt or .txt.gz files to train on"
    )
    train.add_argument("--out", type=_path, required=True, help="model folder to write")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    train.add_argument("--overwrite", action="store_true", help="replace the model folder if it exists")
    train.set_defaults(run="train")

    arms = parsers.add_parser(
        "arms",
        help="train and measure the models that notebook 08 compares, and write their table",
        description="Train and measure models that differ in dropout and seed; resumes if it was "
        "interrupted. Started several times, the commands share the work.",
    )
    arms.add_argument("file", type=_path, help="YAML file of arms, such as shared/models/arms/arms.yaml")
    arms.add_argument("--text", type=_path, help="folder of .txt or .txt.gz files to train on")
    arms.add_argument("--out", type=_path, required=True, help="folder for what is trained and measured")
    arms.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    arms.set_defaults(run="arms")

    evaluate = parsers.add_parser("evaluate", help="loss, recall of planted facts and induction of a model")
    evaluate.add_argument("model", type=_name, help="embedded name, local folder or hub id")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    evaluate.set_defaults(run="evaluate")

    sweep = parsers.add_parser("sweep", help="ablate every head of a model; prints the store's path last")
    sweep.add_argument("--model", type=_name, required=True, help="embedded name, local folder or hub id")
    sweep.add_argument(
        "--tokens",
        type=_path,
        help=".npy of token ids [n_prompts, prompt_len]; rows are taken from the first on, in the file's "
        "order: of n, the donor of row i is row i + n/2",
    )
    sweep.add_argument(
        "--text", type=_path, help="text file or folder of .txt/.txt.gz (default: the held-out prose)"
    )
    sweep.add_argument(
        "--dataset", type=_name, help="dataset id on the Hugging Face hub, or 'pile' for its Pile sample"
    )
    sweep.add_argument("--n-prompts", type=int, help="even number of prompts (default: all)")
    sweep.add_argument(
        "--prompt-len", type=int, help="tokens per prompt, BOS included (default 128; not with --tokens)"
    )
    sweep.add_argument("--ablation", default="resample", choices=ABLATIONS)
    sweep.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    sweep.add_argument(
        "--dtype",
        default="float32",
        choices=PRECISIONS,
        help="of the weights; tf32: float32 weights, TF32 products (default float32)",
    )
    sweep.add_argument(
        "--seed", type=int, default=0, help="which prompts are taken, in which order (default 0)"
    )
    sweep.add_argument("--out", type=_path, required=True, help="folder for the store")
    sweep.set_defaults(run="sweep")

    heads = parsers.add_parser("heads", help="table of a store's heads, or of those of several")
    heads.add_argument(
        "stores", type=_path, nargs="+", metavar="store", help="as 'selfrepair sweep' prints it"
    )
    heads.add_argument(
        "--fraction", type=float, default=0.02, help="top fraction of tokens by direct effect (default 0.02)"
    )
    heads.add_argument("--csv", type=_path, help="write the table here instead of printing it")
    heads.set_defaults(run="heads")

    verify = parsers.add_parser(
        "verify",
        help="check a results folder: files, checksums, and a sample of every measurement computed again",
    )
    verify.add_argument("results", type=_path)
    verify.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    verify.set_defaults(run="verify")

    notebooks = parsers.add_parser("notebooks", help="run the notebooks of a profile into a results folder")
    notebooks.add_argument(
        "--profile",
        type=_name,
        default="pocket",
        help="name of a profile or path of a .yaml file (default pocket)",
    )
    notebooks.add_argument(
        "--only", nargs="+", default=[], metavar="NN", help="numbers or beginnings of names (default: all)"
    )
    notebooks.add_argument("--model", type=_name, help="measure this model instead of the profile's")
    notebooks.add_argument(
        "--out",
        type=_path,
        help="results folder (default: one in results/by-hand/, as for a notebook by hand)",
    )
    notebooks.add_argument("--jobs", type=int, default=1, help="notebooks run side by side (default 1)")
    notebooks.set_defaults(run="notebooks")
    _add_stages(parsers)
    update = parsers.add_parser(
        "update", help="refresh the committed notebooks, figures and README from a run of the pocket profile"
    )
    update.set_defaults(run="update")
    return parser


def _add_stages(parsers: argparse._SubParsersAction) -> None:
    """The commands that the workflow (Snakefile) is made of."""
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument(
        "--profile",
        type=_name,
        default="pocket",
        help="name of a profile or path of a .yaml file (default pocket)",
    )
    run.add_argument("--out", type=_path, help="results folder (default: results/<profile>)")
    run.add_argument(
        "--seed", type=int, default=0, help="which prompts are taken, in which order (default 0)"
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default auto)")
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--model", type=_name, required=True, help="a model of the profile")
    stages = {
        "plan": ([run], "what a run of a profile is made of, as JSON"),
        "measure": ([run, one], "measure a model, or compute some shards of it"),
        "notebook": ([run], "run one notebook"),
        "summary": (
            [run],
            "compare a finished run with the released numbers; write its manifest and page",
        ),
    }
    for name, (parents, says) in stages.items():
        command = parsers.add_parser(name, parents=parents, help=f"{says} (a stage of the workflow)")
        command.set_defaults(run=name, is_stage=True)
        if name == "measure":
            what = command.add_mutually_exclusive_group()
            what.add_argument("--stage", default="all", help="number of a stage of the plan (default all)")
            what.add_argument(
                "--units", nargs="+", metavar="LABEL:SHARD", help="shards, as the plan names them"
            )
            command.add_argument("--job", default="0", help="name of the mark that --units leave (default 0)")
        if name in ("notebook", "summary"):
            command.add_argument("--key", help="the plan's, which the mark repeats (default: today's)")
        if name == "notebook":
            command.add_argument("--number", required=True, metavar="NN", help="number of the notebook")
