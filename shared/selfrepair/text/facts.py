"""Prompts that ask for a fact, and which of them a model answers: what the Hydra effect is measured on.

McGrath et al. 2023, §2: factual recall, read at the last position of the prompt. Prompts are not padded:
those of one length in tokens are run together. Where layers are ablated at all positions, they are each
other's donors; at the last position alone, donors are of any length.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from jaxtyping import Bool, Int

from selfrepair.errors import NotMeasurable, UserError
from selfrepair.models.checkpoints import model_folder, training_metrics
from selfrepair.text.corpora import first_token
from selfrepair.text.gazetteer import Gazetteer
from selfrepair.text.hub_datasets import dataset_identity, dataset_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selfrepair.models.loading import Model

OWN_FACTS = Path(__file__).with_name("facts.yaml")
#: Prompts that are asked for each one wanted: more, because some are answered wrongly.
ASKED_PER_PROMPT = 3
#: Most prompts of one length that are run together and draw donors from each other.
GROUP = 32
#: Prompts per length below which an amount of prompts is not spread over more lengths.
PER_LENGTH = 5
BATCH = 64
#: What to do without a data set of the hub.
NO_DATASET = "give a local CounterFact .json; without one, facts that ship with the repository are used"


@dataclass(frozen=True)
class AskedFact:
    """A prompt that ends right before its answer; ``answer`` begins with the space that joins it to the
    prompt.

    ``phrasing`` is ``trained`` or ``held out`` for planted facts, else where the prompt is from.
    """

    text: str
    answer: str
    relation: str
    phrasing: str


@dataclass(frozen=True)
class FactPrompts:
    """Facts to measure on, their tokens (BOS first) and the first token of each answer.

    ``groups`` are indices of prompts of one length. ``n_asked`` were drawn, ``n_answered`` of them answered
    correctly (all, where wrong answers are kept too), and ``n_alone`` dropped for want of a second one of
    their length.
    """

    facts: list[AskedFact]
    tokens: list[list[int]]
    answers: Int[np.ndarray, " prompt"]
    groups: list[Int[np.ndarray, " _"]]
    n_asked: int
    n_answered: int
    n_alone: int


def training_config(name: str) -> dict[str, Any] | None:
    """How an embedded model (or a folder trained as they are) was trained; ``None`` for other models."""
    folder = model_folder(name)
    return None if folder is None else training_metrics(folder).get("config")


def trained_without_dropout(model_name: str) -> bool:
    """Whether a model is known to have been trained so, without that of whole heads and layers too."""
    config = training_config(model_name)
    kinds = ("dropout", "head_dropout", "attention_dropout_layer")
    return config is not None and not any(config.get(kind, 0) for kind in kinds)


def facts_for(name: str, source: str | None = None) -> list[AskedFact]:
    """What to ask the model ``name``: ``source`` if given (see :func:`counterfact_facts`), else the facts
    that were planted in its training text, else our own list.

    Raises:
        UserError: as :func:`counterfact_facts`.
    """
    if source is not None:
        return counterfact_facts(source)
    config = training_config(name)
    return own_facts() if config is None else gazetteer_facts(int(config["gazetteer_seed"]))


def facts_identity(name: str, source: str | None = None) -> dict[str, object]:
    """What determines :func:`facts_for`, beside code and the files that come with it.

    Raises:
        UserError: ``source`` is a file that cannot be read, or as
            :func:`~selfrepair.text.hub_datasets.dataset_identity`.
    """
    if source is None:
        config = training_config(name)
        return {"gazetteer_seed": None if config is None else int(config["gazetteer_seed"])}
    if source.endswith(".json"):
        return {"facts_sha256": hashlib.sha256(_read(Path(source))).hexdigest()}
    return {"facts_files": dataset_identity(source, NO_DATASET)}


def own_facts() -> list[AskedFact]:
    """The hand-written list of ``facts.yaml``."""
    relations = yaml.safe_load(OWN_FACTS.read_text(encoding="utf-8"))
    return [
        AskedFact(text, f" {answer}", name, "our own list")
        for name, facts in relations.items()
        for text, answer in facts
    ]


def gazetteer_facts(seed: int) -> list[AskedFact]:
    """The planted facts of one seed, in trained and held-out phrasings."""
    return [
        AskedFact(
            prompt.text, prompt.answer, prompt.fact.relation, "held out" if prompt.held_out else "trained"
        )
        for prompt in Gazetteer(seed).prompts()
    ]


def counterfact_facts(source: str) -> list[AskedFact]:
    """Facts of a local CounterFact ``.json``, or of a data set of the Hugging Face hub with the same fields.

    A record holds ``requested_rewrite`` with ``prompt`` ("{}" stands for the subject), ``subject`` and
    ``target_true: {str: …}``; ``relation_id``, where there is one, is the relation.

    Raises:
        UserError: it cannot be read or has other fields; says which record.
    """
    facts = []
    is_file = source.endswith(".json")
    records = _local_records(Path(source)) if is_file else dataset_rows(source, NO_DATASET, streaming=False)
    for number, record in enumerate(records):
        try:
            rewrite = record["requested_rewrite"]
            text = rewrite["prompt"].format(rewrite["subject"]).rstrip()
            answer = rewrite["target_true"]["str"].strip()
            relation = str(rewrite.get("relation_id", "fact"))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{source}: record {number} is no CounterFact record ({type(error).__name__}: {error})"
            ) from error
        if not text or not answer:
            raise UserError(f"{source}: record {number} has an empty prompt or answer")
        facts.append(AskedFact(text, f" {answer}", relation, "CounterFact"))
    if not facts:
        raise UserError(f"{source}: holds no facts")
    return facts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _local_records(path: Path) -> list[Any]:
    content = _read(path)
    try:
        records = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: must hold a list of CounterFact records")
    return records


def choose_prompts(
    model: Model, facts: Sequence[AskedFact], n_prompts: int, seed: int = 0, only_answered: bool = True
) -> FactPrompts:
    """Up to ``n_prompts`` of the facts, relations and phrasings drawn in turn, for which the first token of
    the answer is the model's most likely next token (or all, if not ``only_answered``).

    Three times as many are asked. Few prompts are kept to the most common lengths, and none that is alone in
    its length, so that each has donors wherever layers are ablated: the prompts are the same everywhere.

    Raises:
        NotMeasurable: fewer than two answered prompts of any one length.
        UserError: ``n_prompts`` below 2, or a tokenizer with nothing to begin prompts with.
    """
    if n_prompts < 2:
        raise UserError(f"n_prompts must be at least 2 (a prompt's donor is another prompt), not {n_prompts}")
    asked = [
        facts[i]
        for i in _in_turn([(fact.relation, fact.phrasing) for fact in facts], seed)[
            : ASKED_PER_PROMPT * n_prompts
        ]
    ]
    tokens, answers = _encode(model.tokenizer, asked)
    usable = (answers >= 0) & np.array([len(ids) <= model.longest_prompt for ids in tokens])
    wanted = usable
    if only_answered:
        wanted = usable & (most_likely(model, tokens, usable) == answers)
    answered = np.flatnonzero(wanted)
    n_answered = len(answered)
    common = Counter(len(tokens[i]) for i in answered).most_common(max(1, n_prompts // PER_LENGTH))
    kept = [int(i) for i in answered if len(tokens[i]) in dict(common)][:n_prompts]
    count = Counter(len(tokens[i]) for i in kept)
    chosen = [i for i in kept if count[len(tokens[i])] > 1]
    if not chosen:
        raise NotMeasurable(
            f"{model.name}: answers {n_answered} of {len(asked)} facts, "
            "no two of them of one length in tokens, so none has a donor: "
            "ask more of them (n_facts, a parameter of notebook 06) or others that it knows (facts, a "
            "CounterFact .json or data set)"
        )
    return FactPrompts(
        facts=[asked[i] for i in chosen],
        tokens=[tokens[i] for i in chosen],
        answers=answers[chosen],
        groups=_groups([len(tokens[i]) for i in chosen]),
        n_asked=len(asked),
        n_answered=n_answered,
        n_alone=len(kept) - len(chosen),
    )


def _in_turn(strata: Sequence[tuple[str, str]], seed: int) -> Int[np.ndarray, " fact"]:
    """A random order in which the strata take turns, so that any beginning of it holds about as many of
    each."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(strata))
    seen: Counter[tuple[str, str]] = Counter()
    turns = np.zeros(len(strata), dtype=np.int64)
    for place, i in enumerate(map(int, order)):
        turns[place] = seen[strata[i]]
        seen[strata[i]] += 1
    return order[np.argsort(turns, kind="stable")]


def _encode(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[AskedFact]
) -> tuple[list[list[int]], Int[np.ndarray, " fact"]]:
    """Tokens of the prompts, BOS first, and of the answers' beginnings; -1 where the answer changes the
    prompt's own tokens."""
    bos = first_token(tokenizer)
    prompts, whole = (
        tokenizer(texts, add_special_tokens=False)["input_ids"]
        for texts in ([fact.text for fact in facts], [fact.text + fact.answer for fact in facts])
    )
    answers = [
        full[len(ids)] if full[: len(ids)] == ids and len(full) > len(ids) else -1
        for ids, full in zip(prompts, whole, strict=True)
    ]
    return [[bos, *ids] for ids in prompts], np.array(answers, dtype=np.int64)


def most_likely(
    model: Model, tokens: Sequence[Sequence[int]], usable: Bool[np.ndarray, " prompt"]
) -> Int[np.ndarray, " prompt"]:
    """The most likely token after each usable prompt; -2 for the others. Only the last position is
    unembedded."""
    import torch

    by_length: dict[int, list[int]] = defaultdict(list)
    for i in map(int, np.flatnonzero(usable)):
        by_length[len(tokens[i])].append(i)
    found = np.full(len(tokens), -2, dtype=np.int64)
    for indices in by_length.values():
        for chunk in (indices[i : i + BATCH] for i in range(0, len(indices), BATCH)):
            batch = torch.tensor([tokens[i] for i in chunk], device=model.device)
            with torch.no_grad():
                logits = model.hf(input_ids=batch, use_cache=False, logits_to_keep=1).logits[:, -1]
            found[chunk] = logits.argmax(-1).cpu().numpy()
    return found


def _groups(lengths: Sequence[int]) -> list[Int[np.ndarray, " _"]]:
    """Indices of equal length, at most ``GROUP`` together, in order of length."""
    groups = []
    for length in sorted(set(lengths)):
        members = np.flatnonzero(np.array(lengths) == length)
        groups += np.array_split(members, -(-len(members) // GROUP))
    return groups


def draw_donors(answers: Int[np.ndarray, " prompt"], n_donors: int, seed: int) -> Int[np.ndarray, "pair 2"]:
    """``(prompt, donor)`` pairs of prompts with these ``answers``, any of which may be each other's donors:
    up to ``n_donors`` different ones for each prompt, in random order.

    A donor has another answer, but where no other prompt has; a prompt is never its own.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    pairs = []
    for prompt, answer in enumerate(answers):
        others = [int(i) for i in rng.permutation(len(answers)) if i != prompt]
        different = [i for i in others if answers[i] != answer]
        pairs += [(prompt, donor) for donor in (different or others)[:n_donors]]
    return np.array(pairs)
