"""The authors' released per-head numbers, in the columns of our own tables, and which models they are of."""

from __future__ import annotations

import pandas as pd

from selfrepair.paths import PUBLISHED
from selfrepair.statistics import PARTS

#: Names in the released tables → the models' ids on the Hugging Face hub.
HUB_IDS = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
}

#: Top fraction of tokens by direct effect → the released table that is over it.
TOKENS_OF_FRACTION = {0.02: "top2pct", 1: "all_tokens"}


def published_heads(tokens: str = "top2pct") -> pd.DataFrame:
    """Released head breakdown over ``top2pct`` or ``all_tokens``; ``self_repair`` (logits) sums its parts."""
    table = pd.read_csv(PUBLISHED / f"published_head_breakdown_{tokens}.csv")
    return table.assign(self_repair=sum(table[f"self_repair_{part}"] for part in PARTS))


def published_by_model(tokens: str = "top2pct") -> dict[str, pd.DataFrame]:
    """:func:`published_heads`, model by model."""
    return {str(model): rows for model, rows in published_heads(tokens).groupby("model", sort=False)}


def comparable(fraction: float) -> dict[str, pd.DataFrame]:
    """:func:`published_by_model` over the top 2%, for claims about the top ``fraction``: none of another."""
    return published_by_model() if TOKENS_OF_FRACTION.get(fraction) == "top2pct" else {}


def published_self_feeding() -> pd.DataFrame:
    """The authors' released self-feeding numbers (R&N 2024, §5.3): four heads of five models, in logits."""
    return pd.read_csv(PUBLISHED / "published_self_feeding_heads.csv")


def published_name(model: str) -> str:
    """The released tables' name of a model given so, by hub id (``gpt2`` is one too) or folder name.

    Other names stay as they are.
    """
    names = {
        alias: name for name, hub_id in HUB_IDS.items() for alias in (name, hub_id, hub_id.rpartition("/")[2])
    }
    return names.get(model, model)
