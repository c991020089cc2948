"""The authors' released per-head numbers, in the columns of our own tables."""

from __future__ import annotations

import pandas as pd

from selfrepair.breakdown import PARTS
from selfrepair.paths import PUBLISHED


def published_heads(tokens: str = "top2pct") -> pd.DataFrame:
    """Released head breakdown over ``top2pct`` or ``all_tokens``, with ``self_repair``, the sum of its parts (logits)."""
    table = pd.read_csv(PUBLISHED / f"published_head_breakdown_{tokens}.csv")
    return table.assign(self_repair=sum(table[f"self_repair_{part}"] for part in PARTS))
