"""Which later heads write more once a head is ablated: growth of pairs of heads, and what such pairs share.

Pairs are of an ablated head and a head of a later layer. *Growth* is the mean change (logits) of the later
head's direct effect on the ablated head's top tokens, and as control on tokens where that head hardly
matters. Where pairs are chosen by their growth, prompts of even number choose and those of odd number are
read, so that noise does not look like repair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from selfrepair.analysis.estimates import Estimate, draws
from selfrepair.statistics import CONTROL, TOP

#: The pairs that grow most: this share of all.
STRONGEST = 0.1


@dataclass(frozen=True)
class PairGrowth:
    """Of one model; pairs in order of layer and head, of the ablated head first.

    ``ablated`` and ``later [pair]`` are numbers of heads, counted through all layers; ``sums`` are what the
    measurement ``head_growth`` has, by selection of tokens; ``effects`` are sums of clean direct effects on
    the ablated head's top tokens: the later head's and the ablated head's own.
    """

    model: str
    n_layers: int
    n_heads: int
    ablated: Int[np.ndarray, " pair"]
    later: Int[np.ndarray, " pair"]
    sums: dict[str, Float[np.ndarray, "pair prompt"]]
    counts: dict[str, Float[np.ndarray, "any_head prompt"]]
    effects: tuple[Float[np.ndarray, "pair prompt"], Float[np.ndarray, "any_head prompt"]]
    is_even: Bool[np.ndarray, " prompt"]
    n_bootstrap: int = 400

    @classmethod
    def of(cls, grown: xr.Dataset, n_bootstrap: int = 400) -> PairGrowth:
        n_layers, n_heads = grown.sizes["layer"], grown.sizes["head"]
        n, n_prompts = n_layers * n_heads, grown.sizes["prompt"]
        layer = np.arange(n) // n_heads
        ablated, later = np.nonzero(layer[:, None] < layer)
        growth = grown["growth"].values.reshape(-1, n, n, n_prompts)
        effects = grown["clean_effect"].values.reshape(n, n, n_prompts)
        count = grown["count"].values.reshape(-1, n, n_prompts).astype(np.float64)
        selections = grown.attrs["selections"]
        return cls(
            model=str(grown.attrs["model"]),
            n_layers=n_layers,
            n_heads=n_heads,
            ablated=ablated,
            later=later,
            sums={name: growth[i][ablated, later] for i, name in enumerate(selections)},
            counts={name: count[i] for i, name in enumerate(selections)},
            effects=(effects[ablated, later], effects[np.arange(n), np.arange(n)]),
            is_even=grown["prompt"].values % 2 == 0,
            n_bootstrap=n_bootstrap,
        )

    @property
    def layers_apart(self) -> Int[np.ndarray, " pair"]:
        return self.later // self.n_heads - self.ablated // self.n_heads

    @property
    def n_strongest(self) -> int:
        """How many pairs the strongest tenth has."""
        return int(np.ceil(STRONGEST * len(self.later)))

    def names(self, heads: Int[np.ndarray, " some"]) -> list[str]:
        """``L3H5``."""
        return [f"L{head // self.n_heads}H{head % self.n_heads}" for head in heads]

    def growth(
        self, weights: Float[np.ndarray, " prompt"], selection: str = TOP
    ) -> Float[np.ndarray, " pair"]:
        """Mean growth of every pair when prompts count so often; NaN where none of them has tokens."""
        total = (self.counts[selection] @ weights)[self.ablated]
        sums = self.sums[selection] @ weights
        return np.divide(sums, total, out=np.full(len(total), np.nan), where=total > 0)

    def draws(self) -> Float[np.ndarray, "draw prompt"]:
        """Of all prompts."""
        return draws(len(self.is_even), self.n_bootstrap)

    def draws_of_half(self, even: bool) -> Float[np.ndarray, "draw prompt"]:
        """Of prompts of even or of odd number; the others count for nothing."""
        weights = np.zeros((1 + self.n_bootstrap, len(self.is_even)))
        chosen = self.is_even == even
        weights[:, chosen] = draws(int(chosen.sum()), self.n_bootstrap, seed=int(even))
        return weights

    @cached_property
    def chosen_by(self) -> Float[np.ndarray, " pair"]:
        """Growth on prompts of even number; 0 where there are no tokens, so that noise is not chosen."""
        return np.nan_to_num(self.growth(self.draws_of_half(even=True)[0]))

    def matrix(self, selection: str = TOP) -> Float[np.ndarray, "any_head any_head"]:
        """Mean growth over all prompts, by ablated and by later head; NaN where the other is not later."""
        n = self.n_layers * self.n_heads
        found = np.full((n, n), np.nan)
        found[self.ablated, self.later] = self.growth(np.ones(len(self.is_even)), selection)
        return found

    def strongest(self) -> Bool[np.ndarray, " pair"]:
        """The tenth of the pairs that grow most, on prompts of even number."""
        return _largest(self.chosen_by, self.n_strongest)

    def largest(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The pair that grows most over all prompts: layer and head of the ablated head, and of the other."""
        pair = np.nanargmax(self.growth(np.ones(len(self.is_even))))
        ablated, later = (divmod(int(heads[pair]), self.n_heads) for heads in (self.ablated, self.later))
        return ablated, later

    def share_of_strongest(self) -> Estimate:
        """Of the positive growth, what :meth:`strongest` carries: signs chosen as they are, growth read."""
        return self._total(self.strongest()) / self._total(self.chosen_by > 0)

    def net(self) -> Estimate:
        """Growth of all pairs over the positive growth: below 0 where later heads write less in all."""
        return self._total(np.ones(len(self.later), dtype=bool)) / self._total(self.chosen_by > 0)

    def by_erasers(self) -> tuple[Estimate, float]:
        """Of the growth of :meth:`strongest`, the share of later heads that lower the token in the clean run.

        Such a head grows by lowering it less. Beside it how many of all pairs have such a later head; both
        by effects on prompts of even number.
        """
        lowers = self.effects[0] @ self.draws_of_half(even=True)[0] < 0
        strongest = self.strongest()
        return self._total(strongest & lowers) / self._total(strongest), float(lowers.mean())

    def if_gaussian(self, shares: Float[np.ndarray, " share"]) -> Estimate:
        """What these shares of the pairs, those that grow most, carry of the positive growth by chance.

        Growth is Gaussian around 0, as large for each ablated head as it is, whatever the later head. That
        which chooses has variance ``τ²``, its mean square; its covariance ``κ`` with the growth that is read
        is without noise. Of the pairs, ``1 − Φ(t/τ)`` lie above ``t``, and carry ``κ/τ φ(t/τ)``.
        """
        n = self.n_layers * self.n_heads
        n_pairs = np.bincount(self.ablated, minlength=n)
        spread = np.sqrt(np.bincount(self.ablated, self.chosen_by**2, n) / np.maximum(n_pairs, 1))
        covariance = np.zeros((n, 1 + self.n_bootstrap))
        np.add.at(covariance, self.ablated, self.chosen_by[:, None] * self._read())
        some = spread > 0
        normal = NormalDist()

        def above(thresholds: Float[np.ndarray, " share"]) -> Float[np.ndarray, " share"]:
            below = [[normal.cdf(t / of_head) for of_head in spread[some]] for t in thresholds]
            return (1 - np.array(below)) @ n_pairs[some] / len(self.later)

        high = np.full(len(shares), 10 * np.abs(self.chosen_by).max())
        low = -high
        for _ in range(60):  # halves the bracket of each threshold
            middle = (low + high) / 2
            is_low = above(middle) > shares
            low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
        of_head = covariance[some] / spread[some, None]
        density = np.exp(-((low[:, None] / spread[some]) ** 2) / 2)  # against that at 0
        return Estimate(density @ of_head) / Estimate(of_head.sum(0))

    def share_if_gaussian(self) -> Estimate:
        """:meth:`share_of_strongest`, were growth as in :meth:`if_gaussian`."""
        return self.if_gaussian(np.array([self.n_strongest / len(self.later)]))[0]

    def heads_for_half(self) -> int:
        """How many ablated heads have half of the positive growth, those first after which others grow most.

        Their order and the signs of growth by prompts of even number, growth by those of odd number.
        """
        n, positive = self.n_layers * self.n_heads, self.chosen_by > 0
        chosen, read = (
            np.bincount(self.ablated[positive], growth[positive], n)
            for growth in (self.chosen_by, self._read()[:, 0])
        )
        reached = np.cumsum(read[np.argsort(-chosen, kind="stable")])
        return 1 + int(np.argmax(reached >= reached[-1] / 2))

    def _read(self, selection: str = TOP) -> Float[np.ndarray, "pair draw"]:
        """Growth of every pair on prompts of odd number; 0 where none has tokens."""
        weights = self.draws_of_half(even=False).T
        counts = (self.counts[selection] @ weights)[self.ablated]
        sums = self.sums[selection] @ weights
        return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)

    def _total(self, chosen: Bool[np.ndarray, " pair"], selection: str = TOP) -> Estimate:
        """Growth of the chosen pairs together, on prompts of odd number."""
        weights = self.draws_of_half(even=False).T
        n = self.n_layers * self.n_heads
        sums = np.zeros((n, len(self.is_even)))
        np.add.at(sums, self.ablated[chosen], self.sums[selection][chosen])
        counts = self.counts[selection] @ weights
        means = np.divide(sums @ weights, counts, out=np.zeros_like(counts), where=counts > 0)
        return Estimate(means.sum(0))

    def cumulative(self, selection: str = TOP) -> Estimate:
        """``[pair]``: growth of the 1, 2, 3 … pairs that grow most, over the positive growth on top tokens.

        Their order by prompts of even number, growth by those of odd number, which samples draw.
        """
        chosen = np.nan_to_num(self.growth(self.draws_of_half(even=True)[0], selection))
        read = Estimate(self._read(selection)[np.argsort(-chosen, kind="stable")])
        return read.map(lambda growth: growth.cumsum(0)) / self._total(self.chosen_by > 0)

    def resemblance(self, cosine: Float[np.ndarray, "any_head any_head"]) -> tuple[Estimate, Estimate]:
        """Mean cosine of the tenth of the pairs that grow most, and of the other heads of the same layer.

        The latter are with the same ablated head, so that layers count for nothing; NaN where layers have one
        head. ``cosine`` are means over all tokens; samples draw the prompts that say which pairs are chosen
        (:func:`_centred`).
        """
        of_pairs = cosine[self.ablated, self.later]
        of_layer = cosine.reshape(len(cosine), -1, self.n_heads).sum(-1)
        n_others = self.n_heads - 1 or np.nan
        of_others = (of_layer[self.ablated, self.later // self.n_heads] - of_pairs) / n_others
        found = []
        for weights in self.draws():
            chosen = _largest(np.nan_to_num(self.growth(weights)), self.n_strongest)
            found.append([of_pairs[chosen].mean(), of_others[chosen].mean()])
        return _centred(found)

    def shared(self, selection: str = TOP) -> tuple[Estimate, Estimate]:
        """Rank correlation of a later layer's growth after different heads of one layer, and after the same.

        One head's growth is of the chosen half of the prompts, the other's of the half that is read; the
        second says how far a head's growth repeats. Means over pairs of heads and later layers; samples as
        :func:`_centred` has them.
        """
        weights = zip(self.draws_of_half(even=True), self.draws_of_half(even=False), strict=True)
        return _centred([self._rank_correlations(selection, *pair) for pair in weights])

    def _rank_correlations(
        self, selection: str, one: Float[np.ndarray, " prompt"], other: Float[np.ndarray, " prompt"]
    ) -> list[float]:
        shape = (self.n_layers, self.n_heads, self.n_layers, self.n_heads)
        growths = []
        for weights in (one, other):
            matrix = np.full((self.n_layers * self.n_heads,) * 2, np.nan)
            matrix[self.ablated, self.later] = self.growth(weights, selection)
            growths.append(_standard_ranks(matrix.reshape(shape)))
        # correlation [layer, head, other head, later layer]
        found = np.einsum("ahlg,ailg->ahil", *growths) / self.n_heads
        is_same = np.eye(self.n_heads, dtype=bool)
        return [_mean_of_known(values) for values in (found[:, ~is_same], found[:, is_same])]

    def table(self) -> pd.DataFrame:
        """A row for each pair, the strongest growth first, with 95% intervals over prompts.

        ``model, ablated, later, growth, low, high, control, control_low, control_high, later_effect`` (the
        later head's clean direct effect), ``chosen_by`` (growth on prompts of even number alone), ``read,
        read_low, read_high`` (on those of odd number), and ``share`` (``read`` over the ablated head's clean
        direct effect on the same tokens).
        """
        known = np.maximum(self.counts[TOP].sum(1), 1)
        found = {
            "model": self.model,
            "ablated": self.names(self.ablated),
            "later": self.names(self.later),
            **self._intervals(TOP, self.draws(), ("growth", "low", "high")),
        }
        found |= self._intervals(CONTROL, self.draws(), ("control", "control_low", "control_high"))
        found["later_effect"] = self.effects[0].sum(1) / known[self.ablated]
        found["chosen_by"] = self.chosen_by
        odd = self.draws_of_half(even=False)
        found |= self._intervals(TOP, odd, ("read", "read_low", "read_high"))
        own = Estimate.bare(self.effects[1] @ odd[0]) / Estimate.bare(self.counts[TOP] @ odd[0])
        found["share"] = (Estimate.bare(np.asarray(found["read"])) / own[self.ablated]).value
        return pd.DataFrame(found).sort_values("growth", ascending=False, ignore_index=True)

    def _intervals(
        self, selection: str, weights: Float[np.ndarray, "draw prompt"], names: Sequence[str]
    ) -> dict[str, Float[np.ndarray, " pair"]]:
        """Growth of every pair and the ends of its interval, by these names."""
        bounds = np.hstack(list(self._bounds(selection, weights.T)))
        return dict(zip(names, bounds, strict=True))

    def _bounds(
        self, selection: str, weights: Float[np.ndarray, "prompt draw"]
    ) -> Iterator[Float[np.ndarray, "bound pair"]]:
        """The same for the pairs of one ablated head after the other."""
        for head in dict.fromkeys(self.ablated.tolist()):
            sums = Estimate(self.sums[selection][self.ablated == head] @ weights)
            mean = sums / Estimate(self.counts[selection][head] @ weights)
            yield np.stack([mean.value, *mean.interval()])


def all_pairs(found: Sequence[PairGrowth]) -> pd.DataFrame:
    """:meth:`PairGrowth.table` of several models, one under the other."""
    return pd.concat([one.table() for one in found], ignore_index=True)


def _largest(values: Float[np.ndarray, " pair"], n: int) -> Bool[np.ndarray, " pair"]:
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[:n]] = True
    return chosen


def _centred(drawn: Sequence[Sequence[float]]) -> tuple[Estimate, Estimate]:
    """Two estimates from their draws, the value first; samples are moved so that their mean is the value.

    A sample of prompts is drawn from a sample, so that order is noisier in it than it is: pairs that are
    chosen by it are more like any others, and correlations of ranks are smaller. So samples lie around
    another value than the estimate, which may be none of the middle 95%, and the plain interval would be of
    that. Their spread is kept, and samples of each of the two are moved onto its own value.
    """
    values = np.array(drawn, dtype=np.float64).T
    values[:, 1:] += (values[:, 0] - np.nanmean(values[:, 1:], axis=1))[:, None]
    own, other = values
    return Estimate(own), Estimate(other)


def _standard_ranks(values: Float[np.ndarray, "*what head"]) -> Float[np.ndarray, "*what head"]:
    """Ranks along the last axis, of mean 0 and variance 1; NaN where values are not known."""
    ranks = values.argsort(-1).argsort(-1).astype(np.float64)
    n = values.shape[-1]
    spread = np.sqrt((n**2 - 1) / 12) if n > 1 else np.nan
    return np.where(np.isnan(values), np.nan, (ranks - (n - 1) / 2) / spread)


def _mean_of_known(values: Float[np.ndarray, "*what"]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else np.nan
