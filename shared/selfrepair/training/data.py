"""Tokenizer and packed rows for a training run, made once and shared by all runs that agree in them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from selfrepair.errors import UserError
from selfrepair.paths import cache_dir
from selfrepair.store.code_identity import code_version
from selfrepair.text.corpora import pack, read_documents
from selfrepair.text.gazetteer import Gazetteer
from selfrepair.training.config import TrainingConfig

BOS = "<|endoftext|>"
N_VALIDATION_ROWS = 512


@dataclass(frozen=True)
class TrainingData:
    """``tokenizer``, and rows of tokens of corpus, gazetteer and validation text.

    Corpus rows are in a random order; no validation row is among them. Gazetteer rows are a
    prefix of an endless stream, as long as needed.
    """

    tokenizer: PreTrainedTokenizerFast
    corpus: Integer[np.ndarray, "row position"]
    validation: Integer[np.ndarray, "validation_row position"]
    gazetteer: Gazetteer

    def training_rows(self, config: TrainingConfig) -> Integer[np.ndarray, "training_row position"]:
        """All rows of a run in training order; gazetteer text is mixed in evenly within each phase.

        Corpus rows come again only when all have been used, and then in another order.
        """
        rows, used = [], 0
        for number, (phase, steps) in enumerate(zip(config.phases, config.phase_steps, strict=True)):
            n_rows = steps * config.batch_size
            n_gazetteer = round(n_rows * phase.gazetteer_share)
            n_corpus = n_rows - n_gazetteer
            rng = np.random.Generator(np.random.PCG64([config.seed, number] if number else config.seed))
            corpus = self._corpus_rows(used, n_corpus, config.seed)
            gazetteer = self._gazetteer_rows(n_gazetteer, number, phase.gazetteer_phrasings)
            rows.append(np.concatenate([corpus, gazetteer])[rng.permutation(n_rows)])
            used += n_corpus
        return np.concatenate(rows)

    def digest(self, rows: Integer[np.ndarray, "training_row position"]) -> str:
        """Differs where anything does that a run on these :meth:`training_rows` reads: they, the validation
        rows, or what a token stands for."""
        digest = hashlib.sha256(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        for array in (rows, self.validation):
            digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
        return digest.hexdigest()[:16]

    def _corpus_rows(self, start: int, count: int, seed: int) -> Integer[np.ndarray, "{count} position"]:
        n = len(self.corpus)
        epochs = range(start // n, -(-(start + count) // n))
        orders = [
            np.arange(n)
            if epoch == 0
            else np.random.Generator(np.random.PCG64([seed, 1, epoch])).permutation(n)
            for epoch in epochs
        ]
        offset = start - n * (start // n)
        return self.corpus[np.concatenate([*orders, np.arange(0)])[offset : offset + count].astype(np.int64)]

    def _gazetteer_rows(
        self, n_rows: int, seed: int, n_phrasings: int
    ) -> Integer[np.ndarray, "{n_rows} position"]:
        length = self.corpus.shape[1]
        paragraphs = self.gazetteer.paragraphs(seed, n_phrasings)
        documents: list[list[int]] = []
        tokens = 0
        while tokens < (n_rows + 1) * length:
            batch = list(itertools.islice(paragraphs, 1000))
            documents += self.tokenizer(batch, add_special_tokens=False)["input_ids"]
            tokens = sum(map(len, documents))
        return pack(documents, self.tokenizer.bos_token_id, length)[:n_rows].astype(self.corpus.dtype)


def prepare(config: TrainingConfig, text: str | Path) -> TrainingData:
    """Tokenizer and rows for ``config`` from the folder ``text``, from the cache where they are there
    already, made of the same text by the same code and version of ``tokenizers``.

    Raises:
        UserError: no readable text, or less of it than one batch besides the validation rows.
    """
    documents = read_documents(text)
    made_by = [code_version("selfrepair.training.data"), tokenizers.__version__]
    digest = hashlib.sha256(json.dumps([made_by, config.data_key()], sort_keys=True).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    folder = cache_dir() / "prepared" / digest.hexdigest()[:16]
    if not folder.exists():
        _make(config, documents, text, folder)
    return TrainingData(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False),
        corpus=np.load(folder / "corpus.npy", mmap_mode="r"),
        validation=np.load(folder / "validation.npy"),
        gazetteer=Gazetteer(config.gazetteer_seed),
    )


def _make(config: TrainingConfig, documents: list[str], text: str | Path, folder: Path) -> None:
    first = config.phases[0]
    gazetteer = Gazetteer(config.gazetteer_seed).paragraphs(0, first.gazetteer_phrasings)
    gazetteer_characters = first.gazetteer_share * sum(map(len, documents))
    tokenizer = train_tokenizer(
        itertools.chain(documents, _up_to(gazetteer, gazetteer_characters)), config.vocab_size
    )
    encoded = (tokenizer(document, add_special_tokens=False)["input_ids"] for document in documents)
    rows = pack(encoded, tokenizer.bos_token_id, config.sequence_length)
    n_validation = min(N_VALIDATION_ROWS, len(rows) // 10)
    if n_validation < 1 or len(rows) - n_validation < config.batch_size:
        raise UserError(
            f"{text}: {len(rows)} sequences of {config.sequence_length} tokens are too few for one batch of "
            f"{config.batch_size} and a tenth held out; add text or lower batch_size"
        )
    rows = rows[np.random.Generator(np.random.PCG64(0)).permutation(len(rows))].astype(
        np.uint16 if config.vocab_size <= 65536 else np.int32
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        tokenizer.save_pretrained(unfinished)
        np.save(unfinished / "validation.npy", rows[:n_validation])
        np.save(unfinished / "corpus.npy", rows[n_validation:])
        if not folder.exists():  # another run may have made the same meanwhile
            os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _up_to(paragraphs: Iterator[str], characters: float) -> Iterator[str]:
    written = 0
    for paragraph in paragraphs:
        if written >= characters:
            return
        written += len(paragraph)
        yield paragraph


def train_tokenizer(documents: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` entries, one of them the BOS/EOS ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS)
