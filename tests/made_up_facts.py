"""Random prompts in the place of facts, for tests of what is measured on them."""

import numpy as np
from families import VOCAB

from selfrepair.measure import layer_ablation
from selfrepair.measure.facts import of_facts
from selfrepair.text.facts import AskedFact, FactPrompts


def ablate_layers(model, prompts, ablation, seed=0, components=None, positions="last"):
    settings = {"ablation": ablation, "layer_positions": positions, "seed": seed}
    return layer_ablation.ablate_on_facts(model, of_facts(prompts), settings, {}, components)


def made_up_prompts(sizes=((4, 12), (3, 9)), vocab=VOCAB, seed=0):
    """Random prompts, ``sizes`` = (how many, how long) of each length."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(vocab, size=length).tolist() for n, length in sizes for _ in range(n)]
    ends = np.cumsum([n for n, _ in sizes])
    groups = [np.arange(end - n, end) for end, (n, _) in zip(ends, sizes, strict=True)]
    n = len(tokens)
    facts = [
        AskedFact(f"prompt {i}", " answer", "relation", "trained" if i % 2 else "held out") for i in range(n)
    ]
    return FactPrompts(facts, tokens, rng.integers(3, size=n), groups, n, n, 0)
