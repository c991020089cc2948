"""YAML that people write: every mistake in it is one line, and none takes memory without end."""

import pytest
import yaml

from selfrepair.errors import UserError
from selfrepair.yaml_files import read_yaml

#: Written out, its keys would be 9 ** 9 times what stands here.
NESTED_KEY = "\n".join(
    [
        "a: &a [x, x, x, x, x, x, x, x, x]",
        *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "? *i",
        ": models",
    ]
)


def test_a_nested_key_is_refused_without_being_written_out(tmp_path, monkeypatch):
    monkeypatch.setattr(yaml.Node, "__repr__", lambda node: pytest.fail("a node is written out"))
    file = tmp_path / "mine.yaml"
    file.write_text(NESTED_KEY)
    with pytest.raises(UserError, match=r"not YAML \(line \d+: found unhashable key\)"):
        read_yaml(file)


def test_a_key_given_twice_is_still_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("models: [a]\n? [b]\n: c\nmodels: [d]\n")
    with pytest.raises(UserError, match=r"line 4: 'models' is given twice"):
        read_yaml(file)
