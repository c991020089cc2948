"""An invented world whose facts the pocket models are trained on, so that recall has a known ground truth.

The world is made from a seed with :class:`random.Random` and integer draws only, from lists in a
fixed order: the same seed gives the same text on every platform. Six relations are *functional*:
each subject has exactly one object. Every relation has phrasings that occur in training text and
phrasings that never do (held out), so that recall can be told from repetition.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from selfrepair.text.world import (
    DISH_ENDINGS,
    DISH_STARTS,
    FILLERS,
    FIRST_NAMES,
    GOODS,
    INGREDIENTS,
    RELATIONS,
    RIVER_ENDINGS,
    RIVER_STARTS,
    SEAS,
    SURNAME_ENDINGS,
    SURNAME_STARTS,
    TOWN_ENDINGS,
    TOWN_ROOTS,
    TRADES,
)


@dataclass(frozen=True)
class Fact:
    """One true statement of the world: ``relation`` holds between ``subject`` and ``object``."""

    relation: str
    subject: str
    object: str


@dataclass(frozen=True)
class FactPrompt:
    """A prompt that ends right before the answer.

    ``answer`` begins with the space that a byte-level tokenizer joins to the word, so that the
    correct next token is the first token of ``answer``.
    """

    fact: Fact
    phrasing: int
    held_out: bool
    text: str
    answer: str


def _capitalise(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


class Gazetteer:
    """The invented world of one seed: entities, facts, training paragraphs and prompts."""

    def __init__(
        self, seed: int = 0, n_towns: int = 90, n_people: int = 110, n_rivers: int = 40, n_dishes: int = 40
    ):
        rng = random.Random(seed)
        self.seed = seed
        self.entities: dict[str, tuple[str, ...]] = {
            "town": _combine(rng, TOWN_ROOTS, TOWN_ENDINGS, n_towns),
            "river": _combine(rng, RIVER_STARTS, RIVER_ENDINGS, n_rivers),
            "dish": _combine(rng, DISH_STARTS, DISH_ENDINGS, n_dishes),
            "person": tuple(
                f"{FIRST_NAMES[i % len(FIRST_NAMES)]} {surname}"
                for i, surname in enumerate(_combine(rng, SURNAME_STARTS, SURNAME_ENDINGS, n_people))
            ),
            "trade": TRADES,
            "goods": GOODS,
            "ingredient": INGREDIENTS,
            "sea": SEAS,
        }
        self.facts: tuple[Fact, ...] = tuple(
            Fact(relation.name, subject, answer)
            for relation in RELATIONS
            for subject, answer in zip(
                self.entities[relation.subject_kind],
                _deal(rng, self.entities[relation.object_kind], len(self.entities[relation.subject_kind])),
                strict=True,
            )
        )
        self._facts_of: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self._facts_of.setdefault(fact.subject, []).append(fact)

    def paragraphs(self, seed: int = 0, n_phrasings: int = 16) -> Iterator[str]:
        """Endless short paragraphs of training text; every subject comes up equally often.

        Each states all facts of one or two subjects, each in a phrasing drawn from the first
        ``n_phrasings`` trained ones, with sentences between them that carry no fact. Held-out
        phrasings never occur.
        """
        rng = random.Random(f"{self.seed}/{seed}")
        kinds = {subject: kind for kind in FILLERS for subject in self.entities[kind]}
        relations = {relation.name: relation for relation in RELATIONS}
        while True:
            subjects = list(self._facts_of)
            _shuffle(rng, subjects)
            while subjects:
                paragraph: list[str] = []
                for subject in [subjects.pop() for _ in range(min(1 + rng.randrange(2), len(subjects)))]:
                    sentences = [
                        _pick(rng, relations[fact.relation].trained[:n_phrasings]).format(
                            s=fact.subject, o=fact.object
                        )
                        for fact in self._facts_of[subject]
                    ]
                    _shuffle(rng, sentences)
                    if rng.randrange(2):
                        place = rng.randrange(len(sentences) + 1)
                        sentences.insert(place, _pick(rng, FILLERS[kinds[subject]]))
                    paragraph += map(_capitalise, sentences)
                yield " ".join(paragraph)

    def prompts(self) -> list[FactPrompt]:
        """Every fact in every phrasing: ``2 · 6`` relations' worth held out, the others trained."""
        relations = {relation.name: relation for relation in RELATIONS}
        found = []
        for fact in self.facts:
            relation = relations[fact.relation]
            for number, phrasing in enumerate(relation.trained + relation.held_out):
                before, _, _ = phrasing.partition("{o}")
                text = _capitalise(before.format(s=fact.subject)).rstrip()
                held_out = number >= len(relation.trained)
                found.append(FactPrompt(fact, number, held_out, text, f" {fact.object}"))
        return found


def _pick(rng: random.Random, items: Sequence[str]) -> str:
    return items[rng.randrange(len(items))]


def _shuffle(rng: random.Random, items: list[str]) -> None:
    for i in range(len(items) - 1, 0, -1):
        j = rng.randrange(i + 1)
        items[i], items[j] = items[j], items[i]


def _combine(
    rng: random.Random, starts: Sequence[str], endings: Sequence[str], count: int
) -> tuple[str, ...]:
    names = [start + ending for start in starts for ending in endings]
    if not 0 < count <= len(names):
        raise ValueError(f"{count} names asked of {len(names)} that can be formed")
    _shuffle(rng, names)
    return tuple(names[:count])


def _deal(rng: random.Random, answers: Sequence[str], count: int) -> list[str]:
    """``count`` answers, each of ``answers`` about equally often, in random order."""
    dealt = [answers[i % len(answers)] for i in range(count)]
    _shuffle(rng, dealt)
    return dealt
