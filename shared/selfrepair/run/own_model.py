"""Self-repair of every head of one's own model, in a few lines of Python: ``selfrepair.measure_heads``."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from selfrepair.analysis.head_means import HeadMeans
from selfrepair.analysis.head_table import heads_table
from selfrepair.analysis.self_repair import with_self_repair
from selfrepair.engine.ablations import ABLATIONS, find_ablation
from selfrepair.engine.fast.switch import fast_path
from selfrepair.engine.identity_check import check_tokens
from selfrepair.engine.optimal import N_PROMPTS
from selfrepair.errors import UserError
from selfrepair.measure.measurement import find_measurement
from selfrepair.measure.tokens import of_prompts
from selfrepair.measure.unseen_tokens import of_unseen
from selfrepair.models.architectures import SUPPORTED
from selfrepair.models.checkpoints import CHECK_FOLDER, short_name
from selfrepair.models.loading import Model, load_model
from selfrepair.plots.across_models import self_repair_by_depth
from selfrepair.run.profiles import Possible, refuse_impossible
from selfrepair.statistics import check_fraction
from selfrepair.text.corpora import Prompts, load_tokens, remarks_on_pairs

#: So many tokens of one prompt say whether a model in memory is the one that is measured.
COMPARED = 16


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
    model: str | os.PathLike[str] | PreTrainedModel,
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
            changed; it is measured in float32, as a copy that is written to a temporary folder. So what only
            memory holds (hooks, other modules, another forward) is not in the copy: it is refused if the
            logits of copy and model differ.
        text: one document or several to cut into prompts of ``prompt_len`` tokens, in an order that is drawn.
            By default the prose that ships with the suite.
        tokens: token ids ``[prompt, position]`` to measure on instead; the donor of row ``i`` of ``n`` is row
            ``i + n / 2``. Of an odd number the last row is left out, which is said on stderr; so is how many
            donors are equal to their prompts.
        tokenizer: that of a Hugging Face model, which needs one for text.
        n_prompts: an even number; by default 32, or all that ``text`` or ``tokens`` give.
        ablation: ``resample``, ``mean``, ``zero`` or ``optimal``, which learns from further prompts of the
            same source.
        fraction: share of the tokens that each head is judged on, at least one token.

    Raises:
        UserError: an argument of another type; the model is not supported, cannot be loaded or is not what
            its copy is; the prompts are too few, too long, or not the model's; says what to do.
    """
    given: dict[str, Any] = {"text": text, "tokens": tokens, "tokenizer": tokenizer, "n_prompts": n_prompts}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"model": model, "prompt_len": prompt_len, "fraction": fraction}
    refuse_impossible(given | {"ablation": ablation, "device": device}, _OF_CALLERS)
    kind = find_ablation(ablation)
    n_unseen = N_PROMPTS if kind.fits_unseen else 0
    if text is not None and tokens is not None:
        raise UserError("give a text or tokens, not both")
    if isinstance(model, PreTrainedModel) and tokens is None and tokenizer is None:
        raise UserError("a Hugging Face model needs its tokenizer for text: give tokenizer= or tokens=")
    loaded = _loaded(model, tokenizer, device)
    reader = loaded.tokenizer if tokenizer is None else tokenizer
    prompts = _prompts(reader, text, tokens, n_prompts, prompt_len, n_unseen)
    check_tokens(loaded, torch.from_numpy(prompts.tokens), prompts.source)
    check_fraction(float(fraction), len(prompts.tokens) * (prompts.tokens.shape[1] - 1))
    if isinstance(model, PreTrainedModel):
        _check_copy(loaded, model, torch.from_numpy(prompts.tokens[:1, :COMPARED]))
    for line in remarks_on_pairs(prompts, ablation, kind.has_donors):
        print(line, file=sys.stderr)
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


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    several = isinstance(value, Sequence) and all(isinstance(document, str) for document in value)
    return isinstance(value, str) or several


def _as_array(tokens: Any) -> np.ndarray | None:
    """``None`` of what is no array: rows of several lengths for instance."""
    try:
        return torch.as_tensor(tokens).detach().cpu().numpy()
    except (TypeError, ValueError, RuntimeError):
        return None


#: What callers may give.
_OF_CALLERS: Possible = {
    "model": (
        lambda value: isinstance(value, str | os.PathLike | PreTrainedModel) and value != "",
        "the name of a model, its folder or a Hugging Face model",
    ),
    "text": (_is_text, "a text or a list of texts (of a file, what it holds)"),
    "tokens": (
        lambda value: _as_array(value) is not None,
        "an array of token ids [prompt, position], all rows of one length",
    ),
    "tokenizer": (lambda value: isinstance(value, PreTrainedTokenizerBase), "a Hugging Face tokenizer"),
    "n_prompts": (
        lambda value: _is_whole(value) and value >= 2 and value % 2 == 0,
        "a positive even number (prompts are each other's donors in pairs)",
    ),
    "prompt_len": (lambda value: _is_whole(value) and value >= 2, "a whole number of at least 2"),
    "fraction": (
        lambda value: isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1,
        "a number above 0 and at most 1",
    ),
    "ablation": (lambda value: value in ABLATIONS, f"one of {', '.join(ABLATIONS)}"),
    "device": (lambda value: isinstance(value, str), "auto, cpu, cuda, cuda:1 …"),
}


@contextmanager
def _called(name: str, path: str) -> Iterator[None]:
    """Says by ``name`` what is wrong with what was given, of which ``path`` is a temporary copy."""
    try:
        yield
    except UserError as error:
        said = str(error).replace(CHECK_FOLDER, "check what was given").replace(path, name)
        raise type(error)(said) from error


def _loaded(
    model: str | os.PathLike[str] | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: str
) -> Model:
    """By the one path for all models, which checks what it loads."""
    if not isinstance(model, PreTrainedModel):
        return load_model(os.fspath(model), device)
    name = short_name(model.name_or_path or "") or f"{model.config.model_type} (in memory)"
    with tempfile.TemporaryDirectory() as folder, _called(name, own := f"{folder}/model"):
        model.save_pretrained(own)
        _name_stock_class(model, Path(own) / "config.json")
        (_stand_in() if tokenizer is None else tokenizer).save_pretrained(own)
        return replace(load_model(own, device), name=name)


def _name_stock_class(model: PreTrainedModel, saved: Path) -> None:
    """A class that is made of transformers' own may be that one; whether it is, :func:`_check_copy` says."""
    architecture = SUPPORTED.get(model.config.model_type)
    if architecture and any(kind.__name__ == architecture.causal_lm for kind in type(model).__mro__):
        config = json.loads(saved.read_bytes())
        saved.write_text(json.dumps({**config, "architectures": [architecture.causal_lm]}), encoding="utf-8")


@torch.no_grad()
def _check_copy(copy: Model, model: PreTrainedModel, tokens: Int[Tensor, "1 position"]) -> None:
    """Refuses a model that computes otherwise than its ``copy``: a disk holds weights and settings alone.

    Centred logits may differ by rounding: by the root of the model's precision, of the largest.

    Raises:
        UserError: it does, or cannot be run on tokens.
    """
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        logits = model(input_ids=tokens.to(model.device)).logits.cpu().double()
    except Exception as error:  # whatever the user's own code raises
        raise UserError(
            f"{copy.name}: cannot be run on token ids ({type(error).__name__}: {error})"
        ) from error
    finally:
        for module, was in training.items():
            module.training = was
    both = (copy.hf(input_ids=tokens.to(copy.device)).logits.cpu().double(), logits)
    wanted, found = (one - one.mean(-1, keepdim=True) for one in both)
    apart = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not apart < max(torch.finfo(of).eps for of in (model.dtype, copy.dtype)) ** 0.5:
        raise UserError(
            f"{copy.name}: the model in memory is not the one that its weights and configuration give "
            f"(logits differ by {apart:.1e} of the largest), and only that could be measured: undo what was "
            "changed beside weights, such as hooks, modules or its forward"
        )


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
        n_prompts = 32 if n_prompts is None else n_prompts
        return load_tokens(tokenizer, n_prompts=n_prompts, prompt_len=prompt_len, n_unseen=n_unseen)
    with tempfile.TemporaryDirectory() as folder:
        if tokens is not None:
            kind, file = "tokens", Path(folder) / "tokens.npy"
            np.save(file, np.asarray(_as_array(tokens)))
        else:
            kind, file = "text", Path(folder)
            for number, document in enumerate([text] if isinstance(text, str) else text or [""]):
                encoded = document.encode("utf-8", "surrogatepass")  # refused when it is read
                (file / f"{number:06d}.txt").write_bytes(encoded)
        source: dict[str, Any] = {kind: file, "n_prompts": n_prompts, "n_unseen": n_unseen}
        with _called(kind, str(file)):
            return replace(load_tokens(tokenizer, **source, prompt_len=prompt_len), source=kind)
