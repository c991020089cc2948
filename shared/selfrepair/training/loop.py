"""The training loop: Muon for the blocks' matrices, AdamW for the rest; resumable at any step."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from selfrepair.errors import UserError
from selfrepair.models.checkpoints import model_identity
from selfrepair.store.code_identity import code_version
from selfrepair.training.architecture import build_model, start_from
from selfrepair.training.config import TrainingConfig
from selfrepair.training.data import TrainingData
from selfrepair.training.evaluate import token_loss
from selfrepair.training.head_dropout import heads_dropped

CURVE_COLUMNS = ("step", "tokens", "loss", "validation_loss", "learning_rate_factor", "tokens_per_second")
CURVE_EVERY = 10
SAVE_EVERY = 100
VALIDATE_EVERY = 200
STORED_DTYPE = torch.float16


def train(
    config: TrainingConfig, data: TrainingData, work: Path, device: torch.device, save_every: int = SAVE_EVERY
) -> PreTrainedModel:
    """Trains to the end, from the last saved state in the folder ``work`` if there is one.

    ``work`` receives ``state.pt`` (replaced as a whole, every ``save_every`` steps), ``curve.csv``
    (losses in nats per token) and ``checkpoints/step-*`` (ordinary model folders). The trained model
    is returned in float32. Killed at any step and started again, the run ends with the same weights.

    Raises:
        UserError: the state in ``work`` is damaged or of another run (:func:`run_identity`), or the
            configuration starts from a model that is missing or of another shape or tokenizer.
    """
    if save_every % CURVE_EVERY:
        raise ValueError(
            f"save_every must be a multiple of {CURVE_EVERY}, so that no point of the curve spans a "
            f"saved state"
        )
    work.mkdir(parents=True, exist_ok=True)
    model = build_model(config, data.tokenizer.bos_token_id)
    if config.start:
        start_from(model, config.start, data.tokenizer)
    cast(nn.Module, model).to(device)
    optimizers = build_optimizers(model, config)
    rows = data.training_rows(config)
    made_from = run_identity(config, data.digest(rows))
    start = _resume(work, config, made_from, model, optimizers)
    curve = _Curve(work / "curve.csv", start)
    checkpoint_steps = set(log_spaced_steps(config.phase_steps[0], config.n_checkpoints)[:-1])
    phase_starts = set(itertools.accumulate(config.phase_steps[:-1]))
    losses: list[Tensor] = []
    clock = time.monotonic()
    bar = tqdm(
        total=config.n_steps, initial=start, desc=config.name, unit="step", mininterval=2, smoothing=0.05
    )
    model.train()
    with bar as progress, heads_dropped(model, config):
        for step in range(start, config.n_steps):
            if step in phase_starts and step != start:
                _begin_phase(model, config, step)
                optimizers = build_optimizers(model, config)
                _save_state(work, made_from, model, optimizers, step)
            if step in checkpoint_steps:
                save_model(model, data, work / "checkpoints" / f"step-{step:06d}")
            batch = torch.from_numpy(
                rows[step * config.batch_size : (step + 1) * config.batch_size].astype(np.int64)
            )
            losses.append(_step(model, optimizers, batch.to(device), config, step))
            progress.update()
            done = step + 1
            if done % CURVE_EVERY == 0 or done in phase_starts or done == config.n_steps:
                validation = None
                if done % VALIDATE_EVERY == 0 or done == config.n_steps:
                    validation = token_loss(model, torch.from_numpy(data.validation[:128].astype(np.int64)))
                mean = torch.stack(losses).mean().item()
                now = time.monotonic()
                speed = len(losses) * batch.numel() / (now - clock)
                losses, clock = [], now
                progress.set_postfix_str(f"loss {mean:.3f}, {speed:,.0f} tokens/s")
                curve.add(done, done * batch.numel(), mean, validation, lr_factor(config, step), speed)
            # Where a phase starts, its first state is saved above: one of before would go on without a start.
            if done % save_every == 0 and done < config.n_steps and done not in phase_starts:
                _save_state(work, made_from, model, optimizers, done)
    return model


def build_optimizers(model: PreTrainedModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW, undecayed, for embeddings, norms and biases, or all."""
    if config.optimizer == "adamw":
        return [
            torch.optim.AdamW(model.parameters(), lr=config.lr_other, betas=(0.9, 0.95), weight_decay=0.0)
        ]
    in_blocks = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList)
        for p in module.parameters()
    }
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) in in_blocks]
    rest = [p for p in model.parameters() if not (p.ndim == 2 and id(p) in in_blocks)]
    return [
        torch.optim.Muon(matrices, lr=config.lr_matrices, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.lr_other, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def lr_factor(config: TrainingConfig, step: int) -> float:
    """What both learning rates are multiplied by in 0-based ``step``: in each phase linear up, constant,
    linear down."""
    for phase, n in zip(config.phases, config.phase_steps, strict=True):
        if step < n:
            warm, cool = max(1.0, phase.warmup * n), max(1.0, phase.decay * n)
            return phase.lr_factor * min(1.0, (step + 1) / warm, (n - step) / cool)
        step -= n
    raise ValueError("step lies beyond the run")


def log_spaced_steps(n_steps: int, count: int) -> list[int]:
    """``count`` distinct steps from 0 to ``n_steps``, log-spaced after the 0."""
    if count == 0:
        return [n_steps]
    if count == 2:
        return [0, n_steps]
    first = max(1.0, n_steps / 2 ** (1.5 * (count - 2)))
    steps = [0, *(round(x) for x in np.geomspace(first, n_steps, count - 1))]
    if len(set(steps)) < count:
        raise UserError(f"{n_steps} steps are too few for {count} log-spaced checkpoints")
    return steps


def _begin_phase(model: PreTrainedModel, config: TrainingConfig, step: int) -> None:
    """Rounds the weights to what would be stored, so that a phase can also begin from a stored model."""
    torch.manual_seed(config.seed + step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(STORED_DTYPE))


def _step(
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    batch: Int[Tensor, "batch position"],
    config: TrainingConfig,
    step: int,
) -> Float[Tensor, ""]:
    rates = (config.lr_other,) if config.optimizer == "adamw" else (config.lr_matrices, config.lr_other)
    for optimizer, rate in zip(optimizers, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate * lr_factor(config, step)
        optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        logits = model(input_ids=batch).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def save_model(model: PreTrainedModel, data: TrainingData, folder: Path) -> None:
    """Writes an ordinary Hugging Face folder with float16 weights and the tokenizer, whole or not at all."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    stored = type(model)(model.config)
    stored.load_state_dict(model.state_dict())
    cast(nn.Module, stored).to(STORED_DTYPE)
    stored.save_pretrained(unfinished)
    data.tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def run_identity(config: TrainingConfig, digest: str) -> dict[str, str]:
    """What determines a run that reads what has this ``digest`` (:meth:`TrainingData.digest`), by what each
    is called.

    Raises:
        UserError: no such model to start from, or it cannot be read.
    """
    return {
        "configuration": json.dumps(dataclasses.asdict(config)),
        "start model": model_identity(config.start) if config.start else "",
        "text or tokenizer": digest,
        "version of the code": code_version("selfrepair.training.loop"),
    }


def _save_state(
    work: Path,
    made_from: dict[str, str],
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    step: int,
) -> None:
    state = {
        "made_from": made_from,
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with (work / "state.unfinished").open("wb") as file:  # by Python, which says why a write failed
        torch.save(state, file)
    os.replace(work / "state.unfinished", work / "state.pt")


def _resume(
    work: Path,
    config: TrainingConfig,
    made_from: dict[str, str],
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
) -> int:
    path = work / "state.pt"
    if not path.exists():
        torch.manual_seed(config.seed)
        return 0
    try:
        state = torch.load(path, map_location=model.device, weights_only=True)
        others = [what for what, own in made_from.items() if state["made_from"][what] != own]
    except Exception as error:  # torch.load raises many types for a damaged file
        raise UserError(f"{path}: damaged ({type(error).__name__}); delete {work} to start again") from error
    if others:
        raise UserError(
            f"{work}: holds an unfinished run of another {others[0]}; delete it or choose another --out"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"].cpu())
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
    return state["step"]


class _Curve:
    """``curve.csv``, cut back to the step that a run resumes from."""

    def __init__(self, path: Path, start: int):
        self.path = path
        kept: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= start]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CURVE_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)

    def add(
        self, step: int, tokens: int, loss: float, validation: float | None, factor: float, speed: float
    ) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(
                (
                    step,
                    tokens,
                    f"{loss:.5f}",
                    "" if validation is None else f"{validation:.5f}",
                    f"{factor:.5f}",
                    f"{speed:.0f}",
                )
            )
