import gzip
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrepair.errors import UserError
from selfrepair.measure.tokens import of_prompts
from selfrepair.text.corpora import hash_documents, load_tokens, pack, read_documents

BOS = 0
documents_of_tokens = st.lists(st.lists(st.integers(1, 50), max_size=40), max_size=12)


@given(documents_of_tokens, st.integers(2, 16))
def test_packing_loses_and_doubles_no_token(documents, length):
    rows = pack(documents, BOS, length)
    assert rows.shape[1] == length and (rows[:, 0] == BOS).all()
    stream = [token for document in documents for token in (BOS, *document)]
    position = 0
    for row in rows.tolist():  # replay: every row continues the stream exactly where the last one stopped
        wanted = row if position < len(stream) and stream[position] == BOS else row[1:]
        assert stream[position : position + len(wanted)] == wanted
        position += len(wanted)
    assert len(stream) - position < length


def test_packing_by_hand():
    rows = pack([[1, 2, 3, 4, 5], [6], [7, 8, 9, 10]], BOS, 4)
    assert rows.tolist() == [[0, 1, 2, 3], [0, 4, 5, 0], [0, 6, 0, 7], [0, 8, 9, 10]]
    assert pack([], BOS, 4).shape == (0, 4)


def test_rows_of_a_token_file_keep_their_order(tmp_path):
    """Whatever the seed: the first ``n`` are taken, and the donor of row ``i`` is row ``i + n/2`` of the file."""
    rows = np.arange(40).reshape(10, 4)
    np.save(tmp_path / "rows.npy", rows)
    for seed in (0, 7):
        taken = load_tokens(None, tokens=tmp_path / "rows.npy", n_prompts=6, seed=seed)
        assert taken.tokens.tolist() == rows[:6].tolist()
        assert of_prompts(taken)["donor"].values.tolist() == [3, 4, 5, 0, 1, 2]
    assert load_tokens(None, tokens=tmp_path / "rows.npy").tokens.tolist() == rows.tolist()


def test_documents_of_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\ntwo\n---\nthree\n")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("zero -- --- here\n")
    (tmp_path / "README.md").write_text("not text to measure")
    assert read_documents(tmp_path) == ["zero -- --- here", "one\n\ntwo", "three"]
    assert read_documents(tmp_path / "b.txt") == ["one\n\ntwo", "three"]


def test_lines_of_windows_divide_documents_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n---\r\ntwo\r\n --- \r\n")
    assert [document.split() for document in read_documents(tmp_path / "a.txt")] == [["one"], ["two", "---"]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "no such file"),
        ("binary.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("broken.txt.gz", b"\x1f\x8b no gzip", "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"a long enough text " * 99, mtime=0)[:-12], "cannot be read"),
        ("empty.txt", b"\n\n", "holds no text"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_documents(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_folder_without_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no \.txt"):
        read_documents(tmp_path)


def test_pack_keeps_integer_type():
    assert pack([[1, 2, 3]], BOS, 2).dtype == np.int64


@pytest.mark.parametrize("module", ("corpora", "facts"))
def test_text_is_read_without_torch(module):
    """So that a plan, which reads the held-out prose, takes no seconds to begin."""
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    code = f"import sys; import selfrepair.text.{module}; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_what_editors_keep_beside_a_text_is_not_read(tmp_path):
    """Emacs' lock is a link to nowhere; Vim's swap file, and a hidden copy, are no documents either."""
    (tmp_path / "story.txt").write_text("Once.")
    (tmp_path / ".#story.txt").symlink_to("me@here.1234:5678")
    (tmp_path / ".story.txt").write_text("Another.")
    (tmp_path / ".story.txt.swp").write_bytes(b"b0VIM\0")
    assert read_documents(tmp_path) == ["Once."]


def test_a_texts_hash_knows_where_its_documents_end():
    texts = (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["c", "ab"], ["ab", "ç"])
    assert len({hash_documents(documents) for documents in texts}) == len(texts)
