"""Self-repair by part (final norm, other heads, MLPs), and ways of counting shares of the direct effect."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from selfrepair.analysis.estimates import Estimate, draws, selected_means
from selfrepair.analysis.self_repair import with_self_repair
from selfrepair.analysis.shares import clipped_floor, select_each_top
from selfrepair.statistics import PARTS, clipped_share, later_half

WAYS = ("clipped", "unclipped mean", "median", "ratio of means")
#: What the clipped share is with signs at random; a row of tables beside the ways.
FLOOR = "clipped, floor"
#: Sums of parts → the parts. With the norm frozen (σ_clean kept in the ablated run) the layernorm part is 0
#: and nothing before the norm changes, so that heads and MLPs remain.
SUMS = {
    **{part: (part,) for part in PARTS},
    "norm frozen": ("heads", "mlps"),
    "self-repair": PARTS,
}


#: Smallest direct effect (logits) by which a single token's part can be divided: rounding leaves some 1e-6
#: logits in a part, and ratios to what may as well be 0 have no mean.
RESOLVED = 1e-3
#: Tokens of a block in which a median is looked for.
BLOCK = 128


@dataclass(frozen=True)
class TokensOfHeads:
    """Self-repair by part, direct effects (logits), the tokens of each head, and draws of prompts."""

    model: str
    parts: dict[str, Float[np.ndarray, "layer head prompt position"]]
    direct_effect: Float[np.ndarray, "layer head prompt position"]
    chosen: Bool[np.ndarray, "layer head prompt position"]
    weights: Float[np.ndarray, "draw prompt"]

    @classmethod
    def of_sweep(
        cls, sweep: xr.Dataset, fraction: float, n_bootstrap: int = 400, seed: int = 0
    ) -> TokensOfHeads:
        """A head's tokens are its top ``fraction`` by direct effect."""
        sweep = with_self_repair(sweep)
        effect = sweep["direct_effect"].values.astype(np.float64)
        parts = {part: sweep[f"self_repair_{part}"].values.astype(np.float64) for part in PARTS}
        weights = draws(sweep.sizes["prompt"], n_bootstrap, seed)
        return cls(sweep.attrs["model"], parts, effect, select_each_top(effect, fraction), weights)

    def mean(self, values: Float[np.ndarray, "layer head prompt position"]) -> Estimate:
        """Over each head's tokens, ``[layer, head]``."""
        return selected_means(values, self.chosen, self.weights)

    def clipped(self, part: str) -> Estimate:
        """A part's share per token, clipped to [0, 1]: mean over each head's tokens."""
        return self.mean(clipped_share(self.parts[part], self.direct_effect))

    def floor(self, part: str) -> Estimate:
        """The same with signs at random."""
        return self.mean(clipped_floor(self.parts[part], self.direct_effect))

    def means(self) -> PartMeans:
        logits = {part: self.mean(value) for part, value in self.parts.items()}
        return PartMeans(self.model, logits, self.mean(self.direct_effect))


@dataclass(frozen=True)
class PartMeans:
    """Mean self-repair by part and mean direct effect (logits) of every head, ``[layer, head]``."""

    model: str
    logits: dict[str, Estimate]
    direct_effect: Estimate

    @classmethod
    def of_sweep(cls, sweep: xr.Dataset, fraction: float, n_bootstrap: int = 400, seed: int = 0) -> PartMeans:
        """Over each head's top ``fraction`` of tokens; samples draw whole prompts."""
        return TokensOfHeads.of_sweep(sweep, fraction, n_bootstrap, seed).means()

    @classmethod
    def of_table(cls, table: pd.DataFrame) -> PartMeans:
        """Of one model's rows of a heads table: without samples."""
        (model,) = table["model"].unique()
        logits = {part: _column(table, f"self_repair_{part}") for part in PARTS}
        return cls(model, logits, _column(table, "direct_effect"))

    @property
    def later(self) -> slice:
        """The later half of the layers."""
        return slice(later_half(len(self.direct_effect)), None)

    def restored(self, parts: Iterable[str], layers: slice = slice(None)) -> Estimate:
        """What parts give back of the direct effect: the ratio of the sums over all heads of some layers.

        NaN where the direct effects do not sum to more than 0, as they may over all tokens.
        """
        effect = self.direct_effect[layers].sum((0, 1))
        total = self._together(parts)[layers].sum((0, 1))
        return total / effect.map(lambda drawn: np.where(drawn > 0, drawn, np.nan))

    def restored_by_part(self) -> dict[str, Estimate]:
        """:data:`SUMS` over direct effect, later half of the layers."""
        return {name: self.restored(parts, self.later) for name, parts in SUMS.items()}

    def by_part(self) -> dict[str, Estimate]:
        """The direct effect and :data:`SUMS` (logits), means over heads, later half of the layers."""
        found = {"direct effect": self.direct_effect}
        found |= {name: self._together(parts) for name, parts in SUMS.items()}
        return {name: estimate[self.later].mean((0, 1)) for name, estimate in found.items()}

    def _together(self, parts: Iterable[str]) -> Estimate:
        return functools.reduce(operator.add, (self.logits[part] for part in parts))


@dataclass(frozen=True)
class Breakdown:
    """Shares of the direct effect by part, over each head's top tokens; samples draw whole prompts.

    ``shares[way][part]`` and ``floors[part]`` are ``[layer, head]``. Ways of counting a part's share: the
    per-token ratio ``clipped`` to [0, 1] and averaged, averaged as it is (``unclipped mean``), its
    ``median``, and the ``ratio of means`` of a head. The floor of the clipped share is
    :func:`~selfrepair.analysis.shares.clipped_floor`; released tables have none.
    """

    means: PartMeans
    shares: dict[str, dict[str, Estimate]]
    floors: dict[str, Estimate]

    @classmethod
    def of_sweep(cls, sweep: xr.Dataset, fraction: float, n_bootstrap: int = 400, seed: int = 0) -> Breakdown:
        return cls.of_tokens(TokensOfHeads.of_sweep(sweep, fraction, n_bootstrap, seed))

    @classmethod
    def of_tokens(cls, tokens: TokensOfHeads) -> Breakdown:
        """Tokens whose direct effect is exactly 0 have no ratio: the median leaves them out.

        A head with a token whose direct effect is below :data:`RESOLVED` has no unclipped mean.
        """
        means = tokens.means()
        effect, defined = tokens.direct_effect, tokens.chosen & (tokens.direct_effect != 0)
        unresolved = (tokens.chosen & (np.abs(effect) < RESOLVED)).any((2, 3))[..., None]
        shares: dict[str, dict[str, Estimate]] = {way: {} for way in WAYS}
        floors = {}
        for part, value in tokens.parts.items():
            ratio = np.divide(value, effect, out=np.zeros_like(value), where=defined)
            shares["clipped"][part] = tokens.clipped(part)
            unclipped = tokens.mean(ratio)
            shares["unclipped mean"][part] = unclipped.map(lambda drawn: np.where(unresolved, np.nan, drawn))
            shares["median"][part] = Estimate(_medians(ratio, defined, tokens.weights))
            shares["ratio of means"][part] = means.logits[part] / means.direct_effect
            floors[part] = tokens.floor(part)
        return cls(means, shares, floors)

    @classmethod
    def of_table(cls, table: pd.DataFrame) -> Breakdown:
        """Of one model's rows of a released table, without samples and what needs single tokens."""
        means = PartMeans.of_table(table)
        shares = {
            "clipped": {part: _column(table, f"clipped_share_{part}") for part in PARTS},
            "ratio of means": {part: means.logits[part] / means.direct_effect for part in PARTS},
        }
        return cls(means, shares, {})

    def by_layer(self) -> pd.DataFrame:
        """Per layer, part and quantity (``logits``, a way of counting, the floor): mean over heads, interval.

        The ratio of means of a layer is that of the sums over its heads; the others are means over heads, and
        NaN where a head has none.
        """
        means, layers = self.means, {"layer": range(len(self.means.direct_effect))}
        tables = []
        for part in PARTS:
            over_heads = {"logits": means.logits[part].mean(1), FLOOR: self.floors[part].mean(1)}
            over_heads |= {way: self.shares[way][part].mean(1) for way in WAYS[:-1]}
            over_heads["ratio of means"] = means.logits[part].sum(1) / means.direct_effect.sum(1)
            for quantity, found in over_heads.items():
                tables.append(found.table(layers, model=means.model, part=part, quantity=quantity))
        columns = ["model", "layer", "part", "quantity", "estimate", "low", "high"]
        return pd.concat(tables, ignore_index=True)[columns]

    def over_tokens(self, part: str) -> dict[str, Estimate]:
        """A part's share, each way: per token within a head, then the mean over all heads."""
        ways = {way: self.shares[way][part].nanmean((0, 1)) for way in WAYS[:-1]}
        return ways | {"ratio of means": self.means.restored([part])}

    def over_heads(self, part: str) -> dict[str, Estimate]:
        """The same from head means alone, which is all that released tables allow.

        Mean of the clipped shares, mean and median over heads of the ratios of means, ratio of sums.
        """
        ratios = self.shares["ratio of means"][part]
        return {
            "clipped": self.shares["clipped"][part].mean((0, 1)),
            "unclipped mean": ratios.mean((0, 1)),
            "median": ratios.map(lambda drawn: np.median(drawn, axis=(0, 1))),
            "ratio of means": self.means.restored([part]),
        }

    def floor(self, part: str) -> dict[str, Estimate]:
        """The floor of a part's clipped share, mean over heads, by its name; none of released tables."""
        return {FLOOR: self.floors[part].mean((0, 1))} if self.floors else {}

    def above_floor(self, part: str) -> Estimate:
        """A part's clipped share less its floor, mean over all heads."""
        return (self.shares["clipped"][part] - self.floors[part]).mean((0, 1))

    def second_to_last(self, part: str) -> Estimate:
        """Mean over the heads of the second-to-last layer of mean repair over mean direct effect, unclipped.

        For the final norm this is the number that the authors' code prints. The only layer, if there is one.
        """
        ratios = self.shares["ratio of means"][part]
        return ratios[max(0, len(ratios) - 2)].mean()

    def without_repair(self, part: str) -> dict[str, Estimate]:
        """Of all heads, those whose mean repair by a part is not above 0.

        ``heads``: how many there are (share); ``clipped share``, ``floor``: means over just these.
        """
        repair = self.means.logits[part]

        def among_them(share: Estimate) -> Estimate:
            return share.map(lambda s, r: np.where(r <= 0, s, np.nan), repair).nanmean((0, 1))

        return {
            "heads": repair.map(lambda r: (r <= 0).mean((0, 1))),
            "clipped share": among_them(self.shares["clipped"][part]),
            **({"floor": among_them(self.floors[part])} if self.floors else {}),
        }


def table_of(found: Mapping[str, Mapping[str, Estimate]], name: str) -> pd.DataFrame:
    """``model, <name>, estimate, low, high``, of models' estimates by that name."""
    tables = [
        estimate.table({}, model=model, **{name: of_what})
        for model, estimates in found.items()
        for of_what, estimate in estimates.items()
    ]
    return pd.concat(tables, ignore_index=True)


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """The estimates of :func:`table_of`: a row for each model, a column for each name, in its order."""
    name = table.columns[1]
    found = table.pivot(index="model", columns=name, values="estimate")
    return found.loc[table["model"].unique(), table[name].unique()]


def _column(table: pd.DataFrame, name: str) -> Estimate:
    """A column of one model's heads table, ``[layer, head]``."""
    ordered = table.sort_values(["layer", "head"])
    return Estimate.bare(ordered[name].to_numpy().reshape(table["layer"].nunique(), table["head"].nunique()))


def _medians(
    ratio: Float[np.ndarray, "layer head prompt position"],
    defined: Bool[np.ndarray, "layer head prompt position"],
    weights: Float[np.ndarray, "draw prompt"],
) -> Float[np.ndarray, "layer head draw"]:
    """Median over each head's tokens, a token counted as often as its prompt is drawn.

    Of two middle values the lower one.
    """
    medians = np.full((*ratio.shape[:2], len(weights)), np.nan)
    for layer, head in np.ndindex(ratio.shape[:2]):
        prompts, _ = here = np.nonzero(defined[layer, head])
        values = ratio[layer, head][here]
        order = np.argsort(values, kind="stable")
        if len(order):
            middle, total = _middles(prompts[order], weights)
            medians[layer, head] = np.where(total > 0, values[order][middle], np.nan)
    return medians


def _middles(
    prompts: Int[np.ndarray, " token"], weights: Float[np.ndarray, "draw prompt"]
) -> tuple[Int[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """In each draw, the first token with half of the weight up to it, and the whole weight.

    The block of tokens that it lies in is found first: tokens are many, and so are draws.
    """
    starts = np.arange(0, len(prompts), BLOCK)
    counts = np.zeros((len(starts), weights.shape[1]))
    np.add.at(counts, (np.arange(len(prompts)) // BLOCK, prompts), 1)
    until = np.cumsum(weights @ counts.T, axis=1)
    half = until[:, -1:] / 2
    block = np.argmax(until >= half, axis=1)
    before = np.where(block > 0, until[np.arange(len(weights)), block - 1], 0)[:, None]
    tokens = np.minimum(starts[block][:, None] + np.arange(BLOCK), len(prompts) - 1)
    within = before + np.cumsum(np.take_along_axis(weights, prompts[tokens], axis=1), axis=1)
    return starts[block] + np.argmax(within >= half, axis=1), until[:, -1]
