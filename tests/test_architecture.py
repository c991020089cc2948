"""The house: which room may import which, how deep that goes, and how large a module may be."""

import ast
import importlib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from selfrepair.paths import PACKAGE
from selfrepair.store.code_identity import _run_time_nodes, imported_files

#: Rooms, and those that they may import beside themselves and the modules at the top, which all of them may.
MAY_IMPORT = {
    "cli": {"run", "plots", "training", "analysis", "measure", "store", "engine", "text", "models"},
    "run": {"plots", "training", "analysis", "measure", "store", "engine", "text", "models"},
    "plots": {"analysis", "store"},
    "training": {"store", "text", "models"},
    "course": {"engine", "text", "models"},
    "analysis": {"store"},
    "measure": {"store", "engine", "text", "models"},
    "store": set(),
    "engine": {"models"},
    "text": {"models"},
    "models": set(),
    "top": set(),
}
TOP = {
    *("errors.py", "paths.py", "choices.py", "statistics.py"),
    *("yaml_files.py", "markdown.py", "file_identity.py"),
}
MOST_LEVELS, MOST_LINES, MOST_COLUMNS = 8, 350, 110

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [file for file in FILES if file.name != "__init__.py"]
HEAVY = {"torch", "transformers", "transformer_lens"}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room_of(file: Path) -> str:
    first, *rest = file.relative_to(PACKAGE).parts
    return first if rest else "top"


def longest_chain() -> list[Path]:
    """The longest chain of modules, each imported by the one before it."""
    chains: dict[Path, list[Path]] = {}
    for file in TopologicalSorter({file: imported_files(file) for file in MODULES}).static_order():
        chains[file] = [
            file,
            *max((chains[imported] for imported in imported_files(file)), key=len, default=[]),
        ]
    return max(chains.values(), key=len)


def test_every_module_is_in_a_room():
    assert {room_of(file) for file in FILES} == MAY_IMPORT.keys()
    assert {file.name for file in PACKAGE.glob("*.py")} == TOP | {"__init__.py"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room):
    wrong = [
        f"{name_of(file)} imports {name_of(imported)}"
        for file in MODULES
        if room_of(file) == room
        for imported in imported_files(file)
        if room_of(imported) not in {room, "top"} | MAY_IMPORT[room]
    ]
    assert wrong == []


def test_rooms_are_listed_from_the_top_down():
    order = list(MAY_IMPORT)
    assert all(
        order.index(room) < order.index(other) for room, others in MAY_IMPORT.items() for other in others
    )


def test_no_circles_and_no_more_than_eight_levels():
    try:
        chain = longest_chain()
    except CycleError as error:
        pytest.fail(" → ".join(map(name_of, error.args[1])))
    assert len(chain) <= MOST_LEVELS, " → ".join(map(name_of, chain))


@pytest.mark.parametrize("room", ["analysis", "store", "plots", "top"])
def test_what_only_reads_needs_no_torch(room):
    """Tables, claims and figures are made where no model can be; a manifest looks for the machine's
    accelerators alone."""
    wrong = [
        f"{name_of(file)}: {name}"
        for file in MODULES
        if room_of(file) == room and name_of(file) != "store/manifest.py"
        for name in imported_packages(file)
        if name in HEAVY
    ]
    assert wrong == []


def imported_packages(file: Path) -> set[str]:
    nodes = list(_run_time_nodes(ast.parse(file.read_text(encoding="utf-8"))))
    direct = {
        name.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for name in node.names
    }
    return direct | {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}


def test_imports_can_be_followed():
    """Code versions follow absolute imports of modules and names: not ``from .x``, ``import *`` or a package
    as an object."""
    wrong = []
    packages = {
        f"selfrepair.{folder.parent.relative_to(PACKAGE).as_posix().replace('/', '.')}"
        for folder in PACKAGE.rglob("*/__init__.py")
    }
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name.name}" for name in node.names]
                wrong += [
                    f"{name_of(file)}: {name}"
                    for name in names
                    if node.level or name.endswith(".*") or name in packages
                ]
            elif isinstance(node, ast.Import):
                wrong += [
                    f"{name_of(file)}: {name.name}"
                    for name in node.names
                    if name.name in {"selfrepair"} | packages
                ]
    assert wrong == []


def test_modules_are_no_longer_than_one_can_read():
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_lines_are_no_wider_than_a_half_screen():
    wide = {
        f"{name_of(file)}:{number}": len(line)
        for file in FILES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > MOST_COLUMNS
    }
    assert wide == {}


def test_every_package_says_what_it_is_and_hands_on_its_public_names():
    for file in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{name_of(file)} has no docstring"


def test_every_name_that_a_package_hands_on_is_there():
    for file in PACKAGE.rglob("*/__init__.py"):
        package = importlib.import_module(
            f"selfrepair.{file.parent.relative_to(PACKAGE).as_posix().replace('/', '.')}"
        )
        for name in getattr(package, "__all__", []):
            assert getattr(package, name) is not None
