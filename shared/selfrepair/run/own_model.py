"""Self-repair of every head of one's own model, in a few lines of Python: ``selfrepair.measure_heads``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from selfrepair.analysis.head_means import HeadMeans
from selfrepair.analysis.head_table import heads_table
from selfrepair.analysis.self_repair import with_self_repair
from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.fast.switch import fast_path
from selfrepair.engine.optimal import N_PROMPTS
from selfrepair.errors import UserError
from selfrepair.measure.measurement import find_measurement
from selfrepair.measure.tokens import of_prompts
from selfrepair.measure.unseen_tokens import of_unseen
from selfrepair.models.loading import Model, load_model
from selfrepair.plots.across_models import self_repair_by_depth
from selfrepair.text.corpora import Prompts, load_tokens


@dataclass(frozen=True)
class MeasuredHeads:
    """Every head of a model ablated on some prompts.

    ``effects`` (logits) is ``[layer, head, prompt, position]``: ``direct_effect``, ``ablated_direct_effect``,
    ``logit_change``, ``self_repair`` and its parts ``self_repair_layernorm``, ``self_repair_heads`` and
    ``self_repair_mlps``; beside them ``token [prompt, token_position]``. Each head is judged on the
    ``fraction`` of tokens on which its direct effect is largest. Rushing & Nanda 2024, §2.
    """

    model: str
    ablation: str
    fraction: float
    effects: xr.Dataset

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per head: means over its tokens, intervals over prompts, shares with their floors.

        The columns are those of :func:`selfrepair.analysis.head_table.heads_table`.
        """
        return heads_table(self.effects, self.fraction)

    def draw(self) -> Figure:
        """Self-repair of every head against relative depth (Rushing & Nanda 2024, Fig. 1)."""
        means = HeadMeans.of_sweep(self.effects, self.fraction)
        figure = self_repair_by_depth({f"{self.ablation} ablation": self.table}, {self.model: means})
        figure.set_layout_engine("constrained")  # whatever the user's settings, the legend is on the page
        return figure


def measure_heads(
    model: str | PreTrainedModel,
    *,
    text: str | Sequence[str] | None = None,
    tokens: np.ndarray | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_prompts: int | None = None,
    prompt_len: int = 128,
    ablation: str = "resample",
    fraction: float = 0.02,
    device: str = "auto",
) -> MeasuredHeads:
    """Ablates every head of a model, one at a time, at all positions, and measures what repairs it.

    Args:
        model: an embedded model's name, a folder, a hub id, or a Hugging Face model. Such a model is not
            changed; it is measured in float32, as a copy that is written to a temporary folder.
        text: one document or several to cut into prompts of ``prompt_len`` tokens, in an order that is drawn.
            By default the prose that ships with the suite.
        tokens: token ids ``[prompt, position]`` to measure on instead; the donor of row ``i`` of ``n`` is row
            ``i + n / 2``.
        tokenizer: that of a Hugging Face model, which needs one for text.
        n_prompts: an even number; by default 32, or all that ``text`` or ``tokens`` give.
        ablation: ``resample``, ``mean``, ``zero`` or ``optimal``, which learns from further prompts of the
            same source.
        fraction: share of the tokens that each head is judged on.

    Raises:
        UserError: the model is not supported or cannot be loaded; the prompts are too few, an odd number, too
            long, or not the model's; says what to do.
    """
    n_unseen = N_PROMPTS if find_ablation(ablation).fits_unseen else 0
    if not 0 < fraction <= 1:
        raise UserError(f"fraction must lie in (0, 1], not {fraction}")
    if text is not None and tokens is not None:
        raise UserError("give a text or tokens, not both")
    if isinstance(model, PreTrainedModel) and tokens is None and tokenizer is None:
        raise UserError("a Hugging Face model needs its tokenizer for text: give tokenizer= or tokens=")
    loaded = _loaded(model, tokenizer, device)
    prompts = _prompts(tokenizer or loaded.tokenizer, text, tokens, n_prompts, prompt_len, n_unseen)
    settings = {"ablation": ablation, "n_prompts": len(prompts.tokens)}
    inputs = {"tokens": of_prompts(prompts), "unseen_tokens": of_unseen(prompts)}
    heads = find_measurement("heads")
    with fast_path(loaded) as fast:
        for name in set(heads.needs(settings)) - set(inputs):
            inputs[name] = find_measurement(name).compute(fast, settings, inputs, 0)
        shards = [heads.compute(fast, settings, inputs, shard) for shard in heads.shards(settings)]
    whole = xr.concat(shards, "prompt", data_vars="minimal").sortby("prompt")
    effects = with_self_repair(whole.assign_attrs(model=loaded.name, ablation=ablation))
    return MeasuredHeads(loaded.name, ablation, fraction, effects)


def _loaded(model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: str) -> Model:
    """By the one path for all models, which checks what it loads."""
    if isinstance(model, str):
        return load_model(model, device)
    with tempfile.TemporaryDirectory() as folder:
        own = f"{folder}/{model.config.model_type}"
        model.save_pretrained(own)
        (_stand_in() if tokenizer is None else tokenizer).save_pretrained(own)
        return load_model(own, device)


def _stand_in() -> PreTrainedTokenizerBase:
    """A tokenizer of one token, for a model whose own is not needed: loading asks for one."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))


def _prompts(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str] | None,
    tokens: np.ndarray | Tensor | None,
    n_prompts: int | None,
    prompt_len: int,
    n_unseen: int,
) -> Prompts:
    """Read as files of them are.

    Raises:
        UserError: as :func:`~selfrepair.text.corpora.load_tokens`; the file is called ``text`` or ``tokens``.
    """
    if text is None and tokens is None:
        return load_tokens(tokenizer, n_prompts=n_prompts or 32, prompt_len=prompt_len, n_unseen=n_unseen)
    with tempfile.TemporaryDirectory() as folder:
        if tokens is not None:
            kind, file = "tokens", Path(folder) / "tokens.npy"
            np.save(file, torch.as_tensor(tokens).cpu().numpy())
        else:
            kind, file = "text", Path(folder)
            for number, document in enumerate([text] if isinstance(text, str) else text or ()):
                (file / f"{number:06d}.txt").write_text(document, encoding="utf-8")
        try:
            source: dict[str, Any] = {kind: file, "n_prompts": n_prompts, "n_unseen": n_unseen}
            return load_tokens(tokenizer, **source, prompt_len=prompt_len)
        except UserError as error:
            raise UserError(str(error).replace(str(file), kind)) from error
