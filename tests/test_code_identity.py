"""Code versions: an edit makes again what it has a part in, and leaves everything else alone."""

import ast
import shutil

import pytest

from selfrepair.measure.measurement import measurement_names
from selfrepair.paths import PACKAGE
from selfrepair.store import code_identity
from selfrepair.store.code_identity import code_files, code_version, imported_files, module_file


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    here = tmp_path_factory.mktemp("package") / "copy"
    return shutil.copytree(PACKAGE, here, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture
def package(copied, monkeypatch):
    """A copy of the package, which code versions are taken of; each test gets it unchanged."""
    monkeypatch.setattr(code_identity, "PACKAGE", copied)
    yield copied
    shutil.rmtree(copied / "made", ignore_errors=True)
    for file in (file for file in copied.rglob("*") if file.is_file()):
        original = PACKAGE / file.relative_to(copied)
        if not original.exists():
            file.unlink()
        elif file.stat().st_mtime_ns != original.stat().st_mtime_ns:
            shutil.copy2(original, file)


def write(package, name, text):
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text(text)


#: What a run makes: of measurements, the modules that make their numbers; of tables, claims and pages, those
#: that show them.
RESULTS = (
    "measure.tokens",
    "measure.heads",
    "measure.neurons",
    "measure.layers",
    "analysis.head_table",
    "analysis.claims",
    "text.facts",
    "plots.neurons",
    "run.page",
)
#: Edited file → some results that it has a part in, and some that it has none in.
EDITS = {
    "measure/heads.py": (
        ["measure.heads"],
        ["measure.tokens", "measure.neurons", "analysis.head_table", "plots.neurons"],
    ),
    "engine/direct_effect.py": (
        ["measure.heads", "measure.neurons"],
        ["measure.tokens", "analysis.head_table", "plots.neurons"],
    ),
    "engine/ablations.py": (
        ["measure.heads", "measure.neurons", "measure.layers"],
        ["measure.tokens", "plots.neurons"],
    ),
    "models/loading.py": (
        ["measure.heads", "measure.neurons", "measure.layers"],
        ["analysis.head_table", "plots.neurons"],
    ),
    "text/corpora.py": (["measure.tokens"], ["measure.heads", "analysis.head_table", "analysis.claims"]),
    "text/facts.yaml": (
        ["text.facts", "measure.layers"],
        ["measure.heads", "measure.tokens", "analysis.claims"],
    ),
    "statistics.py": (["analysis.head_table"], ["measure.heads", "measure.tokens"]),
    "measure/neurons.py": (["measure.neurons"], ["measure.heads", "measure.tokens", "analysis.head_table"]),
    "plots/neurons.py": (
        ["plots.neurons"],
        ["measure.heads", "measure.neurons", "analysis.head_table", "analysis.claims"],
    ),
    "analysis/claims.yaml": (
        ["analysis.claims", "run.page"],
        ["measure.heads", "measure.tokens", "analysis.head_table"],
    ),
    "analysis/statistics.yaml": (
        ["analysis.claims"],
        ["measure.heads", "measure.tokens", "analysis.head_table"],
    ),
    "run/page.html": (
        ["run.page"],
        ["measure.heads", "measure.neurons", "analysis.head_table", "analysis.claims"],
    ),
    "paths.py": (["measure.heads", "measure.tokens", "run.page"], []),
    "store/stores.py": ([], ["measure.heads", "measure.tokens", "analysis.head_table"]),
}


@pytest.mark.parametrize("edited", EDITS)
def test_an_edit_changes_what_it_has_a_part_in_and_nothing_else(package, edited):
    changes, stays = EDITS[edited]
    before = {name: code_version(f"selfrepair.{name}") for name in RESULTS}
    with (package / edited).open("a") as file:
        file.write("\n# edited\n")
    differing = {name for name in RESULTS if code_version(f"selfrepair.{name}") != before[name]}
    assert set(changes) <= differing and not differing & set(stays)


def test_a_notebooks_version_is_of_its_cells_and_of_what_they_import(package):
    cells = "from selfrepair.analysis.head_table import heads_table\n"
    drawing = cells + "from selfrepair.plots import neurons\n"
    versions = {code_version(source=text) for text in (cells, cells + "# more\n", drawing)}
    assert len(versions) == 3
    before = code_version(source=cells), code_version(source=drawing)
    write(package, "plots/neurons.py", "# others")
    assert code_version(source=cells) == before[0] and code_version(source=drawing) != before[1]
    write(package, "statistics.py", "# others")
    assert code_version(source=cells) != before[0]


def test_every_file_of_data_is_of_a_module_beside_it():
    named = {file for module in PACKAGE.rglob("*.py") for file in code_identity._data_files(module)}
    data = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert data <= named and data


@pytest.mark.parametrize("name", measurement_names())
def test_what_measures_does_not_hang_on_what_shows(name):
    folders = {file.relative_to(PACKAGE).parts[0] for file in code_files(f"selfrepair.measure.{name}")}
    assert "measure" in folders and not folders & {"analysis", "plots", "run", "cli", "training"}


def test_the_same_code_elsewhere_has_the_same_version(package):
    here = code_version("selfrepair.measure.heads")
    code_identity.PACKAGE, copy = PACKAGE, code_identity.PACKAGE
    assert code_version("selfrepair.measure.heads") == here and copy == package


# --- which files -------------------------------------------------------------------------------------------

IMPORTS = {
    "import selfrepair.made.leaf": {"leaf"},
    "import selfrepair.made.leaf as other": {"leaf"},
    "import os, selfrepair.made.leaf": {"leaf"},
    "from selfrepair.made.leaf import x": {"leaf"},
    "from selfrepair.made import leaf": {"leaf"},
    "from selfrepair.made import leaf as other, twig": {"leaf", "twig"},
    "from selfrepair.made import handed_on": {"leaf"},
    "from selfrepair.made import handed_on, also": {"leaf", "twig"},
    "def f():\n    from selfrepair.made.leaf import x": {"leaf"},
    "class A:\n    import selfrepair.made.leaf": {"leaf"},
    "try:\n    import selfrepair.made.leaf\nexcept ImportError:\n    import selfrepair.made.twig": {
        "leaf",
        "twig",
    },
    "if TYPE_CHECKING:\n    import selfrepair.made.leaf": set(),
    "if typing.TYPE_CHECKING:\n    from selfrepair.made import leaf, handed_on": set(),
    "if TYPE_CHECKING:\n    import selfrepair.made.leaf\nelse:\n    import selfrepair.made.twig": {"twig"},
    "import other.made.leaf": set(),
    "import selfrepairs.made.leaf": set(),
    "from selfrepair.made import nobody": set(),
    "x = 'selfrepair.made.leaf'": set(),
    "from selfrepair.made.branch import x": {"branch", "leaf"},
}
INIT = """import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"leaf": ["x", "handed_on"], "twig": ["also"]}
)
"""


@pytest.mark.parametrize("text", IMPORTS)
def test_imports_that_count(package, text):
    write(package, "made/__init__.py", INIT)
    write(package, "made/leaf.py", "x = handed_on = 1\n")
    write(package, "made/twig.py", "also = 2\n")
    write(package, "made/branch.py", "from selfrepair.made import handed_on\n")
    write(package, "made/user.py", text + "\n")
    ast.parse(text)
    found = {file.stem for file in code_files("selfrepair.made.user")}
    assert found == IMPORTS[text] | {"user"}
    assert {file.stem for file in code_files(source=text)} == IMPORTS[text]


def test_modules_that_import_each_other_end(package):
    write(package, "made/leaf.py", "import selfrepair.made.twig")
    write(package, "made/twig.py", "import selfrepair.made.leaf")
    assert [file.stem for file in code_files("selfrepair.made.leaf")] == ["leaf", "twig"]


def test_a_file_that_changes_while_this_runs_is_read_again(package):
    write(package, "made/leaf.py", "")
    write(package, "made/user.py", "")
    assert imported_files(package / "made/user.py") == []
    write(package, "made/user.py", "import selfrepair.made.leaf")
    assert imported_files(package / "made/user.py") == [package / "made/leaf.py"]


def test_data_counts_only_beside_the_module_that_names_it(package):
    write(package, "made/rules.yaml", "a: 1")
    write(package, "made/user.py", "FILE = 'rules.yaml'")
    write(package, "made/other.py", "'rules'")
    write(package, "plots/user.py", "FILE = 'rules.yaml'")
    assert [file.name for file in code_files("selfrepair.made.user")] == ["rules.yaml", "user.py"]
    assert all(len(code_files(f"selfrepair.{name}")) == 1 for name in ("made.other", "plots.user"))


def test_what_is_no_module_is_said(package):
    assert module_file("selfrepair.paths") == package / "paths.py"
    with pytest.raises(ModuleNotFoundError, match=r"selfrepair\.measure\.none"):
        code_version("selfrepair.measure.none")


def test_what_editors_keep_beside_the_sources_counts_for_nothing(package):
    """Emacs' locks are links to nowhere; Vim's swap files come and go with every file that is open."""
    before = {result: code_version(f"selfrepair.{result}") for result in RESULTS}
    for folder, name in (("measure", "heads.py"), ("analysis", "claims.yaml"), ("text", "facts.yaml")):
        (package / folder / f".#{name}").symlink_to("me@here.1234:5678")
        (package / folder / f".{name}.swp").write_bytes(b"b0VIM\0")
        (package / folder / f"#{name}#").write_text("saved now and then")
        (package / folder / f"{name}~").write_text("as it was before")
    try:
        assert {result: code_version(f"selfrepair.{result}") for result in RESULTS} == before
    finally:
        for folder in ("measure", "analysis", "text"):
            for link in (package / folder).glob(".#*"):
                link.unlink()
