from collections import Counter

import numpy as np
import pytest

from selfrepair.training.ngrams import KneserNeyTrigram, unigram_loss

V = 6
ROWS = np.random.default_rng(0).integers(1, V, size=(30, 9)) ** 2 % V  # uneven token frequencies
ROWS[:, 0] = 0


def slow_probability(history, token):
    """Interpolated Kneser–Ney straight from the definition, with dictionaries."""
    rows = ROWS.tolist()
    trigrams = Counter(tuple(r[i : i + 3]) for r in rows for i in range(len(r) - 2))
    bigrams = {tuple(r[i : i + 2]) for r in rows for i in range(len(r) - 1)}
    bigram_continuation = Counter((b, c) for _, b, c in trigrams)
    unigram_continuation = Counter(c for _, c in bigrams)
    starts = Counter(tuple(r[:2]) for r in rows)

    def interpolated(counts, context, lower):
        ones, twos = (sum(1 for n in counts.values() if n == k) for k in (1, 2))
        discount = ones / (ones + 2 * twos) if ones else 0.0
        here = {gram: n for gram, n in counts.items() if gram[:-1] == context}
        total = sum(here.values())
        if not total:
            return lower
        return (max(here.get((*context, token), 0) - discount, 0) + discount * len(here) * lower) / total

    uniform = interpolated({(c,): n for c, n in unigram_continuation.items()}, (), 1 / V)
    if len(history) == 1:
        return interpolated(starts, tuple(history), uniform)
    return interpolated(trigrams, tuple(history), interpolated(bigram_continuation, (history[1],), uniform))


def test_equals_the_definition():
    model = KneserNeyTrigram(ROWS, V)
    probe = np.concatenate([ROWS[:4], np.random.default_rng(1).integers(0, V, size=(6, 9))])
    probe[:, 0] = 0
    probabilities = model.probabilities(probe)
    for row, found in zip(probe.tolist(), probabilities, strict=True):
        for i in range(1, len(row)):
            assert found[i - 1] == pytest.approx(slow_probability(row[max(0, i - 2) : i], row[i]), abs=1e-12)


def test_sums_to_one():
    model = KneserNeyTrigram(ROWS, V)
    probe = np.array([[0, b, c] for b in range(V) for c in range(V)])
    probabilities = model.probabilities(probe)
    assert probabilities[::V, 0].sum() == pytest.approx(1)
    assert probabilities[:, 1].reshape(V, V).sum(1) == pytest.approx(np.ones(V))


def test_loss_is_the_mean_negative_log_probability():
    model = KneserNeyTrigram(ROWS, V)
    assert model.loss(ROWS) == pytest.approx(-np.log(model.probabilities(ROWS)).mean())
    assert model.loss(ROWS) < np.log(V)


def test_unigram():
    counts = Counter(ROWS[:, 1:].ravel().tolist())
    total = sum(counts.values()) + V
    expected = [-np.log((counts[token] + 1) / total) for token in ROWS[:3, 1:].ravel().tolist()]
    assert unigram_loss(ROWS, ROWS[:3], V) == pytest.approx(np.mean(expected))
