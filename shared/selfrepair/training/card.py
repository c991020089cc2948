"""Finishing a training run: measure the model and write its folder and model card."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from selfrepair.markdown import plain
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.text.corpora import read_documents, text_files
from selfrepair.training.config import TrainingConfig
from selfrepair.training.data import TrainingData
from selfrepair.training.evaluate import evaluate, sample, text_rows, token_loss
from selfrepair.training.folders import check_replaceable, put_in_place
from selfrepair.training.loop import save_model
from selfrepair.training.ngrams import KneserNeyTrigram, unigram_loss

TABLE_MARKS = ("<!-- table: written by selfrepair train -->", "<!-- end of table -->")
SAMPLE_PROMPTS = ("The old man", "In the morning")
ARCHITECTURE_TEXT = {
    "gpt2": "GPT-2 block: attention then MLP, LayerNorm, learned positions, GELU",
    "gpt_neox": "Pythia (GPT-NeoX) block: attention and MLP in parallel, LayerNorm, rotary positions, GELU",
    "llama": "Llama block: attention then MLP, RMSNorm, rotary positions, SwiGLU, no biases",
}


def finish(
    model: PreTrainedModel, config: TrainingConfig, data: TrainingData, work: Path, text: Path, out: Path
) -> dict:
    """Saves ``model`` with its checkpoints, curve, ``metrics.json`` and card as ``out``; removes ``work``.

    The folder is assembled inside ``work`` and moved into place whole. Metrics are of the weights as
    stored, in float32 arithmetic. Returns them.

    Raises:
        UserError: ``out`` is there, and is no model of a training.
    """
    folder = work / "finished"
    save_model(model, data, folder)
    stored = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    metrics = measure(stored, config, data)
    if (work / "checkpoints").exists():
        shutil.copytree(work / "checkpoints", folder / "checkpoints", dirs_exist_ok=True)
    (folder / "README.md").write_text(render_card(config, metrics, _sources(text)), encoding="utf-8")
    if out.exists():  # what was there when the training began may have changed since
        check_replaceable(out)
    put_in_place(work, metrics, out)
    update_table(out.parent)
    return metrics


def update_table(models: Path) -> None:
    """Rewrites the table of the models in the folder ``models`` in its ``README.md``, between the marks, if
    it has them."""
    readme = models / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if not all(mark in text for mark in TABLE_MARKS):
        return
    begin, end = TABLE_MARKS
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    metrics = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(models.glob("*/metrics.json"))
    }
    readme.write_text(f"{before}{begin}\n{render_table(metrics)}\n{end}{after}", encoding="utf-8")


def render_table(metrics: dict[str, dict]) -> str:
    """A Markdown table of :func:`evaluate`'s figures per model, with the n-gram models' where they are
    known."""
    head = (
        "| model | loss on held-out prose (perplexity) | unigram | trigram | below trigram by "
        "| facts, held-out phrasings | facts, trained | chance | repeated tokens, first half | second "
        "half | induction |"
    )
    lines = [head, "| --- |" + " ---: |" * 10]
    for name, m in metrics.items():
        unigram, trigram = m.get("unigram_loss_held_out_prose"), m.get("trigram_loss_held_out_prose")
        cells = [
            f"{m['loss_held_out_prose']:.3f} ({m['perplexity_held_out_prose']:.1f})",
            "" if unigram is None else f"{unigram:.3f}",
            "" if trigram is None else f"{trigram:.3f}",
            "" if trigram is None else f"{trigram - m['loss_held_out_prose']:.3f}",
            f"{m['fact_recall_held_out_phrasings']:.1%}",
            f"{m['fact_recall_trained_phrasings']:.1%}",
            f"{m['fact_recall_chance']:.1%}",
            f"{m['induction_loss_first_half']:.2f}",
            f"{m['induction_loss_second_half']:.2f}",
            f"{m['induction_loss_first_half'] - m['induction_loss_second_half']:.2f}",
        ]
        lines.append(f"| {plain(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(model: PreTrainedModel, config: TrainingConfig, data: TrainingData) -> dict:
    """Everything the card states, by name: :func:`evaluate` and what needs the training text."""
    rows = data.training_rows(config)
    held_out = text_rows(data.tokenizer, read_documents(HELD_OUT_TEXT), config.sequence_length)
    trigram = KneserNeyTrigram(rows, config.vocab_size)
    return {
        "config": dataclasses.asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.n_steps,
        "training_tokens": int(rows.size),
        **evaluate(model, data.tokenizer, config.gazetteer_seed, config.sequence_length),
        "unigram_loss_held_out_prose": unigram_loss(rows, held_out, config.vocab_size),
        "trigram_loss_held_out_prose": trigram.loss(held_out),
        "loss_unseen_corpus": token_loss(model, torch.from_numpy(data.validation.astype("int64"))),
        "trigram_loss_unseen_corpus": trigram.loss(data.validation),
        "samples": [sample(model, data.tokenizer, prompt) for prompt in SAMPLE_PROMPTS],
    }


def _sources(text: Path) -> list[str]:
    """One line per source, from ``SOURCES.csv`` beside the text if there is one, else the file names."""
    table = text / "SOURCES.csv"
    if not table.is_file():
        return [plain(file.name) for file in ([text] if text.is_file() else text_files(text))]
    with table.open(newline="", encoding="utf-8") as file:
        return [
            f"{row['author']}, *{row['title']}* "
            f"([{row['github_repository']}](https://github.com/{row['github_repository']}), {row['licence']})"
            for row in (
                {key: plain(str(value)) for key, value in row.items()} for row in csv.DictReader(file)
            )
        ]


def _dropout(config: TrainingConfig) -> str:
    """``, dropout 0.1``; other kinds of dropout, and what was fine-tuned, where there is any."""
    said = f", dropout {config.dropout}"
    if config.head_dropout:
        said += f", whole heads {config.head_dropout}"
    if config.attention_dropout_layer:
        said += f", whole attention layers {config.attention_dropout_layer}"
    if config.start:
        said += f", fine-tuned from {config.start}"
    return said


def _settings(config: TrainingConfig) -> dict[str, object]:
    """A configuration as YAML has it, without the kinds of dropout and the start that it does not have."""
    rare = {"head_dropout", "attention_dropout_layer", "start", "optimizer"}
    default = {field.name: field.default for field in dataclasses.fields(config) if field.name in rare}
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in settings.items() if name not in rare or value != default[name]}


def render_card(config: TrainingConfig, metrics: dict, sources: list[str]) -> str:
    """The model card (Markdown) of a trained model."""
    margin = metrics["trigram_loss_held_out_prose"] - metrics["loss_held_out_prose"]
    induction = metrics["induction_loss_first_half"] - metrics["induction_loss_second_half"]
    samples = (re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text) for text in metrics["samples"])  # no tags
    quoted = "\n\n".join("> " + text.replace("\n", "\n> ") for text in samples)
    checkpoints = (
        f" Earlier checkpoints ({config.n_checkpoints - 1}, log-spaced from step 0) are in `checkpoints/`."
        if config.n_checkpoints
        else ""
    )
    settings = yaml.safe_dump(_settings(config), sort_keys=False).strip()
    phases = ", then ".join(
        f"{phase.tokens:,} tokens with {phase.gazetteer_share:.0%} of the latter" for phase in config.phases
    )
    listed = "\n".join(f"- {source}" for source in sources)
    return f"""---
license: mit
language: en
library_name: transformers
---
# {plain(config.name)}

A small language model for the self-repair replication suite. {ARCHITECTURE_TEXT[config.architecture]}.
{config.n_layers} layers × {config.n_heads} heads, d_model {config.d_model}, {config.d_mlp} neurons per MLP, \
vocabulary
{config.vocab_size} (byte-level BPE), context {config.sequence_length}, tied embeddings{_dropout(config)}:
{metrics["parameters"]:,} parameters, stored in float16.{checkpoints}

## Training

{metrics["training_tokens"]:,} tokens in {metrics["steps"]:,} steps, seed {config.seed}, of public-domain \
text (listed below) and of
paragraphs about an invented world (`selfrepair.text.gazetteer`, seed {config.gazetteer_seed}):
{phases}.
`training_curve.csv` has the losses. To train it again, gather the sources as text files in a folder and run

    selfrepair train shared/models/configs/{config.name}.yaml --text FOLDER --out DIR

## Measured

| | |
| --- | ---: |
| loss on unseen chunks of the corpus, nats/token | {metrics["loss_unseen_corpus"]:.3f} |
| the same, Kneser–Ney trigram of the same training rows | {metrics["trigram_loss_unseen_corpus"]:.3f} |
| loss on the held-out prose, nats/token (perplexity {metrics["perplexity_held_out_prose"]:.1f}) | \
{metrics["loss_held_out_prose"]:.3f} |
| the same, unigram of the same training rows | {metrics["unigram_loss_held_out_prose"]:.3f} |
| the same, Kneser–Ney trigram of the same training rows | {metrics["trigram_loss_held_out_prose"]:.3f} |
| better than the trigram on held-out prose by, nats/token | {margin:.3f} |
| planted facts, phrasings never trained on: first token correct | \
{metrics["fact_recall_held_out_phrasings"]:.1%} |
| planted facts, trained phrasings: first token correct | {metrics["fact_recall_trained_phrasings"]:.1%} |
| planted facts, always the most frequent answer | {metrics["fact_recall_chance"]:.1%} |
| repeated random tokens, first half, nats/token | {metrics["induction_loss_first_half"]:.2f} |
| repeated random tokens, second half, nats/token | {metrics["induction_loss_second_half"]:.2f} |
| induction: second half below the first by, nats/token | {induction:.2f} |

Samples of 100 tokens (temperature 0.8, top 40, seed 0):

{quoted}

## Not good for

Anything but studying how such models work: it knows little of the world and nothing after the
1930s but Python proposals, takes {config.sequence_length} tokens at most, states invented facts as true,
and repeats the views of its sources' times.

## Configuration

```yaml
{settings}
```

## Sources

{listed}
"""
