"""Sets of neurons, one for each token: how much those of two tokens overlap, how often a neuron is in one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from selfrepair.analysis.estimates import Estimate

#: Pairs of tokens × neurons of a set that are compared at a time.
COMPARED_AT_ONCE = 20_000_000


@dataclass(frozen=True)
class NeuronSets:
    """A set of neurons for each token, in some order, of ``n_neurons``; and the token's prompt."""

    prompt: Int[np.ndarray, " token"]
    neurons: Int[np.ndarray, "token set"]
    n_neurons: int

    def frequencies(self, size: int = 10) -> Float[np.ndarray, " neuron"]:
        """Share of tokens on which a neuron is among the first ``size``; most frequent neuron first."""
        counts = np.bincount(self.neurons[:, :size].ravel(), minlength=self.n_neurons)
        return np.sort(counts)[::-1] / len(self.neurons)

    def random_frequencies(self, size: int = 10, n_samples: int = 200) -> Float[np.ndarray, " neuron"]:
        """The same, expected of as many random sets (simulated, seeded)."""
        size = min(size, self.neurons.shape[1])
        drawn = np.random.default_rng(0).binomial(
            len(self.neurons), size / self.n_neurons, (n_samples, self.n_neurons)
        )
        return np.sort(drawn)[:, ::-1].mean(0) / len(self.neurons)


def chance_overlap(n_neurons: int, size: int) -> float:
    """Expected Jaccard overlap of two independent random sets of ``size`` neurons (hypergeometric)."""
    ways = [
        math.comb(size, common) * math.comb(n_neurons - size, size - common) for common in range(size + 1)
    ]
    return sum(n * common / (2 * size - common) for common, n in enumerate(ways)) / math.comb(n_neurons, size)


def pair_overlaps(one: NeuronSets, other: NeuronSets, n_prompts: int) -> Float[np.ndarray, "2 prompt prompt"]:
    """Jaccard overlaps of the sets of tokens of ``one`` with those of tokens of ``other`` in another prompt.

    By the two tokens' prompts: the sum over all such pairs, and their number.
    """
    belongs = np.eye(n_prompts)[other.prompt]
    total = np.zeros((n_prompts, n_prompts))
    at_once = max(1, COMPARED_AT_ONCE // max(1, other.neurons.size))
    for start in range(0, len(one.neurons), at_once):
        here = slice(start, start + at_once)
        member = np.zeros((len(one.neurons[here]), one.n_neurons), dtype=bool)
        np.put_along_axis(member, one.neurons[here], True, axis=1)
        common = member[:, other.neurons].sum(-1)
        np.add.at(total, one.prompt[here], common / (2 * one.neurons.shape[1] - common) @ belongs)
    number = np.multiply.outer(*(np.bincount(of, minlength=n_prompts) for of in (one.prompt, other.prompt)))
    return np.stack([total, number]) * (1 - np.eye(n_prompts))


def mean_overlap(
    pairs: Float[np.ndarray, "2 prompt prompt"], weights: Float[np.ndarray, "draw prompt"]
) -> Estimate:
    """Mean overlap; a pair counts as often as the product of its prompts' draws; NaN without pairs."""
    total, number = (Estimate(((weights @ by_prompt) * weights).sum(1)) for by_prompt in pairs)
    return total / number
