"""Speed of the ablation engine against the alternatives and against the machine's own matrix products.

Random weights of a named shape; time does not depend on their values. See ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from selfrepair.ablation import CPU_ROWS, HeadAblations, ablate_heads
from selfrepair.devices import resolve_device
from selfrepair.errors import UserError
from selfrepair.kernels import use_fast_kernels
from selfrepair.models import Model, load_model
from selfrepair.paths import MODELS
from selfrepair.replacement import replacement_for
from selfrepair.training.architecture import build_model
from selfrepair.training.config import load_config

Head = tuple[int, int]
Result = TypeVar("Result")

TOLERANCE = 1e-4  # of the largest logit change
MATMUL_CALLS = 5  # of each shape, in each repetition


def _gpt2(n_layers: int, n_heads: int, d_model: int, vocab_size: int = 50257) -> PretrainedConfig:
    return GPT2Config(n_layer=n_layers, n_head=n_heads, n_embd=d_model, vocab_size=vocab_size)


def _pythia(n_layers: int, n_heads: int, d_model: int, vocab_size: int = 50304) -> PretrainedConfig:
    return GPTNeoXConfig(
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        vocab_size=vocab_size,
    )


SHAPES: dict[str, PretrainedConfig] = {
    "gpt2-small": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "pythia-160m": _pythia(12, 12, 768),
    "pythia-410m": _pythia(24, 16, 1024),
    "tiny-gpt2": _gpt2(2, 4, 64, vocab_size=256),
    "tiny-pythia": _pythia(2, 4, 64, vocab_size=256),
}
POCKET_SHAPES: dict[str, Path] = {path.stem: path for path in sorted((MODELS / "configs").glob("*.yaml"))}


def load_shape(shape: str, device: torch.device) -> Model:
    """A model of that shape, saved and loaded as any local folder is.

    Its weights are random and large enough that every head, bias and norm counts in the comparison.
    """
    torch.manual_seed(0)
    hf: PreTrainedModel
    if shape in POCKET_SHAPES:
        hf = build_model(load_config(POCKET_SHAPES[shape]), bos_token_id=0)
    else:
        hf = AutoModelForCausalLM.from_config(SHAPES[shape])
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=min(parameter.shape) ** -0.5)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<bos>": 0}, unk_token="<bos>")), bos_token="<bos>", eos_token="<bos>"
    )
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)  # some architectures do not load without one
        return load_model(folder, device=device)


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock seconds of ``work()``, all of its kernels included, and its result."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Hooked:
    """The alternatives, one head at a time through ``TransformerBridge``; resample ablation.

    Clean pass and donors' ``z`` are made here, once, and are in nobody's time.
    """

    @torch.no_grad()
    def __init__(self, model: Model, tokens: Int[Tensor, "prompt position"]):
        self.bridge = model.bridge
        self.tokens = tokens
        self.n_layers, self.n_heads = model.n_layers, model.n_heads
        layers = range(self.n_layers)
        self.names = [f"blocks.{layer}.{part}" for layer in layers for part in ("attn.hook_z", "hook_mlp_out")]
        self.names.append("ln_final.hook_scale")
        logits, self.clean = self.bridge.run_with_cache(tokens, names_filter=self.names)
        self.clean_logit = self._centred_correct_logit(logits)
        W_U = self.bridge.W_U
        unembedded = (W_U - W_U.mean(-1, keepdim=True)).T[tokens[:, 1:]]
        self.direction = unembedded * self.bridge.ln_final.w
        self.clean_effects = self._direct_effects(self.clean)

    @torch.no_grad()
    def logit_change(self, head: Head) -> Float[Tensor, "prompt position-1"]:
        """(a) One full forward pass with the head replaced."""
        return self._centred_correct_logit(self.bridge.run_with_hooks(self.tokens, fwd_hooks=[self._replace(head)])) - self.clean_logit

    @torch.no_grad()
    def breakdown(self, head: Head) -> dict[str, Float[Tensor, "prompt position-1"]]:
        """(b) The way of the paper's code: a cached pass for the direct effects, another pass for the logits."""
        with self.bridge.hooks(fwd_hooks=[self._replace(head)]):
            _, ablated = self.bridge.run_with_cache(self.tokens, names_filter=self.names)
        change = self.logit_change(head)
        heads, mlps = (after - before for after, before in zip(self._direct_effects(ablated), self.clean_effects, strict=True))
        return {
            "logit_change": change,
            "self_repair_heads": heads.sum((0, 1)) - heads[head],
            "self_repair_mlps": mlps.sum(0),
        }

    def _replace(self, head: Head) -> tuple[str, Callable[..., Tensor]]:
        layer, index = head
        name = f"blocks.{layer}.attn.hook_z"
        donated = self.clean[name][:, :, index].roll(len(self.tokens) // 2, dims=0)

        def replace(z: Float[Tensor, "prompt position head d_head"], hook: object) -> Tensor:
            z = z.clone()  # an edit in place can be lost without a word
            z[:, :, index] = donated
            return z

        return name, replace

    def _centred_correct_logit(self, logits: Float[Tensor, "prompt position d_vocab"]) -> Float[Tensor, "prompt position-1"]:
        correct = logits[:, :-1].gather(-1, self.tokens[:, 1:, None])[..., 0]
        return correct - logits[:, :-1].mean(-1)

    def _direct_effects(self, cache: ActivationCache) -> tuple[Tensor, Tensor]:
        """Of every head ``[layer, head, prompt, position-1]`` and MLP ``[layer, prompt, position-1]``, with σ_clean."""
        heads = self._read(cache.stack_head_results()).unflatten(0, (self.n_layers, self.n_heads))
        mlps = self._read(torch.stack([cache[f"blocks.{layer}.hook_mlp_out"] for layer in range(self.n_layers)]))
        return heads, mlps

    def _read(self, written: Float[Tensor, "part prompt position d_model"]) -> Float[Tensor, "part prompt position-1"]:
        scaled = self.clean.apply_ln_to_stack(written, layer=-1)[..., :-1, :]
        return torch.einsum("cpkd,pkd->cpk", scaled, self.direction)


def sample_heads(model: Model, n: int) -> list[Head]:
    """``n`` heads of different layers, from the first to the last."""
    layers = torch.linspace(0, model.n_layers - 1, n).round().int().tolist()
    return [(layer, (5 * i + 1) % model.n_heads) for i, layer in enumerate(layers)]


def needed_flops(model: Model, n_prompts: int, length: int) -> float:
    """Floating-point operations of matrix products that ablating every head needs, whoever does it.

    Clean pass; for each head the blocks above its own and, in a sequential model, its own block's MLP;
    the heads' writes ``z W_O`` and directions ``u W_Oᵀ``. Scores and values of attention are counted in
    full, their causal half not taken off. Elementwise work counts as nothing.
    """
    tokens = n_prompts * length
    d_model, width = model.W_U.shape[1], model.W_O(0).shape[0] * model.W_O(0).shape[1]
    in_block = sum(weight.numel() for weight in matrices(model.blocks[0]))
    in_mlp = in_block - sum(weight.numel() for weight in matrices(model.attentions[0]))
    block = 2 * in_block * tokens + 4 * length * length * width * n_prompts
    blocks_above = model.n_heads * model.n_layers * (model.n_layers - 1) // 2
    own_mlps = 0 if model.parallel else model.n_heads * model.n_layers
    projections = model.n_layers * 2 * width * d_model * (tokens + n_prompts * (length - 1))
    return (model.n_layers + blocks_above) * block + own_mlps * 2 * in_mlp * tokens + projections


def matrices(module: nn.Module) -> list[Float[Tensor, "d_in d_out"]]:
    """The weight matrices inside ``module``, as right factors, in the layout in which it uses them."""
    return [
        m.weight.detach() if isinstance(m, Conv1D) else m.weight.detach().T for m in module.modules() if isinstance(m, Conv1D | nn.Linear)
    ]


class Matmul:
    """Matrix products of one block's shapes, with as many rows as the engine gives them: PyTorch's own, and the engine's."""

    def __init__(self, model: Model, n_prompts: int, length: int, rows: int):
        self.device = model.device
        heads_at_once = min(model.n_heads, max(1, rows // n_prompts))
        self.n_rows = heads_at_once * n_prompts * length
        self.weights = matrices(model.blocks[0])
        self.inputs = {w.shape[0]: torch.randn(self.n_rows, w.shape[0], dtype=w.dtype, device=w.device) for w in self.weights}
        layers = [nn.Linear(*w.shape, bias=False, dtype=w.dtype, device=w.device) for w in self.weights]
        use_fast_kernels(nn.ModuleList(layers))
        self.ways: dict[str, list[Callable[[Tensor], Tensor]]] = {
            "torch.matmul": [partial(torch.matmul, other=w) for w in self.weights],
            "the engine's linear maps": list(layers),
        }
        self._seconds: dict[str, list[list[float]]] = {way: [[] for _ in self.weights] for way in self.ways}

    @torch.no_grad()
    def measure(self) -> None:
        """Takes one more measurement of every shape."""
        for way, products in self.ways.items():
            for weight, product, seconds in zip(self.weights, products, self._seconds[way], strict=True):
                factor = self.inputs[weight.shape[0]]
                product(factor)
                for _ in range(MATMUL_CALLS):
                    seconds.append(timed(self.device, lambda factor=factor, product=product: product(factor))[0])

    def flops_per_second(self) -> dict[str, float]:
        """Of each way: all operations over all time."""
        operations = sum(2 * self.n_rows * weight.numel() for weight in self.weights)
        return {way: operations / sum(map(statistics.median, seconds)) for way, seconds in self._seconds.items()}


def relative_differences(
    engine: HeadAblations, heads: list[Head], found: dict[str, list[dict[str, Tensor]]]
) -> dict[tuple[str, str], float]:
    """Largest difference from the engine of each way and quantity, in units of the largest logit change of ``heads``."""
    layers, indices = zip(*heads, strict=True)
    largest = engine.logit_change[layers, indices].abs().max().item()
    return {
        (way, quantity): (torch.stack([values[quantity] for values in results]) - getattr(engine, quantity)[layers, indices])
        .abs()
        .max()
        .item()
        / largest
        for way, results in found.items()
        for quantity in results[0]
    }


def describe_machine(device: torch.device) -> str:
    """Processor and, where used, accelerator; torch and threads."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    accelerator = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{processor}, {os.cpu_count()} logical cores{accelerator}{load}; torch {torch.__version__}, {torch.get_num_threads()} threads"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def benchmark(arguments: argparse.Namespace) -> bool:
    """Runs everything, prints it, and says whether all ways agree."""
    device = resolve_device(arguments.device)
    machine = describe_machine(device)
    model = load_shape(arguments.shape, device)
    if not 1 <= arguments.heads_timed <= model.n_layers:
        raise UserError(f"--heads-timed {arguments.heads_timed}: between 1 and {model.n_layers}, one in a layer")
    if not 2 <= arguments.prompt_len <= model.context_length:
        raise UserError(f"--prompt-len {arguments.prompt_len}: between 2 and {arguments.shape}'s context of {model.context_length}")
    tokens = torch.randint(model.W_U.shape[0], (arguments.prompts, arguments.prompt_len), device=device)
    n_heads = model.n_layers * model.n_heads
    replacement = replacement_for("resample", model, None)
    matmul = Matmul(model, *tokens.shape, arguments.rows)

    ablate_heads(model, tokens, replacement, range(max(0, model.n_layers - 2), model.n_layers), arguments.rows)  # warm-up
    seconds: list[float] = []
    for _ in range(arguments.repetitions):
        matmul.measure()
        elapsed, engine = timed(device, lambda: ablate_heads(model, tokens, replacement, rows=arguments.rows))
        seconds.append(elapsed / n_heads)
    engine_seconds = statistics.median(seconds)

    hooked = Hooked(model, tokens)
    heads = sample_heads(model, arguments.heads_timed)
    ways: dict[str, Callable[[Head], dict[str, Tensor]]] = {
        "(a) one hooked full forward pass, logits only": lambda head: {"logit_change": hooked.logit_change(head)},
        "(b) cached pass, direct effects, second pass": hooked.breakdown,
    }
    way_seconds: dict[str, float] = {}
    found: dict[str, list[dict[str, Tensor]]] = {}
    for way, run in ways.items():
        run(heads[0])  # warm-up
        timings, results = zip(*(timed(device, lambda head=head, run=run: run(head)) for head in heads), strict=True)
        way_seconds[way], found[way] = statistics.mean(timings), list(results)

    print(f"{machine}\n")
    print(
        f"{arguments.shape}: {model.n_layers} layers, {model.n_heads} heads, d_model {model.W_U.shape[1]}, vocabulary {model.W_U.shape[0]}, "
        f"random weights, {str(model.dtype).removeprefix('torch.')}; {arguments.prompts} prompts × {arguments.prompt_len} tokens; "
        f"resample ablation of all {n_heads} heads, median of {arguments.repetitions}; (a) and (b) mean of {len(heads)} heads\n"
    )
    rows = [("engine, all quantities", f"{engine_seconds:.4g}", "1")]
    rows += [(way, f"{each:.4g}", f"{each / engine_seconds:.1f}") for way, each in way_seconds.items()]
    print(table(("way", "seconds per head", "× engine"), rows), end="\n\n")

    reached = needed_flops(model, *tokens.shape) / (engine_seconds * n_heads)
    speeds = matmul.flops_per_second()
    rows = [
        (f"matrix products of a block, {matmul.n_rows} rows: {way}", f"{speed / 1e9:.0f}", f"{reached / speed:.0%}")
        for way, speed in speeds.items()
    ]
    rows.append(("engine, operations needed over time", f"{reached / 1e9:.0f}", ""))
    print(table(("speed", "GFLOP/s", "engine reaches"), rows), end="\n\n")

    differences = relative_differences(engine, heads, found)
    rows = [(f"{way[:3]} {quantity}", f"{difference:.1e}") for (way, quantity), difference in differences.items()]
    print(table((f"difference from engine, must be below {TOLERANCE:.0e}", "of the largest logit change"), rows))
    return all(difference < TOLERANCE for difference in differences.values())


def positive(text: str) -> int:
    """An ``argparse`` type."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main() -> None:
    """Command line; exit status 1 if the ways disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, *POCKET_SHAPES], default="gpt2-small")
    parser.add_argument("--prompts", type=positive, default=8, help="an even number (8)")
    parser.add_argument("--prompt-len", type=positive, default=128, help="tokens per prompt (128)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of torch (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--heads-timed", type=positive, default=4, help="heads measured with (a) and (b), each of another layer (4)")
    parser.add_argument("--repetitions", type=positive, default=3, help="of the engine and of the matrix products (3)")
    parser.add_argument("--rows", type=positive, default=CPU_ROWS, help="prompts × heads in one pass of the engine (%(default)s)")
    arguments = parser.parse_args()
    if arguments.prompts % 2:
        parser.error("--prompts must be even: half of them are the other half's donors")
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    try:
        agreed = benchmark(arguments)
    except UserError as error:
        parser.error(str(error))
    if not agreed:
        sys.exit("the engine and the alternatives disagree")


if __name__ == "__main__":
    main()
