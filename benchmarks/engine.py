"""Speed and memory of the ablation engine, against alternatives and the machine's own matrix products.

Random weights of a named shape; time does not depend on their values. See ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from alternatives import Head, Hooked
from command_line import Parser, even, positive, run
from machine import free_memory, in_fresh_process, memory_of, timed
from matmul import Matmul
from operations import needed_flops
from report import head_of_section, table, write_section
from shapes import SHAPES, make_model
from sweeps import heads_task
from torch import Tensor

from selfrepair.choices import PRECISIONS
from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.fast import fast_path
from selfrepair.engine.forward import watching
from selfrepair.engine.head_ablation import HeadAblations, ablate_heads
from selfrepair.engine.sites import HEADS
from selfrepair.errors import UserError
from selfrepair.models.devices import resolve_device, set_precision
from selfrepair.models.loading import Model

#: Largest difference allowed between engine and alternatives, in units of the largest logit change.
TOLERANCES = {"float64": 1e-8, "float32": 1e-4, "tf32": 0.02, "bfloat16": 0.2, "float16": 0.05}
PLAIN, FAST = PATHS = "engine, plain path", "engine, fast path"
LONG_SWEEP = 788  # prompts of 128 tokens: 100,864 tokens


def check(options: argparse.Namespace) -> None:
    """Raises:
    UserError: an option that does not fit the shape.
    """
    shape = SHAPES[options.shape]
    if not 2 <= options.prompt_len <= shape.context_length:
        raise UserError(
            f"--prompt-len {options.prompt_len}: between 2 and {options.shape}'s context of "
            f"{shape.context_length}"
        )
    if options.layer_step > shape.n_layers:
        raise UserError(
            f"--layer-step {options.layer_step}: between 1 and {options.shape}'s {shape.n_layers} layers"
        )
    if options.heads_timed > len(swept_layers(options)):
        raise UserError(
            f"--heads-timed {options.heads_timed}: at most {len(swept_layers(options))}, one in every layer "
            "swept"
        )


def set_up(options: argparse.Namespace) -> tuple[Model, Tensor]:
    """Model and random tokens ``[prompt, position]``."""
    torch.set_num_threads(options.threads)
    shape, device = SHAPES[options.shape], resolve_device(options.device)
    model = make_model(options.shape, shape, device, set_precision(options.dtype, device))
    return model, torch.randint(shape.vocab_size, (options.prompts, options.prompt_len), device=device)


def swept_layers(options: argparse.Namespace) -> range:
    """Every ``layer_step``-th layer, from the middle of the first group."""
    return range((options.layer_step - 1) // 2, SHAPES[options.shape].n_layers, options.layer_step)


def run_engine(model: Model, tokens: Tensor, options: argparse.Namespace, layers: range) -> HeadAblations:
    return ablate_heads(
        model, tokens, find_ablation("resample").prepare(model, [], HEADS), layers, options.rows
    )


def warm_up(model: Model, tokens: Tensor, options: argparse.Namespace) -> int:
    """Ablates the heads of the last two layers; returns the rows of its largest matrix product."""
    rows: list[int] = []
    with watching(model.output_projections, lambda _, z, __: rows.append(z.numel() // z.shape[-1])):
        run_engine(model, tokens, options, range(max(0, model.n_layers - 2), model.n_layers))
    return max(rows)


def measure_memory(options: argparse.Namespace) -> tuple[int, int]:
    """Bytes before and at the peak of ablating the heads of the last two layers; any two take the same."""
    model, tokens = set_up(options)
    with fast_path(model, on=True) as fast:
        return memory_of(model.device, lambda: warm_up(fast, tokens, options))


@dataclass(frozen=True)
class Timed:
    """Median seconds of a call of the engine, and what it found."""

    seconds: float
    found: HeadAblations


def measure_engine(
    model: Model, tokens: Tensor, options: argparse.Namespace
) -> tuple[dict[str, Timed], Matmul]:
    """By :data:`PATHS`, which take turns, calls of the engine; and the matrix products between them."""
    layers = swept_layers(options)
    for path in PATHS:
        with fast_path(model, on=path == FAST) as chosen:
            n_rows = warm_up(chosen, tokens, options)
    matmul = Matmul(model, n_rows)
    matmul.measure()
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    found: dict[str, HeadAblations] = {}
    for _ in range(options.repetitions):
        for path in PATHS:
            matmul.measure()
            with fast_path(model, on=path == FAST) as chosen:
                elapsed, found[path] = timed(
                    model.device, lambda chosen=chosen: run_engine(chosen, tokens, options, layers)
                )
            seconds[path].append(elapsed)
    matmul.measure()
    return {path: Timed(statistics.median(seconds[path]), found[path]) for path in PATHS}, matmul


def sample_heads(layers: range, n_heads: int, n: int) -> list[Head]:
    """``n`` heads of different ``layers``, from the first to the last."""
    places = torch.linspace(0, len(layers) - 1, n).round().int().tolist()
    return [(layers[place], (5 * i + 1) % n_heads) for i, place in enumerate(places)]


def measure_alternatives(
    model: Model, tokens: Tensor, heads: list[Head]
) -> tuple[dict[str, float | None], dict[str, list[dict[str, Tensor]]]]:
    """By way, mean seconds per head (``None`` where memory does not suffice) and what was found."""
    hooked = Hooked(model, tokens)
    ways = {
        "(a) one hooked full forward pass, logits only": hooked.logit_change,
        "(b) cached pass, direct effects, second pass": hooked.breakdown,
    }
    seconds: dict[str, float | None] = {}
    found: dict[str, list[dict[str, Tensor]]] = {}
    for way, measure in ways.items():
        if measure == hooked.breakdown and hooked.breakdown_bytes() > free_memory(model.device):
            seconds[way] = None
            continue
        measure(heads[0])  # warm-up
        timings, results = zip(
            *(timed(model.device, lambda head=head, measure=measure: measure(head)) for head in heads),
            strict=True,
        )
        seconds[way], found[way] = statistics.mean(timings), list(results)
    return seconds, found


def of_head(found: HeadAblations, layers: range, head: Head) -> dict[str, Tensor]:
    """What the engine found for one head, as the alternatives give it."""
    layer, index = head
    names = ("logit_change", "self_repair_heads", "self_repair_mlps")
    return {name: getattr(found, name)[layers.index(layer), index] for name in names}


def relative_differences(
    engine: HeadAblations, layers: range, heads: list[Head], found: dict[str, list[dict[str, Tensor]]]
) -> dict[tuple[str, str], float]:
    """Largest difference from the fast path, over the largest logit change of ``heads``."""
    where = ([layers.index(layer) for layer, _ in heads], [index for _, index in heads])
    largest = engine.logit_change[where].abs().max().item()
    return {
        (way, quantity): (
            torch.stack([values[quantity] for values in results]) - getattr(engine, quantity)[where]
        )
        .abs()
        .max()
        .item()
        / largest
        for way, results in found.items()
        for quantity in results[0]
    }


def sweep_line(model: Model, n_prompts: int, length: int) -> str:
    """Time of a whole sweep, its store included."""
    tokens = torch.randint(
        model.W_U.shape[0], (n_prompts, length), generator=torch.Generator().manual_seed(0)
    )
    with heads_task(model, tokens) as task:
        seconds, _ = timed(model.device, lambda: task.merge([model]))
    amount = f"{n_prompts} prompts × {length} = {n_prompts * length:,} tokens"
    return f"Sweep of all heads on {amount}, its store included: {seconds:.1f} s."


def describe_run(model: Model, options: argparse.Namespace) -> str:
    layers = swept_layers(options)
    text = (
        f"{options.shape}: {model.n_layers} layers, {model.n_heads} heads, d_model {model.W_U.shape[1]}, "
        f"vocabulary {model.W_U.shape[0]}, "
        f"random weights, {options.dtype}; {options.prompts} prompts × {options.prompt_len} tokens; resample "
        "ablation; engine: median of "
        f"{options.repetitions}, (a) and (b): mean of {options.heads_timed} heads."
    )
    if len(layers) < model.n_layers:
        text += (
            f" The engine ablated the heads of layers {', '.join(map(str, layers))} only: its time per head "
            "is extrapolated to all layers, "
            "in proportion to the operations needed."
        )
    return text


def time_table(ways: dict[str, float | None]) -> str:
    """Seconds per head by way; ``None`` where memory does not suffice."""
    fastest = ways[FAST]
    rows = [
        (way, "too little memory", "")
        if seconds is None
        else (way, f"{seconds:.4g}", f"{seconds / fastest:.1f}")
        for way, seconds in ways.items()
    ]
    return table(("way", "seconds per head", "× fast path"), rows)


def speed_table(matmul: Matmul, seconds: float, flops: dict[bool, int]) -> str:
    """``seconds`` are the fast path's, ``flops`` of a call without and with low-rank first maps."""
    rows = [
        (
            f"matrix products of a block, {matmul.n_rows} rows: {way}",
            f"{speed / 1e9:.0f}",
            *(f"{flops[low_rank] / seconds / speed:.0%}" for low_rank in (True, False)),
        )
        for way, speed in matmul.flops_per_second().items()
    ]
    counted = ("fast path, low-rank first maps counted", "fast path, full first maps counted")
    return table(("speed", "GFLOP/s", *counted), rows)


def memory_table(before: int, peak: int, device: torch.device) -> str:
    what = "weights on the GPU" if device.type == "cuda" else "program and weights"
    return table(
        ("memory of the engine", "MB"),
        [(what, f"{before / 1e6:.0f}"), ("peak beyond that", f"{(peak - before) / 1e6:.0f}")],
    )


def agreement_table(differences: dict[tuple[str, str], float], tolerance: float) -> str:
    rows = []
    for (way, quantity), difference in differences.items():
        short = "plain path" if way == PLAIN else way[:3]
        rows.append((f"{short} {quantity}", f"{difference:.1e}"))
    header = (f"difference from the fast path, must be below {tolerance:.0e}", "of the largest logit change")
    return table(header, rows)


def benchmark(options: argparse.Namespace) -> None:
    """Measures, and writes the section.

    Raises:
        UserError: an option does not fit the shape, or the alternatives find something else than the engine.
    """
    check(options)
    device = resolve_device(options.device)
    head = head_of_section(device)
    memory = in_fresh_process(measure_memory, options)
    model, tokens = set_up(options)
    layers = swept_layers(options)
    engine, matmul = measure_engine(model, tokens, options)
    heads = sample_heads(layers, model.n_heads, options.heads_timed)
    ways, found = measure_alternatives(model, tokens, heads)
    found[PLAIN] = [of_head(engine[PLAIN].found, layers, head) for head in heads]
    differences = relative_differences(engine[FAST].found, layers, heads, found)
    tolerance = TOLERANCES[options.dtype]
    if not all(difference < tolerance for difference in differences.values()):
        raise UserError(
            f"engine and alternatives disagree, nothing was written: {differences}, more than {tolerance:.0e}"
        )

    swept = {low_rank: needed_flops(model, *tokens.shape, layers, low_rank) for low_rank in (False, True)}
    whole = needed_flops(model, *tokens.shape, range(model.n_layers), low_rank=False) / swept[False]
    n_heads = model.n_layers * model.n_heads
    per_head = {path: engine[path].seconds * whole / n_heads for path in (FAST, PLAIN)}
    text = [
        head,
        describe_run(model, options),
        time_table({**per_head, **ways}),
        speed_table(matmul, engine[FAST].seconds, swept),
        memory_table(*memory, device),
        agreement_table(differences, tolerance),
    ]
    n_long = options.sweep_prompts or (LONG_SWEEP if device.type == "cuda" else 0)
    if n_long:
        text.append(sweep_line(model, n_long, options.prompt_len))
    write_section(
        options.results, f"Engine: {options.shape}, {options.dtype}, {device.type}", "\n\n".join(text)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument(
        "--dtype", choices=PRECISIONS, default="float32", help="of the weights, or tf32 (%(default)s)"
    )
    parser.add_argument("--prompts", type=even, default=8, help="an even number (8)")
    parser.add_argument("--prompt-len", type=positive, default=128, help="tokens per prompt (128)")
    parser.add_argument(
        "--layer-step",
        type=positive,
        default=1,
        help="let the engine ablate the heads of every Nth layer only (1)",
    )
    parser.add_argument(
        "--heads-timed",
        type=positive,
        default=4,
        help="heads measured with (a) and (b), each of another layer (4)",
    )
    parser.add_argument("--repetitions", type=positive, default=3, help="of the engine (3)")
    parser.add_argument(
        "--rows", type=positive, help="prompts × heads in one pass of the engine (the engine's own choice)"
    )
    parser.add_argument(
        "--sweep-prompts",
        type=even,
        help=f"also time a whole sweep of so many prompts (on a GPU {LONG_SWEEP}, on a CPU not done)",
    )
    return run(parser, arguments, benchmark)


if __name__ == "__main__":
    sys.exit(main())
