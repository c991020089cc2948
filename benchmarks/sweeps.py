"""Whole sweeps of a model's heads on random tokens, as the suite runs them: in shards, with their store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Int
from torch import Tensor

from selfrepair.measure.task import Task
from selfrepair.models.loading import Model


@contextmanager
def heads_task(model: Model, tokens: Int[Tensor, "prompt position"]) -> Iterator[Task]:
    """Resample ablation of every head of a model that is on no disk; what it leaves is gone afterwards."""
    n_prompts, length = tokens.shape
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.hf.config.save_pretrained(
            folder / model.name
        )  # a task asks for the files that determine a model
        np.save(folder / "tokens.npy", tokens.cpu().numpy())
        source = {"tokens": str(folder / "tokens.npy"), "text": None, "dataset": None, "seed": 0}
        amounts = {"n_prompts": n_prompts, "prompt_len": length}
        wanted = {**source, **amounts, "dtype": model.precision, "ablation": "resample"}
        yield Task("heads", str(folder / model.name), wanted, folder / "measured")
