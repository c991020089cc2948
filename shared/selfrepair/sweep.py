"""Every head of a model ablated on every prompt: the suite's main measurement."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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
from selfrepair.direct_effect import FinalNorm, token_directions
from selfrepair.errors import UserError
from selfrepair.models import Model
from selfrepair.replacement import mean_z, pairs_that_fit, partner_batches, replacement_for
from selfrepair.replay import run_clean

SHARD_PAIRS = 16
CODE = ("ablation.py", "direct_effect.py", "kernels.py", "models.py", "replacement.py", "replay.py", "sweep.py")


def sweep(model: Model, prompts: Prompts, ablation: str, out: str | Path, seed: int = 0, progress: bool = True) -> Path:
    """Ablates every head on all prompts and writes a store; returns its path.

    Donor of prompt ``i`` of ``N`` is ``(i + N/2) mod N`` for resample ablation. The store's name
    comes from everything that determines its numbers: asked again, it is not computed again. Work
    is saved in shards of pairs of partners, so that a killed run goes on where it was.

    Raises:
        UserError: unknown ablation, odd number of prompts, prompts that do not fit the model, or a
            model for which direct effects do not sum to the logit.
    """
    replacement_for(ablation, model, None)
    tokens = checked_tokens(model, prompts)
    attributes = describe(model, prompts, ablation, seed)
    name = results.store_name(model.name, ablation, attributes)
    path = Path(out) / f"{name}.zarr"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # a run beside this one that wants the same store waits for it
        shards = results.Shards(Path(out) / f"{name}.shards")
        if path.exists() and _intact(path):
            shards.remove()  # a run killed just before it would have
            return path
        half = len(tokens) // 2
        starts = range(0, half, SHARD_PAIRS)
        found: dict[int, dict[str, np.ndarray]] = {}
        means: list[Tensor] | None = None
        for start in tqdm(starts, desc=f"{model.name} {ablation}", unit="shard", disable=not progress):
            pairs = torch.arange(start, min(start + SHARD_PAIRS, half))
            shard = shards.read(f"{start:06d}")
            if shard is None:
                if ablation == "mean" and means is None:
                    means = _saved_mean_z(model, tokens, shards)
                shard = _ablate_pairs(model, tokens, pairs, half, ablation, means)
                shards.write(f"{start:06d}", shard)
            found[start] = shard
        dataset = _merge(found, half, tokens, attributes)
        results.write_store(dataset, path)
        shards.remove()
        return path


def describe(model: Model, prompts: Prompts, ablation: str, seed: int) -> dict[str, object]:
    """Everything that determines a sweep's numbers."""
    return {
        "model": model.name,
        "architecture": model.hf.config.model_type,
        "weights_sha256": model.weights_hash(),
        "dtype": str(model.dtype).removeprefix("torch."),
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
    if tokens.max() >= model.W_U.shape[0]:
        raise UserError(f"{prompts.source}: token id {int(tokens.max())} is outside {model.name}'s vocabulary of {model.W_U.shape[0]}")
    check_identity(model, tokens[:2])
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


def _intact(path: Path) -> bool:
    try:
        results.open_store(path)
    except UserError:
        return False
    return True


def _ablate_pairs(
    model: Model, tokens: Tensor, pairs: Tensor, half: int, ablation: str, means: list[Tensor] | None
) -> dict[str, np.ndarray]:
    at_once = max(1, min(rows_that_fit(model, tokens.shape[1]) // 2, pairs_that_fit(model, tokens.shape[1])))
    own = torch.cat([pairs, pairs + half])
    parts = [
        ablate_heads(model, tokens[own[batch]], replacement_for(ablation, model, means)) for batch in partner_batches(len(own), at_once)
    ]
    shard = {}
    for field in dataclasses.fields(HeadAblations):
        axis = 0 if field.name == "sigma_clean" else 2
        halves = [getattr(part, field.name).chunk(2, dim=axis) for part in parts]
        ordered = torch.cat([half[0] for half in halves] + [half[1] for half in halves], dim=axis)
        shard[field.name] = ordered.to(torch.promote_types(torch.float32, model.dtype)).cpu().numpy()
    return shard


def _saved_mean_z(model: Model, tokens: Tensor, shards: results.Shards) -> list[Float[Tensor, "head d_head"]]:
    saved = shards.read("mean_z")
    if saved is None:
        saved = {str(layer): z.cpu().numpy() for layer, z in enumerate(mean_z(model, tokens))}
        shards.write("mean_z", saved)
    return [torch.from_numpy(saved[str(layer)]).to(model.device) for layer in range(model.n_layers)]


def _merge(found: dict[int, dict[str, np.ndarray]], half: int, tokens: Tensor, attributes: dict[str, object]) -> xr.Dataset:
    variables = {}
    for field in dataclasses.fields(HeadAblations):
        axis = 0 if field.name == "sigma_clean" else 2
        halves = [np.split(found[start][field.name], 2, axis=axis) for start in sorted(found)]
        values = np.concatenate([first for first, _ in halves] + [second for _, second in halves], axis=axis)
        variables[field.name] = (("layer", "head", "prompt", "position")[-values.ndim :], values)
    n = 2 * half
    prompt = np.arange(n)
    return xr.Dataset(
        {**variables, "token": (("prompt", "token_position"), tokens.cpu().numpy())},
        coords={"prompt": prompt, "donor": ("prompt", (prompt + half) % n), "position": np.arange(tokens.shape[1] - 1)},
        attrs={"format": results.FORMAT, **attributes},
    )
