"""What a model can do: loss on the held-out prose, recall of the planted facts, induction, a sample."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.text.corpora import pack, read_documents
from selfrepair.text.gazetteer import FactPrompt, Gazetteer


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gazetteer_seed: int, length: int = 128
) -> dict[str, float]:
    """Figures by name: losses in nats per token, shares in [0, 1].

    Losses are over packed rows of ``length`` tokens, or the model's context if that is shorter,
    each beginning with BOS.
    """
    length = min(length, model.config.max_position_embeddings)
    loss = token_loss(model, torch.from_numpy(text_rows(tokenizer, read_documents(HELD_OUT_TEXT), length)))
    prompts = Gazetteer(gazetteer_seed).prompts()
    recalled = fact_recall(model, tokenizer, prompts)
    held_out = np.array([prompt.held_out for prompt in prompts])
    first, second = induction_losses(model, tokenizer.bos_token_id, length)
    return {
        "loss_held_out_prose": loss,
        "perplexity_held_out_prose": float(np.exp(loss)),
        "fact_recall_held_out_phrasings": float(recalled[held_out].mean()),
        "fact_recall_trained_phrasings": float(recalled[~held_out].mean()),
        "fact_recall_chance": fact_chance(tokenizer, prompts),
        "induction_loss_first_half": first,
        "induction_loss_second_half": second,
    }


@torch.no_grad()
def token_loss(model: PreTrainedModel, rows: Int[Tensor, "row position"], batch_size: int = 32) -> float:
    """Mean cross-entropy of ``rows`` in nats per predicted token, without dropout."""
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in rows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def text_rows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int
) -> Int[np.ndarray, "row {length}"]:
    """Documents tokenised and packed into rows, each beginning with BOS."""
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    return pack(encoded, tokenizer.bos_token_id, length)


@torch.no_grad()
def fact_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[FactPrompt]
) -> Bool[np.ndarray, " prompt"]:
    """For each prompt, whether the most likely next token is the first token of the answer.

    Of a prompt longer than the model's context, the model reads the end.
    """
    answers = first_tokens(tokenizer, prompts)
    by_length: dict[int, list[int]] = defaultdict(list)
    context = model.config.max_position_embeddings
    texts = tokenizer([p.text for p in prompts], add_special_tokens=False)["input_ids"]
    encoded = [[tokenizer.bos_token_id, *ids][-context:] for ids in texts]
    for i, ids in enumerate(encoded):
        by_length[len(ids)].append(i)
    correct = np.zeros(len(prompts), dtype=bool)
    for indices in by_length.values():
        for chunk in (indices[i : i + 128] for i in range(0, len(indices), 128)):
            batch = torch.tensor([encoded[i] for i in chunk], device=model.device)
            predicted = model(input_ids=batch).logits[:, -1].argmax(-1).cpu().numpy()
            correct[chunk] = predicted == answers[chunk]
    return correct


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[FactPrompt]
) -> Int[np.ndarray, " prompt"]:
    """The first token of each prompt's answer."""
    return np.array(
        [ids[0] for ids in tokenizer([p.answer for p in prompts], add_special_tokens=False)["input_ids"]]
    )


def fact_chance(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[FactPrompt]) -> float:
    """Accuracy of always giving each relation's most frequent first token."""
    by_relation: dict[str, Counter[int]] = defaultdict(Counter)
    for prompt, token in zip(prompts, first_tokens(tokenizer, prompts), strict=True):
        by_relation[prompt.fact.relation][int(token)] += 1
    return sum(counts.most_common(1)[0][1] for counts in by_relation.values()) / len(prompts)


@torch.no_grad()
def induction_losses(
    model: PreTrainedModel, bos: int, length: int, n_rows: int = 64, seed: int = 0
) -> tuple[float, float]:
    """Losses (nats per token) on the first and the second half of repeated uniformly random tokens.

    Rows are BOS, ``m`` random tokens, the same ``m`` again, with ``m = (length − 1) // 2``. The
    first token of the repetition, which nothing announces, is left out.
    """
    half = (length - 1) // 2
    rng = np.random.Generator(np.random.PCG64(seed))
    random = rng.integers(0, model.config.vocab_size, size=(n_rows, half))
    rows = torch.from_numpy(np.concatenate([np.full((n_rows, 1), bos), random, random], axis=1)).to(
        model.device
    )
    logits = model(input_ids=rows).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return losses[:, :half].mean().item(), losses[:, half + 1 :].mean().item()


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    n_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> str:
    """``prompt`` and ``n_tokens`` drawn after it from the ``top_k`` most likely tokens; BOS and as much as
    the context holds are seen."""
    context = model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    for _ in range(n_tokens):
        seen = ids if ids.shape[1] <= context else torch.cat([ids[:, :1], ids[:, 1 - context :]], dim=1)
        top, tokens = (model(input_ids=seen.to(model.device)).logits[0, -1].float().cpu() / temperature).topk(
            top_k
        )
        drawn = tokens[torch.multinomial(top.softmax(-1), 1, generator=generator)]
        ids = torch.cat([ids, drawn[None]], dim=1)
    return str(tokenizer.decode(ids[0, 1:]))
