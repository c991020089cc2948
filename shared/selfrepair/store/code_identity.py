"""Which code makes a result: the modules that it imports, directly or not, and data files that they name."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from selfrepair.paths import PACKAGE

ROOT = PACKAGE.name


def code_version(*modules: str, source: str = "") -> str:
    """Twelve hexadecimal digits that change with the code that ``modules`` and Python ``source`` run.

    ``modules`` are dotted names in this package, ``selfrepair.measure.heads``. What counts is everything in
    the import closure inside the package, imports within functions too, and the data files beside a module
    that it names in a string, such as ``claims.yaml``.
    """
    digest = hashlib.sha256(source.encode())
    for file in code_files(*modules, source=source):
        content = _content(file, *_state(file))
        digest.update(f"{file.relative_to(PACKAGE).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()[:12]


def code_files(*modules: str, source: str = "") -> list[Path]:
    """The files that :func:`code_version` hashes, in order of their paths."""
    pending = [*map(module_file, modules), *_imported(ast.parse(source))]
    found: set[Path] = set()
    while pending:
        file = pending.pop()
        if file in found:
            continue
        found.add(file)
        found.update(_data_files(file))
        pending += imported_files(file)
    return sorted(found)


def module_file(module: str) -> Path:
    """Where the source of a module of this package lies.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    file = _find(module)
    if file is None:
        raise ModuleNotFoundError(f"no module {module}", name=module)
    return file


def imported_files(file: Path) -> list[Path]:
    """Files of this package that a module of it imports when it runs, not for type checkers alone."""
    return list(_read(file).imports)


@dataclass(frozen=True)
class _Source:
    """What a module imports of this package, and its strings."""

    imports: tuple[Path, ...]
    strings: frozenset[str]


def _state(file: Path) -> tuple[int, int]:
    """Tells whether a file changed in this process: a plan asks for the same ones hundreds of times."""
    found = file.stat()
    return found.st_mtime_ns, found.st_size


@cache
def _content(file: Path, _changed: int, _size: int) -> bytes:
    return file.read_bytes()


def _read(file: Path) -> _Source:
    return _parse(file, *_state(file))


@cache
def _parse(file: Path, _changed: int, _size: int) -> _Source:
    tree = _parsed(file)
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    strings = frozenset(value for value in constants if isinstance(value, str))
    return _Source(tuple(sorted(set(_imported(tree)))), strings)


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imported(tree: ast.AST) -> Iterator[Path]:
    for node in _run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from _existing(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from _existing(_defining_module(node.module or "", name.name) for name in node.names)


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING``."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def _existing(modules: Iterable[str]) -> Iterator[Path]:
    """The files of those modules that are of this package; packages' ``__init__`` only hand names on."""
    for module in modules:
        file = _find(module)
        if file is not None and file.name != "__init__.py":
            yield file


def _find(module: str) -> Path | None:
    root, *parts = module.split(".")
    if root != ROOT:
        return None
    place = PACKAGE.joinpath(*parts)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _defining_module(module: str, name: str) -> str:
    """The module that ``from module import name`` gets its code from, through packages that hand names on."""
    if _find(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    file = _find(module)
    if file is None or file.name != "__init__.py":
        return module
    handed_on = {exported: submodule for submodule, names in _exports(file).items() for exported in names}
    return f"{module}.{handed_on[name]}" if name in handed_on else module


def _exports(package: Path) -> dict[str, list[str]]:
    """Submodule → names, as a package's ``__init__`` gives them to ``lazy_loader.attach``."""
    for node in ast.walk(_parsed(package)):
        if isinstance(node, ast.keyword) and node.arg == "submod_attrs":
            return ast.literal_eval(node.value)
    return {}


def _data_files(module: Path) -> list[Path]:
    """The files beside a module that one of its strings names."""
    folder, strings = module.parent, _read(module).strings
    return [file for file in _data_in(folder, *_state(folder)) if file.name in strings]


@cache
def _data_in(folder: Path, _changed: int, _size: int) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix != ".py" and file.is_file()]
