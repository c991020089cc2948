"""Error of every precision against float64: self-repair and its parts, of trained models on held-out prose.

See ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from unittest import mock

import numpy as np
import torch
from alternatives import plain_logit_change
from command_line import Parser, even, positive, run
from jaxtyping import Float
from report import head_of_section, table, write_section
from torch import Tensor, nn

from selfrepair.analysis.head_table import select_each_top
from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.fast import fast_path, low_rank
from selfrepair.engine.head_ablation import ablate_heads
from selfrepair.engine.sites import HEADS
from selfrepair.errors import UserError
from selfrepair.models.devices import resolve_device, set_precision
from selfrepair.models.loading import Model, load_model, name_parts
from selfrepair.text.corpora import load_tokens

FRACTION = 0.02  # of tokens, by direct effect, in a head's means
QUANTITIES = (
    "self_repair",
    "self_repair_layernorm",
    "self_repair_heads",
    "self_repair_mlps",
    "direct_effect",
    "logit_change",
)
EXACT = 1e-9  # logits; what float64 must keep
LOW_RANK = "float32, low-rank first maps"
ROUNDED = "float64, weights rounded to bfloat16"
PRECISIONS = ("float32", LOW_RANK, "tf32", "bfloat16", "float16", ROUNDED)

Values = dict[str, Float[np.ndarray, "layer head prompt position"]]


def measure(model: Model, tokens: Tensor) -> Values:
    """The quantities, in logits, under resample ablation of every head, by the fast path."""
    with fast_path(model, on=True) as fast:
        found = ablate_heads(fast, tokens, find_ablation("resample").prepare(fast, [], HEADS))
    values = {name: value.double().cpu().numpy() for name, value in vars(found).items()}
    values["self_repair"] = values["logit_change"] - (
        values["ablated_direct_effect"] - values["direct_effect"]
    )
    values["self_repair_layernorm"] = (
        values["self_repair"] - values["self_repair_heads"] - values["self_repair_mlps"]
    )
    return {name: values[name] for name in QUANTITIES}


def measure_in(precision: str, name: str, tokens: Tensor, device: torch.device) -> Values:
    """The same of an embedded model in one of :data:`PRECISIONS`, or in float64.

    Raises:
        UserError: the device does not have it.
    """
    if precision == LOW_RANK:
        if device.type != "cpu":
            raise UserError("used on CPUs only")
        with mock.patch.object(low_rank, "PAYS_ON_CPU_FROM_D_MODEL", 0):
            return measure_in("float32", name, tokens, device)
    if precision == ROUNDED:
        return measure(rounded_to_bfloat16(load_exact(name, device)), tokens)
    dtype = set_precision(precision, device)
    return measure(
        load_exact(name, device) if dtype == torch.float64 else load_model(name, device, dtype), tokens
    )


def load_exact(name: str, device: torch.device) -> Model:
    """In float64, its RMSNorms too, which Hugging Face computes in float32 whatever the weights are."""
    return _exact_norms(load_model(name, device, set_precision("float64", device)))


def _exact_norms(model: Model) -> Model:
    for module in model.hf.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module)
    return model


def _rms_norm(norm: nn.Module, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    return nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def rounded_to_bfloat16(model: Model) -> Model:
    for weight in model.hf.parameters():
        weight.copy_(weight.to(torch.bfloat16))
    return _exact_norms(name_parts(model.name, model.bridge))  # its value biases are copies


def check_against_full_passes(model: Model, tokens: Tensor, exact: Values) -> float:
    """Largest difference (logits) from full forward passes, of three heads: low, in the middle and high.

    Raises:
        UserError: it is more than rounding.
    """
    heads = [(layer, layer % model.n_heads) for layer in (0, model.n_layers // 2, model.n_layers - 1)]
    differences = [
        plain_logit_change(model, tokens, head).cpu().numpy() - exact["logit_change"][head] for head in heads
    ]
    largest = float(np.abs(differences).max())
    if not largest < EXACT:
        raise UserError(
            f"{model.name}: the engine in float64 differs by {largest:.1e} logits from a full forward pass"
        )
    return largest


def relative_error(
    found: Float[np.ndarray, "head prompt position"], exact: Float[np.ndarray, "head prompt position"]
) -> str:
    """Root mean square and largest error, over the exact root mean square; a dash where that is 0."""
    size = np.sqrt(np.mean(exact**2))
    if size == 0:
        return "–"
    error = (found - exact) / size
    return f"{np.sqrt(np.mean(error**2)):.0e} / {np.abs(error).max():.0e}"


def top_means(values: Values, exact: Values) -> dict[str, Float[np.ndarray, " head"]]:
    """Mean of every head's top tokens, which the exact direct effects choose."""
    chosen = select_each_top(exact["direct_effect"], FRACTION)
    return {
        name: (np.where(chosen, value, 0).sum((2, 3)) / chosen.sum((2, 3))).ravel()
        for name, value in values.items()
    }


def tables(exact: Values, found: dict[str, Values | None]) -> tuple[str, str]:
    """Relative errors by layer, and errors of top means in logits; ``None``: the device does not have it."""
    missing = ("not available on this device", *[""] * (len(QUANTITIES) - 1))
    by_layer: list[tuple[str, ...]] = []
    exact_means = top_means(exact, exact)
    means = [
        (
            "float64: size of the means",
            *(f"{np.sqrt(np.mean(value**2)):.3f}" for value in exact_means.values()),
        )
    ]
    for precision, values in found.items():
        if values is None:
            by_layer.append((precision, *missing))
            means.append((precision, *missing))
            continue
        for layer in range(len(exact["self_repair"])):
            errors = (relative_error(values[name][layer], exact[name][layer]) for name in QUANTITIES)
            by_layer.append((f"{precision}: layer {layer}", *errors))
        errors = [value - exact_means[name] for name, value in top_means(values, exact).items()]
        means.append(
            (
                precision,
                *(f"{np.sqrt(np.mean(error**2)):.0e} / {np.abs(error).max():.0e}" for error in errors),
            )
        )
    header = (
        "root mean square / largest error",
        *(name.replace("self_repair_", "… ") for name in QUANTITIES),
    )
    return table(header, by_layer), table(header, means)


def benchmark(options: argparse.Namespace) -> None:
    """Measures, and writes one section for each model.

    Raises:
        UserError: unknown model, prompts that cannot be had, or float64 that is not exact.
    """
    device = resolve_device(options.device)
    head = head_of_section(device)
    for name in options.models:
        model = load_exact(name, device)
        prompts = load_tokens(model.tokenizer, n_prompts=options.prompts, prompt_len=options.prompt_len)
        tokens = torch.from_numpy(prompts.tokens).to(device)
        exact = measure(model, tokens)
        largest = check_against_full_passes(model, tokens, exact)
        found: dict[str, Values | None] = {}
        for precision in PRECISIONS:
            try:
                found[precision] = measure_in(precision, name, tokens, device)
            except UserError:
                found[precision] = None
        by_layer, means = tables(exact, found)
        text = [
            head,
            f"{name}, {prompts.source}, {options.prompts} prompts × {options.prompt_len} tokens, resample "
            "ablation of every head. In float64 the "
            f"engine's logit changes of three heads equal those of full forward passes to {largest:.0e} "
            "logits.",
            f"Mean over a head's top {FRACTION:.0%} of tokens, error over all heads in logits:",
            means,
            "Error over all heads and tokens of a layer, relative to the root mean square of the quantity "
            "there:",
            by_layer,
        ]
        write_section(options.results, f"Precision: {name}, {device.type}", "\n\n".join(text))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["pocket-gpt2", "pocket-pythia", "pocket-llama"],
        help="embedded models (%(default)s)",
    )
    parser.add_argument(
        "--prompts", type=even, default=32, help="an even number of prompts of the held-out prose (32)"
    )
    parser.add_argument("--prompt-len", type=positive, default=128, help="tokens per prompt (128)")
    return run(parser, arguments, benchmark)


if __name__ == "__main__":
    sys.exit(main())
