"""The neurons of one MLP that repair an ablated head: how few they are, and which, over the head's tokens.

*Erasure* is a negative clean direct effect, *anti-erasure* its becoming less negative. Everything has a
mirror image, with the signs of all direct effects and changes reversed: neurons that break in place of
those that repair, that support in place of those that erase. Rushing & Nanda 2024, §4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.neuron_sets import NeuronSets, mean_overlap, pair_overlaps
from selfrepair.statistics import Head, clipped_share

#: Tokens of a head: where its direct effect is largest, where the MLPs repair most, where they break most.
DIRECT_EFFECT, REPAIR, BREAKAGE = "direct effect", "repair", "breakage"
#: Sides of an MLP's change: the neurons that repair, and their mirror image.
REPAIRING, BREAKING = 0, 1
#: Neurons in the order of their change that figures follow.
N_FOLLOWED = 50
#: Of the head's direct effect, what one neuron must repair for the claim.
NOTICEABLE = 0.05

#: Statistics, by their ids, and their controls; the last is the mirror image of the erasing share.
HALF, GAUSSIAN_HALF = "neurons-for-half", "neurons-for-half-gaussian"
SINGLE, BROKEN = "tokens-repaired-by-one-neuron", "tokens-broken-by-one-neuron"
OVERLAP, STRONGEST = "repairing-neurons-overlap", "strongest-neurons-overlap"
ERASING, ERASERS = "erasing-share", "erasers-part-of-change"
WEAKENING, SUPPORTERS = "erasers-weaken", "supporters-weaken"
FIRST, FIRST_OF_EITHER = "first-repairer-erases", "first-changer-erases"

#: What readers are shown for them.
IN_WORDS = {
    HALF: "neurons for half of the change",
    GAUSSIAN_HALF: "the same of Gaussian changes",
    SINGLE: "tokens that one neuron repairs",
    BROKEN: "tokens that one neuron breaks",
    OVERLAP: "overlap of repairing neurons",
    STRONGEST: "overlap of the strongest neurons",
    ERASING: "erasers' part of the positive change",
    ERASERS: "erasers' part of all change",
    WEAKENING: "part by which erasers erase less",
    SUPPORTERS: "part by which supporters support less",
    FIRST: "the first to repair is an eraser",
    FIRST_OF_EITHER: "the first to repair or break is an eraser",
}


@dataclass(frozen=True)
class NeuronRepair:
    """What the neurons of one MLP do on some tokens of heads of one layer.

    The fields are what :func:`selfrepair.measure.neuron_summary.summarize` says, in the order of heads,
    prompts and positions. Effects and changes are logits; side 1 has their signs reversed.
    """

    layer: int
    mlp: int
    d_mlp: int
    thresholds: tuple[float, ...]
    head: Int[np.ndarray, " token"]
    prompt: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    direct_effect: Float[np.ndarray, " token"]
    self_repair: Float[np.ndarray, " token"]
    mlps_repair: Float[np.ndarray, " token"]
    mlp_direct_effect: Float[np.ndarray, " token"]
    moved: Bool[np.ndarray, " token"]
    total: Float[np.ndarray, "token 2"]
    by_erasing: Float[np.ndarray, "token 2"]
    changed_by_erasing: Float[np.ndarray, "token 2"]
    n_for_half: Int[np.ndarray, "token 2"]
    n_above: Int[np.ndarray, "token 2 threshold"]
    largest: Float[np.ndarray, "token 2 few"]
    largest_clean: Float[np.ndarray, "token 2 few"]
    repairers: Int[np.ndarray, "token set"]
    strongest: Int[np.ndarray, "token set"]
    erasers: Int[np.ndarray, "token set"]

    @classmethod
    def joined(cls, parts: Sequence[NeuronRepair]) -> NeuronRepair:
        """Of all tokens of ``parts``, which are of the same layer and MLP."""
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in ("head", *_PER_TOKEN)
        }
        order = np.lexsort((arrays["position"], arrays["prompt"], arrays["head"]))
        return dataclasses.replace(parts[0], **{name: of[order] for name, of in arrays.items()})

    @property
    def mlp_repair(self) -> Float[np.ndarray, " token"]:
        """Change of the MLP's direct effect (logits)."""
        return self.total[:, REPAIRING] - self.total[:, BREAKING]

    def sets(self, name: str) -> NeuronSets:
        """The ``repairers``, ``strongest`` or ``erasers`` of tokens on which something changes."""
        return NeuronSets(self.prompt[self.moved], getattr(self, name)[self.moved], self.d_mlp)

    def repaired_alone(self, weights: Float[np.ndarray, "draw prompt"], side: int = REPAIRING) -> Estimate:
        """Share of tokens on which the Nth most repairing neuron alone repairs so much of the direct effect.

        ``[threshold, neuron]``: at least each of ``thresholds``, for each draw of prompts. A token whose
        direct effect is not positive has nothing to repair and counts as not repaired. Of the other side:
        how often the Nth most breaking neuron breaks so much.
        """
        nth = np.arange(1, min(N_FOLLOWED, self.d_mlp) + 1)
        reached = self.n_above[:, side].T[:, None] >= nth[:, None]
        return self.token_ratio(reached.astype(np.float64), np.ones(len(self.prompt)), weights)

    def weakening(self, side: int, weights: Float[np.ndarray, "draw prompt"]) -> Estimate:
        """Of the absolute change of neurons that erase, the share by which they erase less.

        Of the other side: of neurons that support, by which they support less.
        """
        return self.token_ratio(self.by_erasing[:, side], self.changed_by_erasing[:, side], weights)

    def token_ratio(
        self,
        top: Float[np.ndarray, "*what token"],
        bottom: Float[np.ndarray, " token"],
        weights: Float[np.ndarray, "draw prompt"],
    ) -> Estimate:
        """``Σ top / Σ bottom`` over tokens, each as often as its prompt is drawn; NaN where none is."""
        often = weights.T[self.prompt]
        return Estimate(top @ often) / Estimate(bottom @ often)

    def share_for_half(self, side: int = REPAIRING) -> Float[np.ndarray, " some_token"]:
        """Share of neurons that carries half of the side's change, on tokens that have any."""
        return self.n_for_half[self.n_for_half[:, side] > 0, side] / self.d_mlp

    def few_of_total(self, side: int = REPAIRING) -> Float[np.ndarray, " token"]:
        """Share of the side's change that its few largest changes carry; NaN without any."""
        few, total = self.largest[:, side].clip(min=0).sum(-1), self.total[:, side]
        return np.divide(few, total, out=np.full(len(few), np.nan), where=total > 0)

    def few_of_mlps(self, side: int = REPAIRING) -> Float[np.ndarray, " token"]:
        """The few largest changes over what *all* MLPs repair (or break); NaN where that is not positive."""
        few, mlps = self.largest[:, side].sum(-1), self.mlps_repair * (1 - 2 * side)
        return np.divide(few, mlps, out=np.full(len(few), np.nan), where=mlps > 0)

    def first_erases(self, side: int = REPAIRING) -> Float[np.ndarray, " token"]:
        """1 where the neuron that changes most erases (of the other side: supports), else 0."""
        return (self.largest_clean[:, side, 0] < 0).astype(np.float64)


_PER_TOKEN = tuple(
    field.name
    for field in dataclasses.fields(NeuronRepair)
    if field.name not in ("layer", "mlp", "d_mlp", "thresholds", "head")
)


@dataclass(frozen=True)
class NeuronTotals:
    """Sums over the tokens of a head selected by its direct effect, for one MLP.

    The fields are what :func:`selfrepair.measure.neuron_summary.summarize` says; ``n_moved`` is how many
    tokens what is by rank is summed over.
    """

    n_moved: int
    share_by_rank: Float[np.ndarray, "2 neuron"]
    clean_by_rank: Float[np.ndarray, "2 neuron"]
    tokens_by_rank: Float[np.ndarray, "2 neuron"]
    clean_by_neuron: Float[np.ndarray, " neuron"]
    change_by_neuron: Float[np.ndarray, " neuron"]

    @classmethod
    def summed(cls, parts: Sequence[NeuronTotals]) -> NeuronTotals:
        """Of all tokens of ``parts``, which are of the same neurons."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: sum(getattr(part, name) for part in parts) for name in names})

    def first_clean(self, side: int = REPAIRING) -> float:
        """Mean clean direct effect (logits) of the neuron that repairs most, or (other side) breaks most."""
        return float(self.clean_by_rank[side, 0] / self.tokens_by_rank[side, 0] * (1 - 2 * side))


#: By selection, head and MLP.
Repairs = dict[str, dict[Head, dict[int, NeuronRepair]]]


def repairs_of(measured: xr.Dataset) -> Repairs:
    """What the measurement ``neurons`` holds of single tokens, those of each selection."""
    combinations = np.stack([measured[name].values for name in ("layer", "head", "mlp")], axis=1)
    columns = {name: measured[name].values for name in _PER_TOKEN}
    columns = {
        name: values.astype(np.float64) if values.dtype.kind == "f" else values
        for name, values in columns.items()
    }
    in_order = np.lexsort((columns["position"], columns["prompt"]))
    selected, of_row = measured["selected"].values, measured["combination_of_row"].values
    same: dict[str, Any] = {
        "d_mlp": measured.sizes["neuron"],
        "thresholds": tuple(measured.attrs["thresholds"]),
    }
    found: Repairs = {name: {} for name in measured.attrs["selections"]}
    for number, (layer, head, mlp) in enumerate(combinations.tolist()):
        rows = in_order[of_row[in_order] == number]
        for i, of_heads in enumerate(found.values()):
            here = rows[selected[rows, i]]
            own = {name: values[here] for name, values in columns.items()}
            heads = np.full(len(here), head)
            of_heads.setdefault((layer, head), {})[mlp] = NeuronRepair(layer, mlp, head=heads, **same, **own)
    return found


def totals_of(measured: xr.Dataset) -> dict[Head, dict[int, NeuronTotals]]:
    """What the measurement ``neurons`` holds summed over tokens."""
    names = [field.name for field in dataclasses.fields(NeuronTotals) if field.name != "n_moved"]
    summed = {name: sum(of_shard.values for of_shard in measured[name]) for name in names}
    counted = measured["moved"].values & measured["selected"].values[:, 0]
    n_moved = np.bincount(
        measured["combination_of_row"].values[counted], minlength=measured.sizes["combination"]
    ).tolist()
    found: dict[Head, dict[int, NeuronTotals]] = {}
    places = zip(*(measured[name].values.tolist() for name in ("layer", "head", "mlp")), strict=True)
    for number, (layer, head, mlp) in enumerate(places):
        own = {name: values[number] for name, values in summed.items()}
        found.setdefault((layer, head), {})[mlp] = NeuronTotals(n_moved[number], **own)
    return found


def gaussian_half(n_neurons: int) -> float:
    """Share of ``n_neurons`` that carries half of the positive change where changes are Gaussian, all alike.

    Changes above ``t`` carry ``exp(−t²/2)`` of it, half at ``t = √(2 ln 2)``, and one in ``1 − Φ(t)`` neurons
    is above: 0.12. Whole neurons take half a neuron more.
    """
    return 1 - NormalDist().cdf(math.sqrt(2 * math.log(2))) + 0.5 / n_neurons


def part_of_self_repair(
    repair: NeuronRepair, part: Float[np.ndarray, " token"]
) -> Float[np.ndarray, " some_token"]:
    """``clip(part / self-repair, 0, 1)``, on tokens with positive self-repair."""
    repaired = repair.self_repair > 0
    return clipped_share(part[repaired], repair.self_repair[repaired])


def mlp_part(
    repair: NeuronRepair, part: Float[np.ndarray, " token"], weights: Float[np.ndarray, "draw prompt"]
) -> dict[str, Estimate]:
    """How much of self-repair is ``part`` (logits): ``clipped`` and its ``floor``; both means (logits).

    ``clipped`` is the mean of :func:`part_of_self_repair`. The floor is the same where the sign of the part
    is random beside what else repairs: over both signs, with the tokens that then have positive self-repair.
    ``part`` and ``self_repair`` are means over all tokens.
    """
    shares, there = [], []
    for sign in (1, -1):
        whole = repair.self_repair + (sign - 1) * part
        there.append((whole > 0).astype(np.float64))
        shares.append(np.where(whole > 0, clipped_share(sign * part, whole), 0))
    return {
        "clipped": repair.token_ratio(shares[0], there[0], weights),
        "floor": repair.token_ratio(shares[0] + shares[1], there[0] + there[1], weights),
        "part": repair.token_ratio(part, np.ones(len(part)), weights),
        "self_repair": repair.token_ratio(repair.self_repair, np.ones(len(part)), weights),
    }


def repair_statistics(
    repair: NeuronRepair, mirror: NeuronRepair, weights: Float[np.ndarray, "draw prompt"]
) -> Statistics:
    """Of one head and MLP, by their ids, with their controls; NaN where a draw has none of its tokens.

    ``mirror`` has the tokens on which the mirror image is taken: the same ones, or those where the MLPs break
    most beside those where they repair most.
    """
    n_prompts, every = weights.shape[1], np.ones(len(repair.prompt))
    counted = (repair.n_for_half[:, REPAIRING] > 0).astype(np.float64)
    half = repair.token_ratio(repair.n_for_half[:, REPAIRING] / repair.d_mlp, counted, weights)
    noticeable = repair.thresholds.index(NOTICEABLE)
    overlaps = [
        mean_overlap(pair_overlaps(sets, sets, n_prompts), weights)
        for sets in (repair.sets("repairers"), repair.sets("strongest"))
    ]
    return {
        HALF: half,
        GAUSSIAN_HALF: Estimate(np.full_like(half.drawn, gaussian_half(repair.d_mlp))),
        SINGLE: repair.repaired_alone(weights)[noticeable, 0],
        BROKEN: mirror.repaired_alone(weights, BREAKING)[noticeable, 0],
        OVERLAP: overlaps[0],
        STRONGEST: overlaps[1],
        ERASING: repair.token_ratio(repair.by_erasing[:, REPAIRING], repair.total[:, REPAIRING], weights),
        ERASERS: repair.token_ratio(repair.changed_by_erasing[:, REPAIRING], repair.total.sum(1), weights),
        FIRST: repair.token_ratio(repair.first_erases(), every, weights),
        FIRST_OF_EITHER: repair.token_ratio(
            (repair.largest_clean[:, :, 0] * (1, -1) < 0).mean(1), every, weights
        ),
        WEAKENING: repair.weakening(REPAIRING, weights),
        SUPPORTERS: mirror.weakening(BREAKING, weights),
    }
