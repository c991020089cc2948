"""Every head of a model ablated on every prompt: the suite's main measurement."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import xarray as xr
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from selfrepair import __version__, results
from selfrepair.ablation import HeadAblations, ablate_heads, rows_that_fit
from selfrepair.corpora import Prompts
from selfrepair.devices import on_device, on_host, unless_out_of_memory
from selfrepair.direct_effect import FinalNorm, token_directions
from selfrepair.errors import UserError
from selfrepair.manifest import manifest_of, write_manifest
from selfrepair.models import Model
from selfrepair.replacement import mean_z, pairs_that_fit, partner_batches, replacement_for
from selfrepair.replay import run_clean
from selfrepair.support import check_window

#: Logits of this many positions of two prompts are enough to know the final norm and the unembedding.
IDENTITY_POSITIONS = 16
CODE = results.ENGINE

Item = TypeVar("Item")
Result = TypeVar("Result")


def sweep(
    model: Model,
    prompts: Prompts,
    ablation: str,
    out: str | Path,
    seed: int = 0,
    progress: bool = True,
    more_devices: Sequence[torch.device] = (),
) -> Path:
    """Ablates every head on all prompts and writes a store; returns its path.

    Donor of prompt ``i`` of ``N`` is ``(i + N/2) mod N`` for resample ablation. The store's name
    comes from everything that determines its numbers: asked again, it is not computed again. Work
    is saved in shards of pairs of partners, so that a killed run goes on where it was, and several devices
    share the work. Memory does not grow with the number of prompts.

    Raises:
        UserError: unknown ablation, odd number of prompts, prompts that do not fit the model, a model for
            which direct effects do not sum to the logit, or a device too small for one pair of prompts.
    """
    work = Sweep(model, prompts, ablation, out, seed)
    with FileLock(work.path.with_suffix(".lock")):  # a run beside this one that wants the same store waits for it
        results.remove_unfinished(manifest_of(work.path))
        if results.is_whole(work.path):
            work.shards.remove()  # a run killed just before it would have
            return work.path
        seconds = work.compute(work.starts, progress, more_devices)
        write_manifest(manifest_of(work.path), seconds, source=model.source, **work.attributes)
        results.write_store(work.parts(), work.path)
        work.shards.remove()
        return work.path


class Sweep:
    """One sweep's shards and store. A shard holds pairs of partners, from pair ``start`` on, and is computed by itself."""

    def __init__(self, model: Model, prompts: Prompts, ablation: str, out: str | Path, seed: int = 0):
        replacement_for(ablation, model, None)
        self.model, self.ablation = model, ablation
        self.tokens = checked_tokens(model, prompts).cpu()
        self.half = len(self.tokens) // 2
        self.starts = results.shard_starts(len(self.tokens))
        self.attributes = describe(model, prompts, ablation, seed)
        name = results.store_name(model.name, ablation, self.attributes)
        self.path = Path(out) / f"{name}.zarr"
        self.shards = results.Shards(Path(out) / f"{name}.shards")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def compute(self, starts: Iterable[int], progress: bool = False, more_devices: Sequence[torch.device] = ()) -> float:
        """Leaves these shards on the disk; returns how many seconds that took, in whichever run and on whichever device it was done."""
        with tqdm(starts, desc=f"{self.model.name} {self.ablation}", unit="shard", disable=not progress) as bar:
            return sum(float(shard["seconds"]) for shard in on_all([self.model, *map(self.model.on, more_devices)], self.shard, bar))

    def shard(self, model: Model, start: int) -> dict[str, np.ndarray]:
        """The shard from the disk, or computed on ``model`` and kept there."""

        def compute() -> dict[str, np.ndarray]:
            started = time.monotonic()
            return self._compute(model, start, self._kept_mean_z) | {"seconds": np.array(time.monotonic() - started)}

        return results.kept(self.shards.folder, f"{start:06d}", compute)

    def computed_again(self, start: int) -> list[xr.Dataset]:
        """The two parts of the sweep that a shard holds, computed whatever is on the disk."""
        shard = self._compute(self.model, start, lambda model: mean_z(model, self.tokens.to(model.device)))
        return [self._part(shard, start, second) for second in (False, True)]

    def parts(self) -> Iterator[xr.Dataset]:
        """The sweep in parts that follow each other along the prompts: first members of all pairs, then their partners."""
        for second in (False, True):
            for start in self.starts:
                yield self._part(self.shard(self.model, start), start, second)

    def _compute(self, model: Model, start: int, means: Callable[[Model], list[Tensor]]) -> dict[str, np.ndarray]:
        pairs = torch.arange(start, min(start + results.SHARD_PAIRS, self.half))
        shard = _ablate_pairs(model, self.tokens, pairs, self.half, self.ablation, means(model) if self.ablation == "mean" else None)
        if not all(np.isfinite(values).all() for values in shard.values()):
            raise UserError(f"{model.name}: some effects are not finite; the weights are damaged or {model.dtype} is too narrow for them")
        return shard

    def _kept_mean_z(self, model: Model) -> list[Float[Tensor, "head d_head"]]:
        def compute() -> dict[str, np.ndarray]:
            return {str(layer): z.cpu().numpy() for layer, z in enumerate(mean_z(model, self.tokens.to(model.device)))}

        saved = results.kept(self.shards.folder, "mean_z", compute)
        return [torch.from_numpy(saved[str(layer)]).to(model.device) for layer in range(model.n_layers)]

    def _part(self, shard: dict[str, np.ndarray], start: int, second: bool) -> xr.Dataset:
        variables = {}
        for field in dataclasses.fields(HeadAblations):
            values = np.split(shard[field.name], 2, axis=_prompt_axis(field.name))[second]
            variables[field.name] = (("layer", "head", "prompt", "position")[-values.ndim :], values)
        n = variables["sigma_clean"][1].shape[0]
        prompt = np.arange(start, start + n) + second * self.half
        return xr.Dataset(
            {**variables, "token": (("prompt", "token_position"), self.tokens[prompt].numpy())},
            coords={
                "prompt": prompt,
                "donor": ("prompt", (prompt + self.half) % (2 * self.half)),
                "position": np.arange(self.tokens.shape[1] - 1),
            },
            attrs={"format": results.FORMAT, **self.attributes},
        )


def on_all(models: Sequence[Model], work: Callable[[Model, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``work(model, item)`` for every item, in order, each on whichever of the models is free."""
    if len(models) == 1:
        yield from (work(models[0], item) for item in items)
        return
    free: queue.SimpleQueue[Model] = queue.SimpleQueue()
    for model in models:
        free.put(model)

    def on_a_free_one(item: Item) -> Result:
        model = free.get()
        try:
            return work(model, item)
        finally:
            free.put(model)

    with ThreadPoolExecutor(len(models)) as pool:
        yield from pool.map(on_a_free_one, items)


def describe(model: Model, prompts: Prompts, ablation: str, seed: int) -> dict[str, object]:
    """Everything that determines a sweep's numbers."""
    return {
        "model": model.name,
        "architecture": model.hf.config.model_type,
        "weights_sha256": model.weights_hash(),
        "dtype": model.precision,
        "corpus": prompts.source,
        "tokens_sha256": prompts.sha256,
        "n_prompts": int(prompts.tokens.shape[0]),
        "prompt_len": int(prompts.tokens.shape[1]),
        "seed": seed,
        "ablation": ablation,
        "version": __version__,
        "code": results.code_version(*CODE),
    }


def checked_tokens(model: Model, prompts: Prompts) -> Int[Tensor, "prompt position"]:
    """The prompts on the model's device.

    Raises:
        UserError: an odd number of prompts, prompts that do not fit the model, or a model for which
            direct effects do not sum to the logit.
    """
    tokens = torch.from_numpy(np.ascontiguousarray(prompts.tokens, dtype=np.int64)).to(model.device)
    if len(tokens) < 2 or len(tokens) % 2:
        raise UserError(f"{prompts.source}: {len(tokens)} prompts; an even number of at least 2 is needed")
    if tokens.shape[1] > model.context_length:
        raise UserError(f"prompts of {tokens.shape[1]} tokens do not fit {model.name}'s context of {model.context_length}")
    check_window(model.hf.config, tokens.shape[1], model.name)
    if tokens.max() >= model.W_U.shape[0]:
        raise UserError(f"{prompts.source}: token id {int(tokens.max())} is outside {model.name}'s vocabulary of {model.W_U.shape[0]}")
    check_identity(model, tokens[:2, :IDENTITY_POSITIONS])
    return tokens


@torch.no_grad()
def check_identity(model: Model, tokens: Tensor) -> None:
    """Refuses a model whose final residual, read along the token directions, is not the centred logit.

    Raises:
        UserError: it is not, so that no direct effect would mean what it should, or weights are not finite.
    """
    logits = model.hf(input_ids=tokens, use_cache=False).logits[:, :-1].to(torch.promote_types(model.dtype, torch.float32))
    if not logits.isfinite().all():
        raise UserError(f"{model.name}: its logits are not finite; the weights are damaged or {model.dtype} is too narrow for them")
    centred = logits - logits.mean(-1, keepdim=True)
    wanted = centred.gather(-1, tokens[:, 1:, None])[..., 0]
    direction, constant = token_directions(model, tokens)
    final = run_clean(model, tokens).final_residual[:, :-1].to(direction.dtype)
    read = (final * direction).sum(-1) / FinalNorm.of(model.final_norm).sigma(final) + constant
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    error = ((read - wanted).abs().max() / centred.abs().max()).item()
    if not error < tolerance:
        raise UserError(f"{model.name}: direct effects do not sum to the logits (relative error {error:.1e}); this model is not supported")


def _ablate_pairs(
    model: Model, tokens: Tensor, pairs: Tensor, half: int, ablation: str, means: list[Tensor] | None
) -> dict[str, np.ndarray]:
    at_once = max(1, min(rows_that_fit(model, tokens.shape[1]) // 2, pairs_that_fit(model, tokens.shape[1])))
    own = torch.cat([pairs, pairs + half])
    pending = list(partner_batches(len(own), at_once))
    parts: list[dict[str, Tensor]] = []
    while pending:
        batch = pending.pop(0)

        def ablate(rows: Tensor = own[batch]) -> dict[str, Tensor]:
            ablations = ablate_heads(model, on_device(tokens[rows], model.device), replacement_for(ablation, model, means))
            return {name: on_host(value) for name, value in vars(ablations).items()}

        part = unless_out_of_memory(ablate)
        if part is not None:
            parts.append(part)
        elif len(batch) > 2:
            pending[:0] = [torch.cat(halves) for halves in zip(*(members.tensor_split(2) for members in batch.chunk(2)), strict=True)]
        else:
            raise UserError(
                f"{model.name}: {model.device} has too little memory for one pair of prompts; "
                "use shorter prompts, --dtype bfloat16 or a larger device"
            )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    shard = {}
    for field in dataclasses.fields(HeadAblations):
        axis = _prompt_axis(field.name)
        halves = [part[field.name].chunk(2, dim=axis) for part in parts]
        ordered = torch.cat([half[0] for half in halves] + [half[1] for half in halves], dim=axis)
        shard[field.name] = ordered.to(torch.promote_types(torch.float32, model.dtype)).numpy()
    return shard


def _prompt_axis(name: str) -> int:
    return 0 if name == "sigma_clean" else 2
