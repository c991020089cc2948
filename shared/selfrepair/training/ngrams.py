"""Unigram and Kneser–Ney trigram models: the bars that a trained transformer has to pass."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Integer, Shaped


def unigram_loss(
    training: Integer[np.ndarray, "training_row position"],
    rows: Integer[np.ndarray, "row position"],
    vocab_size: int,
) -> float:
    """Mean cross-entropy (nats per predicted token) of ``rows`` under add-one token frequencies of
    ``training``."""
    counts = np.bincount(training[:, 1:].ravel(), minlength=vocab_size) + 1
    return float(-np.log(counts / counts.sum())[rows[:, 1:]].mean())


class KneserNeyTrigram:
    """Interpolated Kneser–Ney (Kneser & Ney 1995; Chen & Goodman 1999, §4.1.6), one discount per order.

    Trained on rows of tokens that each begin with BOS; no n-gram spans two rows. The discount of an
    order is ``n1 / (n1 + 2 n2)`` with its numbers of n-grams seen once and twice. Below the highest
    order, counts are numbers of distinct left contexts; n-grams that begin a row have none before
    them and keep their plain counts.
    """

    def __init__(self, rows: Integer[np.ndarray, "row position"], vocab_size: int):
        self.vocab_size = v = vocab_size
        rows = rows.astype(np.int64)
        trigrams, counts = np.unique(_keys(rows, 3, v), return_counts=True)
        self._order3 = _Order(trigrams, counts, v)
        starts, start_counts = np.unique(rows[:, 0] * v + rows[:, 1], return_counts=True)
        self._start = _Order(starts, start_counts, v)
        bigrams, left_contexts = np.unique(trigrams % (v * v), return_counts=True)
        self._order2 = _Order(bigrams, left_contexts, v)
        all_bigrams = np.unique(_keys(rows, 2, v))
        unigrams, left_contexts = np.unique(all_bigrams % v, return_counts=True)
        order1 = _Order(unigrams, left_contexts, v)
        self._unigram = order1.interpolate(np.arange(v), np.full(v, 1.0 / v))

    def probabilities(self, rows: Integer[np.ndarray, "row position"]) -> Float[np.ndarray, "row position-1"]:
        """Probability of each token after the first, given the one or two before it in its row."""
        rows, v = rows.astype(np.int64), self.vocab_size
        second = rows[:, :-1] * v + rows[:, 1:]
        lower = self._order2.interpolate(second, self._unigram[rows[:, 1:]])
        lower[:, 0] = self._start.interpolate(second[:, 0], self._unigram[rows[:, 1]])
        third = second[:, :-1] * v + rows[:, 2:]
        lower[:, 1:] = self._order3.interpolate(third, lower[:, 1:])
        return lower

    def loss(self, rows: Integer[np.ndarray, "row position"]) -> float:
        """Mean cross-entropy in nats per predicted token."""
        return float(-np.log(self.probabilities(rows)).mean())


class _Order:
    """Discounted counts of one order; an n-gram is the integer ``context · vocab_size + token``."""

    def __init__(self, keys: Int[np.ndarray, " ngram"], counts: Int[np.ndarray, " ngram"], vocab_size: int):
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self.vocab_size = vocab_size
        self.discount = once / (once + 2 * twice) if once else 0.0
        self.keys, self.counts = keys, counts
        self.contexts, inverse = np.unique(keys // vocab_size, return_inverse=True)
        self.context_counts = np.bincount(inverse, weights=counts)
        self.context_types = np.bincount(inverse)

    def interpolate(
        self, keys: Int[np.ndarray, "*wanted"], lower: Float[np.ndarray, "*wanted"]
    ) -> Float[np.ndarray, "*wanted"]:
        """``max(c − D, 0) / c(context) + D · types(context) / c(context) · lower``; ``lower`` where the
        context is new."""
        counts = _look_up(self.keys, self.counts, keys)
        context = keys // self.vocab_size
        total = _look_up(self.contexts, self.context_counts, context)
        types = _look_up(self.contexts, self.context_types, context)
        seen = np.maximum(counts - self.discount, 0) + self.discount * types * lower
        return np.where(total > 0, seen / np.maximum(total, 1), lower)


def _keys(
    rows: Integer[np.ndarray, "row position"], order: int, v: int
) -> Int[np.ndarray, " row*(position-{order}+1)"]:
    """Every n-gram of this order in the rows, as :class:`_Order` has them, row by row."""
    width = rows.shape[1] - order + 1
    keys = np.zeros((rows.shape[0], width), dtype=np.int64)
    for offset in range(order):
        keys = keys * v + rows[:, offset : offset + width]
    return keys.ravel()


def _look_up(
    keys: Int[np.ndarray, " key"], values: Shaped[np.ndarray, " key"], wanted: Int[np.ndarray, "*wanted"]
) -> Shaped[np.ndarray, "*wanted"]:
    """The value of each wanted key, keys being sorted; 0 where there is none."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
