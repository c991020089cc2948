"""How time grows with prompts, heads and layers, and how memory grows with prompts.

Random weights; see ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from command_line import Parser, even, positive, run
from machine import in_fresh_process, memory_of, timed
from operations import needed_flops
from report import head_of_section, table, write_section
from shapes import SHAPES, Shape, make_model
from sweeps import heads_task
from torch import Tensor

from selfrepair.choices import PRECISIONS
from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.fast import fast_path
from selfrepair.engine.head_ablation import ablate_heads
from selfrepair.engine.sites import HEADS
from selfrepair.errors import UserError
from selfrepair.models.devices import resolve_device, set_precision
from selfrepair.models.loading import Model

Memory = tuple[int, int]  # bytes before, and at the peak


@dataclasses.dataclass(frozen=True)
class Case:
    """Ablating every head of ``layers`` on some prompts, by the fast path."""

    model: Model
    tokens: Tensor
    layers: range

    def run(self) -> None:
        with fast_path(self.model, on=True) as model:
            ablate_heads(model, self.tokens, find_ablation("resample").prepare(model, [], HEADS), self.layers)

    def flops(self) -> int:
        return needed_flops(self.model, *self.tokens.shape, self.layers, low_rank=False)


def load(options: argparse.Namespace, **changes: int) -> Model:
    """The shape asked for with some of its numbers changed."""
    device = resolve_device(options.device)
    return make_model(
        options.shape,
        dataclasses.replace(SHAPES[options.shape], **changes),
        device,
        set_precision(options.dtype, device),
    )


def random_tokens(n_prompts: int, options: argparse.Namespace) -> Tensor:
    vocab_size = SHAPES[options.shape].vocab_size
    return torch.randint(
        vocab_size, (n_prompts, options.prompt_len), generator=torch.Generator().manual_seed(0)
    )


def cases(options: argparse.Namespace) -> dict[str, dict[int, Case]]:
    """By what grows; all layers of the shape on the first number of prompts, but for what grows."""
    model, tokens = (
        load(options),
        random_tokens(options.prompts[0], options).to(resolve_device(options.device)),
    )
    return {
        "prompts": {
            n: Case(model, random_tokens(n, options).to(model.device), range(model.n_layers))
            for n in options.prompts
        },
        "heads in every layer": {
            n: Case(load(options, n_heads=n), tokens, range(model.n_layers)) for n in options.heads
        },
        "layers": {n: Case(load(options, n_layers=n), tokens, range(n)) for n in options.layers},
        "layers above": {
            model.n_layers - 1 - layer: Case(model, tokens, range(layer, layer + 1))
            for layer in reversed(range(model.n_layers))
        },
    }


def median_seconds(cases: Mapping[int, Case], repetitions: int) -> dict[int, float]:
    """They take turns, so that a change of the machine's speed meets all of them."""
    found: dict[int, list[float]] = {n: [] for n in cases}
    for each in cases.values():
        each.run()  # warm-up
    for _ in range(repetitions):
        for n, each in cases.items():
            found[n].append(timed(each.model.device, each.run)[0])
    return {n: statistics.median(times) for n, times in found.items()}


def growth_table(what: str, cases: Mapping[int, Case], seconds: Mapping[int, float]) -> str:
    """Time against ``what``, beside the operations needed, each in multiples of the first."""
    flops = {n: each.flops() for n, each in cases.items()}
    first = min(cases)
    rows = [
        (
            f"{n}",
            f"{seconds[n]:.3g}",
            f"{1e3 * seconds[n] / (len(each.layers) * each.model.n_heads):.3g}",
            f"{seconds[n] / seconds[first]:.2f}",
            f"{flops[n] / flops[first]:.2f}",
        )
        for n, each in cases.items()
    ]
    return table((what, "seconds", "ms per head", f"time × that of {first}", "operations ×"), rows)


def power_law(seconds: Mapping[int, float]) -> str:
    """Least squares of the logarithms."""
    exponent = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0]
    return f"Fitted: time ∝ n^{exponent:.2f}."


def straight_line(cases: Mapping[int, Case], seconds: Mapping[int, float]) -> str:
    """Least squares of time per head."""
    n, per_head = np.array(list(seconds)), 1e3 * np.array(list(seconds.values())) / cases[0].model.n_heads
    slope, at_none = np.polyfit(n, per_head, 1)
    deviation = np.abs(at_none + slope * n - per_head).max()
    return (
        f"Fitted: {at_none:.3g} ms per head, a share of the clean pass included, and {slope:.3g} ms more for "
        "each layer above; "
        f"no time is further than {deviation:.2g} ms from that."
    )


def measure_sweep(n_prompts: int, options: argparse.Namespace) -> tuple[float, dict[str, Memory]]:
    """Seconds of a whole sweep, its store included, and memory by place; to be run in a fresh process."""
    torch.set_num_threads(options.threads)
    model = load(options)
    memory: dict[str, Memory] = {}
    seconds: list[float] = []

    def run_sweep(n: int) -> None:
        with heads_task(model, random_tokens(n, options)) as task:
            task.merge([model])

    def on_device() -> None:
        memory[model.device.type] = memory_of(
            model.device, lambda: seconds.append(timed(model.device, lambda: run_sweep(n_prompts))[0])
        )

    run_sweep(2)  # what only the first sweep of a process needs is in place then
    memory["cpu"] = memory_of(torch.device("cpu"), on_device)
    return seconds[0], memory


def memory_tables(options: argparse.Namespace) -> list[str]:
    """Peak memory of whole sweeps, each in a fresh process: the program's and, on a GPU, the device's."""
    found = {n: in_fresh_process(measure_sweep, n, options) for n in options.sweep_prompts}
    first = options.sweep_prompts[0]
    tables = []
    for place in found[first][1]:
        first_peak = found[first][1][place][1]
        rows = []
        for n, (seconds, memory) in found.items():
            before, peak = memory[place]
            beyond = "" if n == first else f"{(peak - first_peak) / (n - first) / 1e3:.0f}"
            rows.append(
                (
                    f"{n}",
                    f"{seconds:.1f}",
                    f"{before / 1e6:.0f}",
                    f"{peak / 1e6:.0f}",
                    f"{peak / first_peak:.3f}",
                    beyond,
                )
            )
        header = (
            "prompts of a sweep",
            "seconds",
            f"MB before, {place}",
            "MB at the peak",
            f"peak × that of {first}",
            "kB per prompt beyond",
        )
        tables.append(table(header, rows))
    return tables


def check(options: argparse.Namespace) -> None:
    """Raises:
    UserError: numbers that the shape cannot have.
    """
    shape: Shape = SHAPES[options.shape]
    for name in ("prompts", "heads", "layers", "sweep_prompts"):
        values = getattr(options, name)
        if len(values) < 2 or sorted(set(values)) != values:
            raise UserError(
                f"--{name.replace('_', '-')} {' '.join(map(str, values))}: two numbers or more are needed, "
                "in rising order"
            )
    for n_heads in options.heads:
        if shape.d_model % (2 * n_heads):
            raise UserError(
                f"--heads {n_heads}: {options.shape}'s d_model of {shape.d_model} cannot be shared out among "
                "them"
            )
    if not 2 <= options.prompt_len <= shape.context_length:
        raise UserError(
            f"--prompt-len {options.prompt_len}: between 2 and {options.shape}'s context of "
            f"{shape.context_length}"
        )


def benchmark(options: argparse.Namespace) -> None:
    """Measures, and writes the section.

    Raises:
        UserError: an option that does not fit the shape.
    """
    check(options)
    device, shape = resolve_device(options.device), SHAPES[options.shape]
    text = [
        head_of_section(device),
        f"{options.shape}: {shape.n_layers} layers, {shape.n_heads} heads, d_model {shape.d_model}, random "
        f"weights, {options.dtype}; "
        f"{options.prompts[0]} prompts × {options.prompt_len} tokens unless said otherwise; resample "
        "ablation of every head; "
        f"times of one call of the engine, median of {options.repetitions}, and of one sweep.",
        *memory_tables(options),
    ]
    for what, growing in cases(options).items():
        seconds = median_seconds(growing, options.repetitions)
        text.append(growth_table(what, growing, seconds))
        text.append(power_law(seconds) if min(seconds) else straight_line(growing, seconds))
    write_section(
        options.results, f"Scaling: {options.shape}, {options.dtype}, {device.type}", "\n\n".join(text)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="pocket-pythia-small")
    parser.add_argument(
        "--dtype", choices=PRECISIONS, default="float32", help="of the weights, or tf32 (%(default)s)"
    )
    parser.add_argument("--prompt-len", type=positive, default=128, help="tokens per prompt (128)")
    parser.add_argument(
        "--prompts",
        type=even,
        nargs="+",
        default=[8, 16, 32, 64],
        help="of one call of the engine (8 16 32 64)",
    )
    parser.add_argument(
        "--heads",
        type=positive,
        nargs="+",
        default=[2, 4, 8, 16],
        help="in every layer, d_model as it is (2 4 8 16)",
    )
    parser.add_argument(
        "--layers", type=positive, nargs="+", default=[2, 4, 8, 16], help="of the model (2 4 8 16)"
    )
    parser.add_argument(
        "--sweep-prompts",
        type=even,
        nargs="+",
        default=[128, 256, 512, 1024],
        help="of whole sweeps (128 256 512 1024)",
    )
    parser.add_argument("--repetitions", type=positive, default=5, help="of every call (5)")
    return run(parser, arguments, benchmark)


if __name__ == "__main__":
    sys.exit(main())
