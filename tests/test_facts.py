"""Prompts that ask for a fact: where they come from, which are kept, and who is whose donor."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfrepair.errors import NotMeasurable, UserError
from selfrepair.models.loading import load_model
from selfrepair.paths import MODELS
from selfrepair.text import hub_datasets
from selfrepair.text.corpora import load_tokens
from selfrepair.text.facts import (
    AskedFact,
    choose_prompts,
    counterfact_facts,
    draw_donors,
    facts_for,
    facts_identity,
    gazetteer_facts,
    own_facts,
)
from selfrepair.text.gazetteer import Gazetteer


@pytest.fixture(scope="module")
def model():
    return load_model("pocket-pythia-small", device="cpu")


@pytest.fixture(scope="module")
def planted(model):
    return choose_prompts(model, facts_for("pocket-pythia-small"), 40, seed=1)


def test_own_list_is_well_formed():
    facts = own_facts()
    assert len(facts) >= 60
    assert len({fact.text for fact in facts}) == len(facts)
    for fact in facts:
        assert (
            fact.text == fact.text.strip()
            and not fact.text.endswith((".", ":", "?"))
            and fact.text[0].isupper()
        )
        assert fact.answer[0] == " " and fact.answer[1:].isalpha()
        assert fact.answer.strip().lower() not in fact.text.lower().split()
    assert min(Counter(fact.relation for fact in facts).values()) >= 5


def test_what_a_model_is_asked(tmp_path):
    planted = facts_for("pocket-pythia-small")
    world = {(fact.relation, fact.subject): fact.object for fact in Gazetteer(0).facts}
    assert planted == gazetteer_facts(0) and len(planted) == 18 * len(world)
    assert Counter(fact.phrasing for fact in planted) == {
        "trained": 16 * len(world),
        "held out": 2 * len(world),
    }
    assert gazetteer_facts(1) != planted
    assert facts_for("gpt2") == own_facts()
    file = counterfact_file(tmp_path, [record()])
    assert facts_for("pocket-pythia-small", file)[0].phrasing == "CounterFact"


def record(**changes):
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "subject": "Danielle Darrieux",
        "target_true": {"str": "French", "id": "Q150"},
        "target_new": {"str": "English"},
    }
    return {
        "case_id": 0,
        "requested_rewrite": {key: value for key, value in (rewrite | changes).items() if value is not None},
    }


def counterfact_file(folder, content):
    path = folder / "facts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_counterfact_file_and_data_set(tmp_path, monkeypatch):
    import datasets

    wanted = [AskedFact("The mother tongue of Danielle Darrieux is", " French", "P103", "CounterFact")]
    assert counterfact_facts(counterfact_file(tmp_path, [record()])) == wanted
    assert counterfact_facts(counterfact_file(tmp_path, [record(relation_id=None)]))[0].relation == "fact"
    monkeypatch.setattr(hub_datasets, "_commit_of", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([record()]))
    assert counterfact_facts("someone/counterfact") == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ({"requested_rewrite": {}}, "must hold a list"),
        ([], "holds no facts"),
        ([record(), {"prompt": "x"}], "record 1 is no CounterFact record"),
        ([record(target_true=None)], "record 0 is no CounterFact record"),
        ([record(prompt="The {} of {} is")], "record 0 is no CounterFact record"),
        (["text"], "record 0 is no CounterFact record"),
        ([record(target_true={"str": " "})], "record 0 has an empty prompt or answer"),
    ],
)
def test_bad_counterfact_files_are_one_line(tmp_path, content, said):
    with pytest.raises(UserError, match=said) as error:
        counterfact_facts(counterfact_file(tmp_path, content))
    assert "\n" not in str(error.value)


def test_what_determines_the_facts(tmp_path, monkeypatch):
    assert facts_identity("pocket-pythia-small") == {"gazetteer_seed": 0}
    assert facts_identity("gpt2") == {"gazetteer_seed": None}
    monkeypatch.setattr(hub_datasets, "_commit_of", lambda *_: hub_datasets._Commit("0123abc", ""))
    assert facts_identity("gpt2", "someone/counterfact") == {"facts_files": "0123abc"}
    one, other = (
        facts_identity("gpt2", counterfact_file(tmp_path, [record(subject=who)])) for who in ("A", "B")
    )
    assert one.keys() == other.keys() == {"facts_sha256"} and one != other
    with pytest.raises(UserError, match="no such file"):
        facts_identity("gpt2", str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("source", "said"),
    [("nowhere.json", "no such file"), ("no/such-data-set", "wanted from the Hugging Face hub")],
)
def test_missing_facts_are_one_line(source, said):
    with pytest.raises(UserError, match=said) as error:
        counterfact_facts(source)
    assert "\n" not in str(error.value)


def test_kept_prompts_are_answered(planted):
    """Every kept prompt, alone through plain transformers, is answered with the first token of its answer."""
    folder = MODELS / "pocket-pythia-small"
    hf, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    for fact, tokens, answer in zip(planted.facts, planted.tokens, planted.answers, strict=True):
        assert tokens == [tokenizer.bos_token_id, *tokenizer.encode(fact.text, add_special_tokens=False)]
        assert answer == tokenizer.encode(fact.answer, add_special_tokens=False)[0]
        with torch.no_grad():
            assert hf(torch.tensor([tokens])).logits[0, -1].argmax() == answer
    world = {(fact.subject, fact.relation): fact.object for fact in Gazetteer(0).facts}
    for fact in planted.facts:
        (true,) = {
            value
            for (subject, relation), value in world.items()
            if relation == fact.relation and subject in fact.text
        }
        assert fact.answer == f" {true}"


def test_counts_groups_and_strata(model, planted):
    assert (planted.n_asked, len(planted.facts) + planted.n_alone) == (120, 40)
    assert 40 <= planted.n_answered < 120
    assert sorted(np.concatenate(planted.groups)) == list(range(len(planted.facts)))
    for members in planted.groups:
        assert len(members) >= 2 and len({len(planted.tokens[i]) for i in members}) == 1
    asked = choose_prompts(model, facts_for("pocket-pythia-small"), 120, seed=1, only_answered=False)
    assert asked.n_answered == asked.n_asked == 360
    strata = Counter((fact.relation, fact.phrasing) for fact in asked.facts)
    assert (
        len(strata) == 12 and max(strata.values()) - min(strata.values()) <= 6
    )  # 10 of each but for those of rare lengths
    assert {phrasing for _, phrasing in strata} == {"held out", "trained"}


def test_drawn_from_the_seed(model, planted):
    facts = facts_for("pocket-pythia-small")
    again, other = (choose_prompts(model, facts, 40, seed=seed) for seed in (1, 2))
    assert (again.tokens, again.answers.tolist()) == (planted.tokens, planted.answers.tolist())
    assert other.tokens != planted.tokens


def test_few_prompts_are_kept_together(model):
    few = choose_prompts(model, facts_for("pocket-pythia-small"), 8)
    assert len(few.facts) == 8 and len(few.groups) == 1


def test_large_groups_are_cut(model):
    facts = [AskedFact(f"The number {i} comes before", " the", "order", "test") for i in range(100, 180)]
    prompts = choose_prompts(model, facts, 80, only_answered=False)
    assert sum(map(len, prompts.groups)) == 80 - prompts.n_alone and max(map(len, prompts.groups)) <= 32
    assert any(len(members) > 16 for members in prompts.groups)


def test_too_few_facts_are_one_line(model):
    wrong = [AskedFact("The river of Paris is the", " xylophone", "river", "test")] * 5
    with pytest.raises(NotMeasurable, match="answers 0 of 5 facts") as error:
        choose_prompts(model, wrong, 5)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="at least 2"):
        choose_prompts(model, wrong, 1)


def test_a_tokenizer_with_nothing_to_begin_prompts_with_is_one_line(monkeypatch):
    bare = load_model("pocket-pythia-small", device="cpu")
    bare.tokenizer.bos_token = bare.tokenizer.eos_token = None
    for read in (lambda: choose_prompts(bare, own_facts(), 4), lambda: load_tokens(bare.tokenizer)):
        with pytest.raises(
            UserError, match=r"no BOS and no EOS token to begin prompts with; name its bos_token"
        ):
            read()


def test_longer_than_the_context_is_left_out(model):
    facts = [AskedFact("word " * 200 + "and", " the", "long", "test")] * 3 + [
        AskedFact("It is", " a", "short", "test")
    ] * 2
    assert [len(ids) for ids in choose_prompts(model, facts, 5, only_answered=False).tokens] == [3, 3]


@given(
    answers=st.lists(st.integers(0, 3), min_size=2, max_size=12), n=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_donors(answers, n, seed):
    pairs = draw_donors(np.array(answers), n, seed)
    for prompt, answer in enumerate(answers):
        donors = pairs[pairs[:, 0] == prompt, 1]
        others = [i for i in range(len(answers)) if i != prompt]
        allowed = [i for i in others if answers[i] != answer] or others
        assert set(donors) <= set(allowed) and len(set(donors)) == len(donors) == min(n, len(allowed))
