"""The neurons of one MLP that repair an ablated head: how few they are, and which, over the head's tokens.

*Erasure* is a negative clean direct effect, *anti-erasure* its becoming less negative.
Rushing & Nanda 2024, §5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.estimates import Estimate

#: Shares of the head's direct effect that one neuron may repair.
THRESHOLDS = (0.5, 0.1, 0.05, 0.025, 0.01)
#: Pairs of tokens × neurons of a set that are compared at a time.
COMPARED_AT_ONCE = 20_000_000

#: Statistics, by their ids.
HALF = "neurons-for-half"
SINGLE = "tokens-repaired-by-one-neuron"
OVERLAP = "repairing-neurons-overlap"
ERASING = "erasing-share"
SUPPORTING = "supporting-share"

Head = tuple[int, int]


@dataclass(frozen=True)
class NeuronRepair:
    """What the neurons of one MLP do on the top tokens of heads of one layer.

    The fields are what :func:`selfrepair.measure.neurons.summarize` says: per token, in the order of heads,
    prompts and positions, and, for each neuron or rank, summed over tokens. Effects and changes are logits.
    """

    layer: int
    mlp: int
    head: Int[np.ndarray, " token"]
    prompt: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    direct_effect: Float[np.ndarray, " token"]
    moved: Bool[np.ndarray, " token"]
    largest: Float[np.ndarray, "token single"]
    repairers: Int[np.ndarray, "token set"]
    erasers: Int[np.ndarray, "token set"]
    n_for_half: Float[np.ndarray, " token"]
    repair: Float[np.ndarray, " token"]
    repair_by_erasing: Float[np.ndarray, " token"]
    harm: Float[np.ndarray, " token"]
    harm_by_supporting: Float[np.ndarray, " token"]
    share_by_rank: Float[np.ndarray, "2 neuron"]
    clean_by_rank: Float[np.ndarray, "2 neuron"]
    tokens_by_rank: Float[np.ndarray, "2 neuron"]
    clean_by_neuron: Float[np.ndarray, " neuron"]
    change_by_neuron: Float[np.ndarray, " neuron"]

    @classmethod
    def joined(cls, parts: Sequence[NeuronRepair]) -> NeuronRepair:
        """Of all tokens of ``parts``, which are of the same layer and MLP."""
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("layer", "mlp")]
        columns = {name: [getattr(part, name) for part in parts] for name in names}
        arrays = {
            name: sum(column) if name in _SUMMED else np.concatenate(column)
            for name, column in columns.items()
        }
        order = np.lexsort((arrays["position"], arrays["prompt"], arrays["head"]))
        return cls(
            parts[0].layer,
            parts[0].mlp,
            **{name: a if name in _SUMMED else a[order] for name, a in arrays.items()},
        )

    @property
    def d_mlp(self) -> int:
        return len(self.clean_by_neuron)

    def repaired_alone(self, weights: Float[np.ndarray, "draw prompt"]) -> Estimate:
        """Share of tokens on which the Nth most repairing neuron alone repairs so much of the direct effect.

        ``[threshold, single]``: at least each of ``THRESHOLDS``, for each draw of prompts. A token whose
        direct effect is not positive has nothing to repair and counts as not repaired.
        """
        floor = np.multiply.outer(THRESHOLDS, np.where(self.direct_effect > 0, self.direct_effect, np.inf))
        repaired = (self.largest.T[None] >= floor[:, None]).astype(np.float64)
        return self.token_ratio(repaired, np.ones(len(self.prompt)), weights)

    def token_ratio(
        self,
        top: Float[np.ndarray, "*what token"],
        bottom: Float[np.ndarray, " token"],
        weights: Float[np.ndarray, "draw prompt"],
    ) -> Estimate:
        """``Σ top / Σ bottom`` over tokens, each as often as its prompt is drawn; NaN where none is."""
        above, below = (np.zeros((*values.shape[:-1], weights.shape[1])) for values in (top, bottom))
        np.add.at(above, (..., self.prompt), top)
        np.add.at(below, self.prompt, bottom)
        return Estimate(above @ weights.T) / Estimate(below @ weights.T)


_SUMMED = ("share_by_rank", "clean_by_rank", "tokens_by_rank", "clean_by_neuron", "change_by_neuron")
_PER_TOKEN = tuple(
    field.name
    for field in dataclasses.fields(NeuronRepair)
    if field.name not in (*_SUMMED, "layer", "mlp", "head")
)


def repairs_by_head(measured: xr.Dataset) -> dict[Head, dict[int, NeuronRepair]]:
    """Per ablated head and later MLP, out of the measurement ``neurons``."""
    summed = {name: sum(of_shard.values for of_shard in measured[name]) for name in _SUMMED}
    tokens = {name: measured[name].values for name in _PER_TOKEN}
    tokens = {
        name: values.astype(np.float64) if values.dtype.kind == "f" else values
        for name, values in tokens.items()
    }
    combinations = np.stack([measured[name].values for name in ("layer", "head", "mlp")], axis=1)
    found: dict[Head, dict[int, NeuronRepair]] = {}
    for number, (layer, head, mlp) in enumerate(combinations.tolist()):
        here = np.flatnonzero(measured["combination_of_row"].values == number)
        here = here[np.lexsort((tokens["position"][here], tokens["prompt"][here]))]
        own = {name: values[here] for name, values in tokens.items()}
        totals = {name: values[number] for name, values in summed.items()}
        heads = np.full(len(here), head)
        found.setdefault((layer, head), {})[mlp] = NeuronRepair(layer, mlp, heads, **own, **totals)
    return found


def chance_overlap(n_neurons: int, size: int) -> float:
    """Expected Jaccard overlap of two independent random sets of ``size`` neurons (hypergeometric)."""
    ways = [
        math.comb(size, common) * math.comb(n_neurons - size, size - common) for common in range(size + 1)
    ]
    return sum(n * common / (2 * size - common) for common, n in enumerate(ways)) / math.comb(n_neurons, size)


def pair_overlaps(
    one: NeuronRepair, other: NeuronRepair, n_prompts: int
) -> Float[np.ndarray, "2 prompt prompt"]:
    """Jaccard overlaps of the ``repairers`` of moved tokens of ``one`` and of ``other`` in another prompt.

    By the two tokens' prompts: the sum over all such pairs, and their number.
    """
    sets, prompt, other_sets, other_prompt = (
        x[r.moved] for r in (one, other) for x in (r.repairers, r.prompt)
    )
    belongs = np.eye(n_prompts)[other_prompt]
    total = np.zeros((n_prompts, n_prompts))
    at_once = max(1, COMPARED_AT_ONCE // max(1, other_sets.size))
    for start in range(0, len(sets), at_once):
        here = slice(start, start + at_once)
        member = np.zeros((len(sets[here]), one.d_mlp), dtype=bool)
        np.put_along_axis(member, sets[here], True, axis=1)
        common = member[:, other_sets].sum(-1)
        np.add.at(total, prompt[here], common / (2 * sets.shape[1] - common) @ belongs)
    number = np.multiply.outer(*(np.bincount(of, minlength=n_prompts) for of in (prompt, other_prompt)))
    return np.stack([total, number]) * (1 - np.eye(n_prompts))


def mean_overlap(
    pairs: Float[np.ndarray, "2 prompt prompt"], weights: Float[np.ndarray, "draw prompt"]
) -> Estimate:
    """Mean overlap; a pair counts as often as the product of its prompts' draws; NaN without pairs."""
    total, number = (Estimate(((weights @ by_prompt) * weights).sum(1)) for by_prompt in pairs)
    return total / number


def repair_statistics(repair: NeuronRepair, weights: Float[np.ndarray, "draw prompt"]) -> Statistics:
    """Of one head and MLP, by their ids; NaN where a draw of prompts has none of the head's tokens."""
    counted = np.isfinite(repair.n_for_half).astype(np.float64)
    share = np.nan_to_num(repair.n_for_half) / repair.d_mlp
    return {
        HALF: repair.token_ratio(share, counted, weights),
        SINGLE: repair.repaired_alone(weights)[THRESHOLDS.index(0.05), 0],
        OVERLAP: mean_overlap(pair_overlaps(repair, repair, weights.shape[1]), weights),
        ERASING: repair.token_ratio(repair.repair_by_erasing, repair.repair, weights),
        SUPPORTING: repair.token_ratio(repair.harm_by_supporting, repair.harm, weights),
    }
