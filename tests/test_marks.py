"""Every test that is not in the quick loop says what it protects, and tests/README.md lists them all."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = ("slow", "slurm", "gpu", "after_run")


def mark_of(node):
    """(kind, what it protects) of ``pytest.mark.slow("...")``, or None."""
    text = ast.unparse(node)
    found = re.match(rf"pytest\.mark\.({'|'.join(KINDS)})\b", text)
    return found and (found[1], ast.literal_eval(node.args[0]))


def marked(file):
    """The marked tests of a file, or the file itself if it is marked as a whole."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marks = node.value.elts if isinstance(node.value, ast.List) else [node.value]
            yield from ((file.name, *mark) for mark in map(mark_of, marks) if mark)
        elif isinstance(node, ast.FunctionDef):
            yield from (
                (f"{file.name}::{node.name}", *mark) for mark in map(mark_of, node.decorator_list) if mark
            )


def test_the_readme_lists_every_test_outside_the_quick_loop():
    rows = re.findall(
        r"^\| `(.+?)` \| (\w+) \| (.+?) \|$", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    wanted = [found for file in sorted(HERE.glob("test_*.py")) for found in marked(file)]
    assert wanted, "no test is slow"
    assert sorted(rows) == sorted(wanted)


def test_the_readme_says_what_every_file_is_for():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    helpers = {file.name for file in HERE.glob("*.py") if not file.name.startswith("test_")}
    assert {name for name in helpers if f"`{name}`" not in text} == set()


CASES = {
    "def test_a(): pass": {"test_a": "fast"},
    "@pytest.mark.slow('x is right')\ndef test_a(): pass": {"test_a": "slow"},
    "pytestmark = pytest.mark.slurm('x')\ndef test_a(): pass\nclass TestB:\n    def test_b(self): pass": {
        "test_a": "slurm",
        "test_b": "slurm",
    },
    "@pytest.mark.parametrize('name', ['gpt2', 'opt', 3])\ndef test_a(name): pass": {
        "test_a[gpt2]": "fast",
        "test_a[opt]": "slow",
        "test_a[3]": "fast",
    },
    "@pytest.mark.gpu('x')\n@pytest.mark.parametrize('name', ['opt'])\ndef test_a(name): pass": {
        "test_a[opt]": "gpu",
    },
}


@pytest.mark.parametrize("text", CASES)
def test_every_test_has_exactly_one_mark(pytester, text):
    pytester.makeconftest(conftest())
    pytester.makepyfile(f"import pytest\n{text}\n")
    items = pytester.inline_genitems()[0]
    assert {
        item.name: [m.name for m in item.iter_markers() if m.name in ("fast", *KINDS)] for item in items
    } == {name: [kind] for name, kind in CASES[text].items()}


@pytest.mark.parametrize("mark", ["slow", "slow()", "gpu('x') @slow('y')"])
def test_marks_without_a_reason_or_of_two_kinds_are_refused(pytester, mark):
    decorators = "\n".join(f"@pytest.mark.{one}" for one in mark.split(" @"))
    pytester.makeconftest(conftest())
    pytester.makepyfile(f"import pytest\n{decorators}\ndef test_a(): pass\n")
    said = pytester.runpytest_inprocess("--collect-only")
    assert said.ret == pytest.ExitCode.USAGE_ERROR


def conftest():
    """What this folder's conftest.py does with marks, alone."""
    tree = ast.parse((HERE / "conftest.py").read_text(encoding="utf-8"))
    wanted = ("KINDS", "pytest_collection_modifyitems")
    kept = [
        node
        for node in tree.body
        if ast.unparse(node).split(" ")[0] in wanted or getattr(node, "name", "") in wanted
    ]
    return "import pytest\nfrom collections import Counter\n" + "\n".join(map(ast.unparse, kept))
