"""Prompts that ask for a fact which the model answers: what its layers are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr
from jaxtyping import Int

from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.text.facts import FactPrompts, choose_prompts, facts_for, facts_identity

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Stands behind the last token of a prompt that is shorter than the longest.
PADDING = -1


class Facts(Measurement):
    """``token [prompt, token_position]`` padded with -1, ``length``, ``answer`` (first token) and ``group``
    ``[prompt]``.

    Prompts of one ``group`` are of one length and run together. Attributes: lists of ``texts``, ``answers``,
    ``relations`` and ``phrasings``, one for each prompt, and the numbers ``n_asked``, ``n_answered`` and
    ``n_alone`` of :class:`selfrepair.text.facts.FactPrompts`. McGrath et al. 2023, §2.2.
    """

    name: ClassVar[str] = "facts"
    uses: ClassVar[tuple[str, ...]] = ("model_name", "dtype", "facts", "n_facts", "seed")

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return ()

    def fingerprint(self, settings: Settings) -> dict[str, object]:
        return facts_identity(str(settings["model_name"]), settings["facts"])

    def shards(self, settings: Settings) -> Sequence[int]:
        return [0]

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        facts = facts_for(str(settings["model_name"]), settings["facts"])
        return of_facts(choose_prompts(model, facts, int(settings["n_facts"]), int(settings["seed"])))


MEASUREMENT = Facts()


def of_facts(prompts: FactPrompts) -> xr.Dataset:
    """Prompts as this measurement gives them."""
    length = np.array([len(tokens) for tokens in prompts.tokens])
    token = np.full((len(length), length.max()), PADDING)
    group = np.empty_like(length)
    for i, tokens in enumerate(prompts.tokens):
        token[i, : length[i]] = tokens
    for number, members in enumerate(prompts.groups):
        group[members] = number
    return xr.Dataset(
        {
            "token": (("prompt", "token_position"), token),
            "length": ("prompt", length),
            "answer": ("prompt", prompts.answers),
            "group": ("prompt", group),
        },
        coords={"prompt": np.arange(len(length))},
        attrs={
            "texts": [fact.text for fact in prompts.facts],
            "answers": [fact.answer for fact in prompts.facts],
            "relations": [fact.relation for fact in prompts.facts],
            "phrasings": [fact.phrasing for fact in prompts.facts],
            "n_asked": prompts.n_asked,
            "n_answered": prompts.n_answered,
            "n_alone": prompts.n_alone,
        },
    )


@dataclass(frozen=True)
class PromptGroup:
    """Prompts of one length that run together: their numbers, in order, and tokens."""

    prompts: Int[np.ndarray, " prompt"]
    tokens: Int[np.ndarray, "prompt position"]


def prompt_groups(facts: xr.Dataset) -> list[PromptGroup]:
    """The groups of a data set as :class:`Facts` gives it, in order."""
    group, token = facts["group"].values, facts["token"].values
    groups = []
    for number in range(group.max() + 1):
        members = np.flatnonzero(group == number)
        length = int(facts["length"].values[members[0]])
        groups.append(PromptGroup(members, token[members, :length]))
    return groups
