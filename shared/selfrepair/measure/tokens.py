"""The prompts that a model is measured on: token ids, drawn once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr

from selfrepair.errors import UserError
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.text.corpora import (
    Prompts,
    hash_documents,
    identity_of_dataset,
    load_tokens,
    read_documents,
)

if TYPE_CHECKING:
    from selfrepair.models.loading import Model


class Tokens(Measurement):
    """``token [prompt, token_position]``; settings as :func:`~selfrepair.text.corpora.load_tokens`."""

    name: ClassVar[str] = "tokens"
    uses: ClassVar[tuple[str, ...]] = ("text", "dataset", "tokens", "n_prompts", "prompt_len", "seed")
    needs_network: ClassVar[bool] = True

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return ()

    def fingerprint(self, settings: Settings) -> dict[str, object]:
        if settings["tokens"] is not None:
            file = Path(str(settings["tokens"]))
            if not file.is_file():
                raise UserError(f"{file}: no such file")
            return {"corpus_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        if settings["dataset"] is not None:
            return {"dataset_files": identity_of_dataset(str(settings["dataset"]))}
        text = HELD_OUT_TEXT if settings["text"] is None else str(settings["text"])
        return {"corpus_sha256": hash_documents(read_documents(text))}

    def shards(self, settings: Settings) -> Sequence[int]:
        return [0]

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        prompts = load_tokens(model.tokenizer, **{name: settings[name] for name in self.uses})
        return of_prompts(prompts)


def of_prompts(prompts: Prompts) -> xr.Dataset:
    """Prompts as this measurement gives them."""
    half = len(prompts.tokens) // 2
    number = np.arange(2 * half)
    return xr.Dataset(
        {"token": (("prompt", "token_position"), prompts.tokens)},
        coords={"prompt": number, "donor": ("prompt", (number + half) % (2 * half))},
        attrs={"corpus": prompts.source, "tokens_sha256": prompts.sha256},
    )


MEASUREMENT = Tokens()
