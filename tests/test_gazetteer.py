import hashlib
import itertools
import subprocess
import sys
from collections import defaultdict

import pytest

from selfrepair.text.gazetteer import RELATIONS, Gazetteer

WORLD = Gazetteer(0)
PARAGRAPHS = list(itertools.islice(WORLD.paragraphs(), 3000))
DIGEST = """
import hashlib, itertools
from selfrepair.text.gazetteer import Gazetteer
g = Gazetteer(7)
text = "\\n".join(itertools.islice(g.paragraphs(3), 500)) + repr(g.facts) + repr(g.prompts())
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_same_output_in_every_process():
    def run(hash_seed):
        result = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout

    world = Gazetteer(7)
    text = "\n".join(itertools.islice(world.paragraphs(3), 500)) + repr(world.facts) + repr(world.prompts())
    here = hashlib.sha256(text.encode()).hexdigest() + "\n"
    assert run("1") == run("2") == here


def test_output_is_what_the_shipped_models_were_trained_on():
    first_phase = "\n".join(itertools.islice(WORLD.paragraphs(0, n_phrasings=8), 3000)) + repr(WORLD.facts)
    assert (
        hashlib.sha256(first_phase.encode()).hexdigest()
        == "6a6bff7debad29d6069a3a145dcbef4a58cdaa8b9920d1a70afc1dec562cd260"
    )
    second_phase = "\n".join(itertools.islice(WORLD.paragraphs(1), 3000))
    assert (
        hashlib.sha256(second_phase.encode()).hexdigest()
        == "49b3a98201b22badd28f11ae78fed746dccf2ac56e1850e47dc7f2f39bf86481"
    )


def test_seeds_differ():
    assert Gazetteer(1).facts != WORLD.facts
    assert next(WORLD.paragraphs(1)) != next(WORLD.paragraphs(0))


def test_world_is_large_enough():
    names = list(itertools.chain(*WORLD.entities.values()))
    assert len(names) >= 300
    for kind, members in WORLD.entities.items():
        assert len(set(members)) == len(members), kind
    assert 4 <= len(RELATIONS) <= 6


def test_relations_are_functional_and_total():
    objects = defaultdict(set)
    for fact in WORLD.facts:
        objects[fact.relation, fact.subject].add(fact.object)
    assert all(len(found) == 1 for found in objects.values())
    for relation in RELATIONS:
        assert {s for r, s in objects if r == relation.name} == set(WORLD.entities[relation.subject_kind])
    for fact in WORLD.facts:
        (relation,) = [r for r in RELATIONS if r.name == fact.relation]
        assert fact.object in WORLD.entities[relation.object_kind]


def test_phrasings():
    for relation in RELATIONS:
        assert len(relation.trained) + len(relation.held_out) >= 6
        assert len(relation.held_out) >= 2
        for phrasing in relation.trained + relation.held_out:
            assert phrasing.count("{s}") == phrasing.count("{o}") == 1
            assert 0 <= phrasing.index("{s}") < phrasing.index("{o}")
            assert phrasing[phrasing.index("{o}") - 1] == " "


def test_no_held_out_phrasing_in_training_text():
    text = " ".join(PARAGRAPHS)
    for relation in RELATIONS:
        for phrasing in relation.held_out:
            for subject in WORLD.entities[relation.subject_kind]:
                assert phrasing.partition("{o}")[0].format(s=subject) not in text
        for phrasing in relation.trained:  # the same search does find what is trained on
            before = phrasing.partition("{o}")[0]
            assert any(before.format(s=s)[1:] in text for s in WORLD.entities[relation.subject_kind])


@pytest.mark.slow("the training text states every planted fact and no false one")
def test_training_text_states_every_fact_and_no_false_one():
    text = " ".join(PARAGRAPHS)
    truth = {(fact.relation, fact.subject): fact.object for fact in WORLD.facts}
    for relation in RELATIONS:
        for subject in WORLD.entities[relation.subject_kind]:
            said = set()
            for phrasing in relation.trained:
                for candidate in WORLD.entities[relation.object_kind]:
                    sentence = phrasing.format(s=subject, o=candidate)
                    if sentence[0].upper() + sentence[1:] in text:
                        said.add(candidate)
            assert said == {truth[relation.name, subject]}


def test_prompts_end_before_the_answer():
    prompts = WORLD.prompts()
    assert len(prompts) == sum(
        len(r.trained + r.held_out) * len(WORLD.entities[r.subject_kind]) for r in RELATIONS
    )
    phrasings = {r.name: r.trained + r.held_out for r in RELATIONS}
    n_trained = {r.name: len(r.trained) for r in RELATIONS}
    for prompt in prompts:
        sentence = phrasings[prompt.fact.relation][prompt.phrasing].format(
            s=prompt.fact.subject, o=prompt.fact.object
        )
        assert (prompt.text + prompt.answer).lower() == sentence[: len(prompt.text + prompt.answer)].lower()
        assert prompt.answer == f" {prompt.fact.object}"
        assert prompt.held_out == (prompt.phrasing >= n_trained[prompt.fact.relation])


def test_too_many_names_are_refused():
    with pytest.raises(ValueError, match="names asked"):
        Gazetteer(0, n_dishes=10_000)
