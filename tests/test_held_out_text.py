"""The prose that the default profile measures on: enough of it, varied, and no passage a copy of another."""

import re
from collections import Counter

from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.text.corpora import read_documents

FILES = sorted(HELD_OUT_TEXT.glob("*.txt"))
PASSAGES = read_documents(HELD_OUT_TEXT)
WORDS = [re.findall(r"[a-z0-9']+", passage.lower()) for passage in PASSAGES]


def grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_amount():
    assert len(FILES) >= 8
    assert len(PASSAGES) >= 200
    assert sum(len(passage.encode()) for passage in PASSAGES) >= 110_000
    assert min(len(passage.split()) for passage in PASSAGES) >= 150
    for file in FILES:
        assert len(read_documents(file)) >= 20, file


def test_no_passage_repeats_another():
    seen: dict[tuple[str, ...], int] = {}
    for i, words in enumerate(WORDS):
        for gram in grams(words, 12):
            assert seen.setdefault(gram, i) == i, gram


def test_passages_share_at_most_two_8_grams():
    owners: dict[tuple[str, ...], set[int]] = {}
    for i, words in enumerate(WORDS):
        for gram in grams(words, 8):
            owners.setdefault(gram, set()).add(i)
    shared = Counter((a, b) for found in owners.values() for a in found for b in found if a < b)
    assert all(count <= 2 for count in shared.values()), shared


def test_openings_vary():
    openings = Counter(tuple(words[:3]) for words in WORDS)
    assert openings.most_common(1)[0][1] <= 2
    assert Counter(words[0] for words in WORDS).most_common(1)[0][1] <= len(WORDS) // 8


def test_notice():
    assert "CC0" in (HELD_OUT_TEXT / "README.md").read_text()
