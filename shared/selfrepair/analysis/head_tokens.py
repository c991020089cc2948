"""Of every head, the tokens that it acts on most, in their context: what the results page shows of a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from selfrepair.analysis.passages import Passage, around
from selfrepair.analysis.self_repair import with_self_repair

#: Tokens of each head.
N_TOKENS = 3


def head_tokens(
    sweep: xr.Dataset, texts: Callable[[Int[np.ndarray, " token"]], list[str]]
) -> dict[str, list[dict[str, Any]]]:
    """By head (``L2H7``), :data:`N_TOKENS` passages of different prompts, as JSON.

    Each is around a token on which the head's direct effect is largest: ``tokens``, lists of a text, direct
    effect and self-repair (logits to two places; ``None`` for a prompt's first token, which is not
    predicted), ``marked``, the place of that token among them, and ``prompt``, its number. ``texts`` gives
    what each of a prompt's tokens adds to it.
    """
    sweep = with_self_repair(sweep)
    of_prompt: dict[int, list[str]] = {}
    found = {}
    for layer, head in np.ndindex(sweep.sizes["layer"], sweep.sizes["head"]):
        effect, repair = (sweep[name].values[layer, head] for name in ("direct_effect", "self_repair"))
        passages = []
        for prompt in np.argsort(-effect.max(1), kind="stable")[:N_TOKENS].tolist():
            if prompt not in of_prompt:
                of_prompt[prompt] = texts(sweep["token"].values[prompt])
            position = int(effect[prompt].argmax())
            shown = [around("", of_prompt[prompt], values[prompt], position) for values in (effect, repair)]
            passages.append(_as_json(*shown) | {"prompt": int(sweep["prompt"].values[prompt])})
        found[f"L{layer}H{head}"] = passages
    return found


def _as_json(effect: Passage, repair: Passage) -> dict[str, Any]:
    values = zip(effect.tokens, _rounded(effect.values), _rounded(repair.values), strict=True)
    return {"tokens": [list(of_token) for of_token in values], "marked": effect.marked}


def _rounded(values: Float[np.ndarray, " token"]) -> list[float | None]:
    return [round(value, 2) + 0.0 if np.isfinite(value) else None for value in values.tolist()]
