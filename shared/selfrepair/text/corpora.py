"""Text on disk to documents, and documents to packed rows of tokens."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from selfrepair.errors import UserError
from selfrepair.models.support import check_reads_text
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.text.hub_datasets import dataset_identity, dataset_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = b"---"
#: Bytes of the longest document: a tokenizer reads it in one piece, in two hundred times as much memory.
LONGEST_DOCUMENT = 1 << 24
#: Characters that are tokenised at once, or one document.
CHARACTERS_AT_ONCE = 1 << 20
#: Longest prompt that may be asked for: longer than any model's context.
LONGEST_PROMPT = 1 << 24


def read_documents(path: str | Path) -> list[str]:
    """The documents of a ``.txt``/``.txt.gz`` file or of every such file in a folder, in name order.

    In a file, a line that holds exactly ``---`` ends one document and begins the next.

    Raises:
        UserError: nothing there, no text file in the folder, a file that is not UTF-8 text, or too long a
            document.
    """
    path = Path(path)
    if path.is_dir():
        files = text_files(path)
        if not files:
            raise UserError(f"{path}: no .txt or .txt.gz file in this folder")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"{path}: no such file or folder")
    documents = [document.strip("\n") for file in files for document in _documents(file)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{path}: holds no text")
    return documents


def text_files(folder: Path) -> list[Path]:
    """The text files of a folder by name, without hidden ones: editors keep locks such as ``.#story.txt``."""
    found = [*folder.glob("*.txt"), *folder.glob("*.txt.gz")]
    return sorted(file for file in found if not file.name.startswith("."))


def _documents(file: Path) -> Iterator[str]:
    """What lies between a file's separators; a file that is no text, or never ends, is not read further than
    need be."""
    lines: list[bytes] = []
    start = end = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as content:
            while line := content.readline(LONGEST_DOCUMENT + 1):
                end += len(line)
                if line.rstrip(b"\r\n") == SEPARATOR:
                    yield _decoded(file, b"".join(lines), start)
                    lines, start = [], end
                elif end - start > LONGEST_DOCUMENT:
                    raise UserError(
                        f"{file}: a document of more than {LONGEST_DOCUMENT >> 20} MiB; "
                        "divide it by lines that hold only ---"
                    )
                else:
                    lines.append(line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    yield _decoded(file, b"".join(lines), start)


def _decoded(file: Path, raw: bytes, start: int) -> str:
    """The text of bytes that begin at byte ``start`` of a file."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {start + error.start})") from error
    if "\0" in text:
        raise UserError(f"{file}: not text (NUL at byte {start + raw.index(0)})")
    return text


def pack(documents: Iterable[Sequence[int]], bos: int, length: int) -> Int[np.ndarray, "row length"]:
    """Packs tokenised documents into rows (int64), each beginning with ``bos``.

    A ``bos`` also marks every document's start inside a row; one that falls on the first column
    serves as the row's own. Every token comes once, in order; the incomplete last row is dropped.
    """
    packed = [np.asarray([bos, *document], dtype=np.int64) for document in documents]
    stream = np.concatenate(packed or [np.zeros(0, dtype=np.int64)])
    rows, position = [], 0
    while True:
        own = 0 if position < len(stream) and stream[position] == bos else 1
        end = position + length - own
        if end > len(stream):
            break
        rows.append(np.concatenate([np.full(own, bos, dtype=np.int64), stream[position:end]]))
        position = end
    return np.stack(rows) if rows else np.empty((0, length), dtype=np.int64)


PILE_SAMPLE = "NeelNanda/pile-10k"
#: What to do without a data set of the hub.
NO_DATASET = "use a local text, or the default held-out prose, which needs no network"


@dataclass(frozen=True)
class Prompts:
    """Token ids ``[prompt, position]`` to measure on, and where they come from.

    ``last_row_left_out``: all rows of a token file were wanted, and the last of them has no partner.
    ``unseen``: so many other prompts of the same source as were asked for.
    """

    tokens: Int[np.ndarray, "prompt position"]
    source: str
    last_row_left_out: bool = False
    unseen: Int[np.ndarray, "other position"] | None = None

    @property
    def sha256(self) -> str:
        ids = np.ascontiguousarray(self.tokens, dtype="<i8")
        return hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes()).hexdigest()


def remarks_on_pairs(prompts: Prompts, ablation: str, has_donors: bool) -> list[str]:
    """What a reader should know of prompts that are each other's donors, one line each.

    ``has_donors``: whether the kind of ``ablation`` puts in what donors have.

    Raises:
        UserError: it does, and every prompt's donor is that prompt again.
    """
    lines, n_taken = [], len(prompts.tokens)
    if prompts.last_row_left_out:
        n_rows = n_taken + 1 + (0 if prompts.unseen is None else len(prompts.unseen))
        lines.append(
            f"{prompts.source}: its last row is left out: prompts are each other's donors in pairs, and it "
            f"has {n_rows}"
        )
    first, partners = np.split(prompts.tokens, 2)
    n_equal = int((first == partners).all(-1).sum()) if has_donors else 0
    if n_equal == len(first):
        raise UserError(
            f"{prompts.source}: every prompt is the same as its donor (row i of {n_taken} as row "
            f"i + {n_taken // 2}), so that {ablation} ablation changes nothing: give other rows, or another "
            "order"
        )
    if n_equal:
        lines.append(
            f"{prompts.source}: {n_equal} of {len(first)} pairs of prompts are twice the same prompt, where "
            f"{ablation} ablation changes nothing"
        )
    return lines


def load_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Path | None = None,
    dataset: str | None = None,
    tokens: str | Path | None = None,
    n_prompts: int | None = None,
    prompt_len: int = 128,
    seed: int = 0,
    n_unseen: int = 0,
) -> Prompts:
    """``n_prompts`` prompts from the held-out prose (default), a text file or folder, a dataset of the
    Hugging Face hub (``pile`` is its Pile sample), or an ``.npy`` of token ids ``[n_prompts, prompt_len]``.

    Documents are concatenated and cut into prompts that each begin with BOS; which are taken, and in
    which order, is drawn from ``seed``. The rows of a token file are taken from the first on, in the file's
    order, so that the donor of row ``i`` of ``n`` is row ``i + n/2``. Without ``n_prompts``, all of them (one
    fewer if odd) but ``n_unseen``: that many are drawn besides, of a token file from its next rows.

    Raises:
        UserError: more than one source; ``n_prompts`` odd, not positive or, with ``n_unseen``, more than
            there are; ``prompt_len`` below 2 or beyond any model's context; missing or malformed file.
    """
    if sum(source is not None for source in (text, dataset, tokens)) > 1:
        raise UserError("give one of a token file, a text or a dataset, not several")
    if n_prompts is not None and (n_prompts < 2 or n_prompts % 2):
        raise UserError(
            "n_prompts must be a positive even number (prompts are each other's donors in pairs), "
            f"not {n_prompts}"
        )
    if not 2 <= prompt_len <= LONGEST_PROMPT:
        raise UserError(f"prompt_len must be from 2 to {LONGEST_PROMPT}, not {prompt_len}")
    if tokens is not None:
        rows, source = _load_ids(Path(tokens)), str(tokens)
        further = rows[:0]
    elif dataset is not None:
        source = _dataset_name(dataset)
        documents = _dataset_documents(source)
        rows = _pack_until(documents, tokenizer, prompt_len, n_prompts)
        further = _pack_until(documents, tokenizer, prompt_len, n_unseen) if n_unseen else rows[:0]
    else:
        path = HELD_OUT_TEXT if text is None else Path(text)
        source = "held-out prose" if text is None else str(text)
        rows = _pack_until(iter(read_documents(path)), tokenizer, prompt_len, None)
        further = rows[:0]
    found = len(rows) + len(further)
    available = (found - n_unseen) // 2 * 2
    if available < (n_prompts or 2):
        beside = f" and {n_unseen} others that nothing is measured on" if n_unseen else ""
        wanted = f"one pair{beside} is needed" if n_prompts is None else f"{n_prompts}{beside} were asked for"
        ways = ["lower n_prompts"] if available >= 2 else ["lower prompt_len"] if tokens is None else []
        ways += ["add text" if tokens is None else "add rows"]
        raise UserError(
            f"{source}: gives {found} prompts of {rows.shape[1]} tokens; {wanted}: {' or '.join(ways)}"
        )
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))
    order = np.arange(len(rows)) if tokens is not None else drawn
    left_out = tokens is not None and n_prompts is None and (found - n_unseen) % 2 == 1
    taken, rest = np.split(rows[order], [n_prompts or available])
    return Prompts(taken, source, left_out, np.concatenate([further, rest])[:n_unseen])


def identity_of_dataset(dataset: str) -> str:
    """What tells a data set of :func:`load_tokens` from others of its name.

    Raises:
        UserError: as :func:`~selfrepair.text.hub_datasets.dataset_identity`.
    """
    return dataset_identity(_dataset_name(dataset), NO_DATASET)


def _dataset_name(dataset: str) -> str:
    return PILE_SAMPLE if dataset == "pile" else dataset


def hash_documents(documents: Iterable[str]) -> str:
    """SHA-256 of documents, their borders included."""
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode()
        digest.update(f"{len(encoded)} ".encode() + encoded)
    return digest.hexdigest()


def _load_ids(path: Path) -> Int[np.ndarray, "prompt position"]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = np.lib.format.read_array(file, allow_pickle=False)
            rest = file.read(1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # NumPy raises many types for a damaged header
        raise UserError(f"{path}: not an .npy file of token ids") from error
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[1] < 2:
        raise UserError(f"{path}: must hold integer token ids [n_prompts, prompt_len], prompt_len at least 2")
    if rest:
        raise UserError(
            f"{path}: damaged: longer than its {ids.shape[0]} prompts of {ids.shape[1]} {ids.dtype} token ids"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() <= np.iinfo(np.int64).max:
        raise UserError(f"{path}: holds a negative token id, or one that is too large")
    return ids.astype(np.int64)


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What prompts begin with: BOS, or EOS of a tokenizer that has none.

    Raises:
        UserError: it has neither, or reads no text.
    """
    check_reads_text(tokenizer)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no BOS and no EOS token to begin prompts with; "
            "name its bos_token in tokenizer_config.json, or give a token file to sweep"
        )
    return bos


def _pack_until(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, length: int, n_rows: int | None
) -> Int[np.ndarray, "row position"]:
    """Packs documents, tokenising no more of them than ``n_rows`` rows need (plus a few)."""
    bos = first_token(tokenizer)
    encoded: list[list[int]] = []
    n_tokens = 0
    while batch := list(itertools.islice(documents, 100)):
        for part in _parts(batch):
            encoded += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        n_tokens += sum(map(len, encoded[-len(batch) :]))
        if n_rows is not None and n_tokens >= n_rows * length:
            break
    return pack(encoded, bos, length)


def _parts(documents: list[str]) -> Iterator[list[str]]:
    """The documents in order, in lists of about ``CHARACTERS_AT_ONCE``."""
    ends = itertools.accumulate(map(len, documents))
    for _, part in itertools.groupby(
        zip(ends, documents, strict=True), lambda item: item[0] // CHARACTERS_AT_ONCE
    ):
        yield [document for _, document in part]


def _dataset_documents(name: str) -> Iterator[str]:
    for row in dataset_rows(name, NO_DATASET, streaming=True):
        if "text" not in row:
            raise UserError(f"dataset {name}: has no column 'text'")
        yield row["text"]
