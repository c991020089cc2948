"""Tokens to look at: examples of what self-repair does on single tokens, in their context."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Kinds of example tokens: self-repair over direct effect lies between these.
KINDS = {"strongly repaired": (0.5, 1.0), "over-corrected": (1.0, np.inf), "made worse": (-np.inf, 0.0)}
CONTEXT = 25


def pick_examples(
    tokens: pd.DataFrame,
    token_ids: Int[np.ndarray, "prompt token"],
    tokenizer: PreTrainedTokenizerBase,
    context: int = CONTEXT,
) -> pd.DataFrame:
    """Up to two of ``tokens`` per kind, with ``kind``, the text ``before`` and the correct ``token`` itself.

    ``tokens`` are rows as of :func:`selfrepair.analysis.token_variation.selected_tokens`.
    The rule: of the kind's tokens, the one whose ``share`` is nearest in size to their median, then the
    one nearest to their 90 % quantile in another prompt.
    """
    rows = []
    for kind, (low, high) in KINDS.items():
        left = tokens[(tokens["share"] > low) & (tokens["share"] < high)]
        for wanted in np.quantile(left["share"].abs(), [0.5, 0.9]) if len(left) else ():
            if len(left):
                row = left.loc[(left["share"].abs() - wanted).abs().idxmin()]
                before, token = _decode(
                    tokenizer, token_ids[int(row["prompt"])], int(row["position"]) + 1, context
                )
                rows.append({"kind": kind, **row, "before": before, "token": token})
                left = left[left["prompt"] != row["prompt"]]
    return pd.DataFrame(rows, columns=["kind", *tokens.columns, "before", "token"])


def _decode(
    tokenizer: PreTrainedTokenizerBase, ids: Int[np.ndarray, " token"], at: int, context: int
) -> tuple[str, str]:
    """Text of the ``context`` tokens before token ``at``, and what that token adds to it.

    A token may be part of a character.
    """
    first = max(0, at - context)
    before, whole = (
        tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False) for end in (at, at + 1)
    )
    differ = (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
    split = next(differ, min(len(before), len(whole)))
    return whole[:split], whole[split:]


def examples_text(chosen: pd.DataFrame, width: int = 100) -> str:
    """The examples as plain text, the token in ⟦brackets⟧, line ends as ↵."""
    blocks = []
    for kind in KINDS:
        rows = chosen[chosen["kind"] == kind]
        blocks += [_example_text(row, width) for _, row in rows.iterrows()]
        if rows.empty:
            blocks.append(f"{kind.upper()}: no such token here")
    return "\n\n".join(blocks)


def _example_text(row: pd.Series, width: int) -> str:
    numbers = (
        f"{row['kind'].upper()}: L{row['layer']:.0f}H{row['head']:.0f}, "
        f"prompt {row['prompt']:.0f}, position {row['position']:.0f}: "
        f"direct effect {row['direct_effect']:.2f} ({row['ablated_direct_effect']:.2f} when ablated), "
        f"logit change {row['logit_change']:+.2f}, self-repair {row['self_repair']:+.2f} "
        f"({row['share']:+.0%} of the direct effect), clean probability {row['probability']:.2g}"
    )
    token = row["token"].replace("\n", "↵").replace(" ", "\u00a0")
    text = row["before"].replace("\n", " ↵ ") + f"⟦{token}⟧"
    context = textwrap.fill(text, width, initial_indent="    … ", subsequent_indent="    ")
    return f"{textwrap.fill(numbers, width)}\n{context}"
