"""Tokens to look at: examples of what self-repair does on single tokens, in their context."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int

from selfrepair.analysis.passages import Passage, around

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Kinds of example tokens: self-repair over direct effect lies between these.
KINDS = {"strongly repaired": (0.5, 1.0), "over-corrected": (1.0, np.inf), "made worse": (-np.inf, 0.0)}
#: What a table of examples shows of each (logits, but the probability), and how it calls that.
COLUMNS = {
    "direct_effect": "DE",
    "ablated_direct_effect": "DE ablated",
    "logit_change": "Δlogit",
    "self_repair": "self-repair",
    "share": "self-repair / DE",
    "probability": "clean probability",
}


def pick_examples(tokens: pd.DataFrame) -> pd.DataFrame:
    """Up to two of ``tokens`` per kind, with their ``kind``.

    ``tokens`` are rows as of :func:`selfrepair.analysis.token_variation.selected_tokens`.
    The rule: of the kind's tokens, the one whose ``share`` is nearest in size to their median, then the
    one nearest to their 90% quantile in another prompt. Of two tokens with such a quantile between them it is
    the lower one's: from halfway both are as near, and rounding would choose.
    """
    rows = []
    for kind, (low, high) in KINDS.items():
        left = tokens[(tokens["share"] > low) & (tokens["share"] < high)]
        for wanted in _quantiles(left["share"].abs()):
            if len(left):
                row = left.loc[(left["share"].abs() - wanted).abs().idxmin()]
                rows.append({"kind": kind, **row})
                left = left[left["prompt"] != row["prompt"]]
    whole = {name: int for name in ("layer", "head", "prompt", "position")}
    return pd.DataFrame(rows, columns=["kind", *tokens.columns]).astype(whole)


def _quantiles(sizes: pd.Series) -> list[float]:
    """Of the sizes that tokens have; none of no tokens."""
    return np.quantile(sizes, [0.5, 0.9], method="lower").tolist() if len(sizes) else []


def in_context(chosen: pd.DataFrame, sweep: xr.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Passage]:
    """Each of :func:`pick_examples` among its neighbours: the head's self-repair on every token there.

    ``sweep`` is as :func:`selfrepair.analysis.token_variation.with_probability` gives it.
    """
    found = []
    for number, row in enumerate(chosen.itertuples(), start=1):
        texts = token_texts(sweep["token"].values[row.prompt], tokenizer)
        repair = sweep["self_repair"].values[row.layer, row.head, row.prompt]
        heading = f"{number} · {row.kind}: L{row.layer}H{row.head}, prompt {row.prompt}"
        found.append(around(heading, texts, repair, row.position))
    return found


def token_texts(ids: Int[np.ndarray, " token"], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text of those before it.

    A character that is made of several tokens comes with the last of them.
    """
    texts: list[str] = []
    done = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        whole = text.rstrip("\ufffd") if end < len(ids) else text
        texts.append(whole[len(done) :])
        done = whole if len(whole) > len(done) else done
    return texts


def examples_table(chosen: pd.DataFrame) -> pd.DataFrame:
    """The numbers of :func:`pick_examples`, with the numbers that :func:`in_context` gives them."""
    place = "L" + chosen["layer"].astype(str) + "H" + chosen["head"].astype(str)
    named = pd.DataFrame({"kind": chosen["kind"], "head": place}).join(chosen[list(COLUMNS)])
    return named.rename(columns=COLUMNS).set_index(pd.RangeIndex(1, len(chosen) + 1, name="example"))
