"""The models that ship: what they promise, and that every loader agrees on them."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from selfrepair.models.checkpoints import embedded_models, find_model
from selfrepair.models.loading import Model
from selfrepair.paths import MODELS
from selfrepair.text.gazetteer import Gazetteer
from selfrepair.training.card import TABLE_MARKS, render_card, render_table
from selfrepair.training.config import Phase, TrainingConfig, load_config
from selfrepair.training.evaluate import (
    fact_chance,
    fact_recall,
    first_tokens,
    induction_losses,
    sample,
    token_loss,
)

CHECKPOINTS = sorted((MODELS / "pocket-pythia" / "checkpoints").iterdir())
FOLDERS = [MODELS / name for name in embedded_models()] + CHECKPOINTS
METRICS = {name: json.loads((MODELS / name / "metrics.json").read_text()) for name in embedded_models()}


def test_family_is_complete():
    assert set(embedded_models()) >= {
        "pocket-gpt2",
        "pocket-pythia",
        "pocket-llama",
        "pocket-pythia-small",
        "pocket-gpt2-dropout",
    }
    assert len(CHECKPOINTS) + 1 == 8 and CHECKPOINTS[0].name == "step-000000"
    for path in sorted((MODELS / "configs").glob("*.yaml")):
        assert load_config(path).name == path.stem
    for metrics in METRICS.values():
        assert metrics["training_tokens"] >= 10_000_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_transformer_bridge_loads_it_offline_and_agrees(folder):
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(4096, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (bridge(tokens) - model(tokens).logits).abs().max() < 1e-4
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize("name", embedded_models())
def test_card_and_table_are_what_was_measured(name):
    metrics = METRICS[name]
    fields = metrics["config"] | {"phases": tuple(Phase(**phase) for phase in metrics["config"]["phases"])}
    config = TrainingConfig(**fields)
    assert config == load_config(MODELS / "configs" / f"{name}.yaml")
    card = (MODELS / name / "README.md").read_text()
    sources = [
        line.removeprefix("- ")
        for line in card.partition("## Sources")[2].splitlines()
        if line.startswith("- ")
    ]
    assert len(sources) == 82 and "Jane Austen" in card
    assert card == render_card(config, metrics, sources)
    begin, end = TABLE_MARKS
    table = (MODELS / "README.md").read_text().partition(begin)[2].partition(end)[0].strip()
    assert table == render_table(METRICS)


@pytest.mark.slow("the model cards say what the models do")
@pytest.mark.parametrize("name", embedded_models())
def test_recall_of_a_model_is_what_its_card_says(name):
    """A slow count over some prompts, one forward pass each, within sampling error of the card's share."""
    folder = find_model(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [prompt for prompt in Gazetteer(0).prompts() if prompt.held_out][::6]
    right = 0
    for prompt in prompts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt.text)]])
        with torch.no_grad():
            right += int(model(ids).logits[0, -1].argmax()) == tokenizer.encode(prompt.answer)[0]
    assert right == fact_recall(model, tokenizer, prompts).sum()
    assert right / len(prompts) == pytest.approx(METRICS[name]["fact_recall_held_out_phrasings"], abs=0.12)


def test_losses_by_hand():
    model = AutoModelForCausalLM.from_pretrained(MODELS / "pocket-pythia-small", dtype=torch.float64).eval()
    rows = torch.randint(4096, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logs = model(rows).logits.double().log_softmax(-1)
    by_hand = [-logs[i, k, rows[i, k + 1]].item() for i in range(3) for k in range(8)]
    assert token_loss(model, rows, batch_size=2) == pytest.approx(sum(by_hand) / 24, abs=1e-5)


def test_induction_is_measured_on_the_repetition_only():
    class Repeats(PreTrainedModel):
        """Knows the token that followed the last occurrence of the present one, nothing else."""

        config_class = PretrainedConfig
        device = torch.device("cpu")

        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 50)
            for b, row in enumerate(input_ids.tolist()):
                for k in range(2, len(row)):
                    earlier = [j for j in range(1, k) if row[j] == row[k]]
                    if earlier:
                        logits[b, k, row[earlier[-1] + 1]] = 20
            return type("Output", (), {"logits": logits})()

    first, second = induction_losses(Repeats(PretrainedConfig(vocab_size=50)), bos=0, length=13, n_rows=8)
    assert second < 3 < first


def test_the_first_token_of_a_repetition_is_not_counted():
    """A model that is sure of another token there, and knows nothing elsewhere."""

    class Misled(PreTrainedModel):
        config_class = PretrainedConfig
        device = torch.device("cpu")

        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 50)
            for row, tokens in enumerate(input_ids.tolist()):
                logits[row, 6, (tokens[7] + 1) % 50] = 20  # after BOS and six tokens, that are then repeated
            return type("Output", (), {"logits": logits})()

    losses = induction_losses(Misled(PretrainedConfig(vocab_size=50)), bos=0, length=13, n_rows=8)
    assert losses == pytest.approx([math.log(50)] * 2)


@pytest.mark.parametrize(("temperature", "least", "most"), [(0.02, 30, 30), (1.0, 12, 26), (50.0, 0, 14)])
def test_a_cold_sample_is_of_the_most_likely_token(temperature, least, most):
    """Of three, of probability 2/3, 2/9 and 1/9 at temperature 1."""

    class Fixed(PreTrainedModel):
        config_class = PretrainedConfig
        device = torch.device("cpu")

        def forward(self, input_ids):
            logits = torch.full((*input_ids.shape, 4096), -1e6)
            logits[..., [10, 11, 12]] = torch.tensor([6.0, 2.0, 1.0]).log()
            return type("Output", (), {"logits": logits})()

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "pocket-gpt2")
    letters = tokenizer.decode([10]), tokenizer.decode([11]), tokenizer.decode([12])
    model = Fixed(PretrainedConfig(vocab_size=4096, max_position_embeddings=64))
    drawn = sample(model, tokenizer, "", n_tokens=30, temperature=temperature)
    assert len(drawn) == 30 and set(drawn) <= set(letters)
    assert least <= drawn.count(letters[0]) <= most


def test_chance_is_of_each_relations_most_frequent_first_token():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "pocket-gpt2")
    prompts = Gazetteer(0).prompts()[::7]
    first = {}
    for prompt in prompts:
        first.setdefault(prompt.fact.relation, []).append(tokenizer.encode(prompt.answer)[0])
    right = sum(max(tokens.count(token) for token in tokens) for tokens in first.values())
    assert len(first) > 1
    assert fact_chance(tokenizer, prompts) == pytest.approx(right / len(prompts))


def test_answers_begin_with_a_space():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "pocket-gpt2")
    prompts = Gazetteer(0).prompts()[::97]
    for prompt, token in zip(prompts, first_tokens(tokenizer, prompts), strict=True):
        whole = tokenizer.encode(prompt.text + prompt.answer)
        assert whole[: len(tokenizer.encode(prompt.text))] == tokenizer.encode(prompt.text)
        assert whole[len(tokenizer.encode(prompt.text))] == token


def test_a_models_hash_knows_names_places_shapes_and_types_of_weights():
    def hashed(weights):
        return Model.weights_sha256.func(SimpleNamespace(hf=SimpleNamespace(state_dict=lambda: weights)))

    one, other, nothing = torch.arange(6.0), torch.ones(6), torch.zeros(6)
    models = [
        {"a": one, "b": other},
        {"a": other, "b": one},
        {"a": one, "c": other},
        {"a": one.reshape(2, 3), "b": other},
        {"a": one.reshape(3, 2), "b": other},
        {"a": nothing},
        {"a": nothing.int()},
    ]
    assert len({hashed(weights) for weights in models}) == len(models)
    assert hashed({"b": other, "a": one}) == hashed(models[0])
