"""Tokens of every head of a run in context, kept for the explorer of its page."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from selfrepair.analysis.examples import token_texts
from selfrepair.analysis.head_tokens import head_tokens
from selfrepair.models.checkpoints import short_name
from selfrepair.run.explorer import TOKENS
from selfrepair.store.files import write_atomically
from selfrepair.store.stores import open_store

if TYPE_CHECKING:
    from selfrepair.run.study import Study


def write_head_tokens(study: Study, out: Path) -> None:
    """Writes :data:`TOKENS` of a run's heads, where they were measured: for the first kind of ablation."""
    found = {}
    for model_name in study.profile.models:
        task = study.task("heads", model_name)
        if task.is_done():
            texts = partial(token_texts, tokenizer=study.tokenizer(model_name))
            found[short_name(model_name)] = head_tokens(open_store(task.path), texts)
    content = {"ablation": study.profile.ablations[0], "models": found}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    write_atomically(out / TOKENS, text.encode())
