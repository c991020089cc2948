"""Assignments executed and graded in the test's own process, by nbgrader's rules."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import nbformat
import pytest
import torch
import yaml
from nbformat import NotebookNode
from nbgrader.preprocessors import ClearSolutions

from selfrepair.course import checks, examples
from selfrepair.course.checks import largest_distance
from selfrepair.course.plain import PlainModel, PlainRun
from selfrepair.course.seed import COURSE, VARIABLE
from selfrepair.engine import head_ablation
from selfrepair.models.loading import Model

#: What stands in a release in the place of a solution: nbgrader's own words, which raise an error.
LEFT_OUT = ClearSolutions().code_stub["python"]
WRONG = Path(__file__).parent / "wrong_solutions"
ASSIGNMENTS = sorted(folder.name for folder in (COURSE / "source").iterdir() if folder.is_dir())
SEED = "20261126"


def source(assignment: str) -> NotebookNode:
    return nbformat.read(COURSE / "source" / assignment / f"{assignment}.ipynb", as_version=4)


def cells(notebook: NotebookNode, **wanted: bool) -> dict[str, NotebookNode]:
    """By id, the cells whose nbgrader metadata has these values."""
    return {
        cell.metadata.nbgrader.grade_id: cell
        for cell in notebook.cells
        if "nbgrader" in cell.metadata
        and all(cell.metadata.nbgrader.get(name) == value for name, value in wanted.items())
    }


def points_of(notebook: NotebookNode) -> dict[str, int]:
    """Points of every cell that is graded automatically."""
    return {
        name: cell.metadata.nbgrader.points
        for name, cell in cells(notebook, grade=True, solution=False).items()
    }


@dataclass(frozen=True)
class Wrong:
    """A mistake in the solution cell ``where``, and the points that test cells get which do not get all."""

    assignment: str
    name: str
    where: str
    replace: str
    by: str
    points: dict[str, int]

    def made_in(self, notebook: NotebookNode) -> NotebookNode:
        cell = cells(notebook, solution=True)[self.where]
        assert cell.source.count(self.replace) == 1, f"{self.name}: not once in {self.where}"
        cell.source = cell.source.replace(self.replace, self.by)
        return notebook


def wrong_solutions() -> list[Wrong]:
    return [
        Wrong(file.stem, **entry)
        for file in sorted(WRONG.glob("*.yaml"))
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))
    ]


class Graded(NamedTuple):
    """Points by test cell; what cells said that failed; errors that the tolerance decided by less than 100-fold."""

    points: dict[str, int]
    said: dict[str, str]
    close: list[str]


#: Cells that show a student's functions on a whole model; no points depend on them.
SHOWN = ("whole_model", "figure")


def grade(notebook: NotebookNode, seed: str = SEED) -> Graded:
    """Runs the code cells in order; a test cell has all its points or, if it raises or writes an error, none.

    :data:`SHOWN` are left out: ``test_grading.py`` runs the solutions with them.

    Models, and what they give on some tokens, are those of earlier runs as long as nothing changed the
    models: what a new kernel would make.
    """
    points, said, close = {}, {}, []
    names = {"__name__": "__main__"}

    def decides(what, answer, right, limit):
        distance = largest_distance(answer, right)
        if limit < distance <= 100 * limit:
            close.append(f"{what}: {distance:.2g}")
        check_distance(what, answer, right, limit)

    check_distance = checks._check_distance
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), torch.enable_grad():
        matplotlib.use("agg")
        patch.setenv(VARIABLE, seed)
        patch.setattr(checks, "_check_distance", decides)
        for name in ("_random_model", "_pocket_model"):
            patch.setattr(examples, name, functools.partial(_kept, name))
        patch.setattr(PlainModel, "run", _run_once)
        patch.setattr(head_ablation, "ablate_heads", _ablate_once)
        for number, cell in enumerate(notebook.cells):
            about = cell.metadata.get("nbgrader", {})
            name = about.get("grade_id", f"cell {number}")
            if cell.cell_type != "code" or name in SHOWN:
                continue
            complaint = _run(cell.source, names)
            if complaint:
                said[name] = complaint
            if about.get("grade"):
                points[name] = 0 if complaint else about["points"]
    for key in [key for key, kept in _KEPT.items() if not kept.is_unchanged()]:
        del _KEPT[key]
    return Graded(points, said, close)


@dataclass
class Kept:
    """A model, what it was when it was made, and what it gave since."""

    model: PlainModel
    tensors: dict[str, torch.Tensor]
    forwards: list[object]
    given: dict[tuple, object] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PlainModel) -> Kept:
        tensors = {name: tensor.clone() for name, tensor in _tensors(model).items()}
        return cls(model, tensors, [vars(part).get("forward") for part in model.hf.modules()])

    def is_unchanged(self) -> bool:
        """Whether it has these weights, runs this code and has no hooks."""
        parts = list(self.model.hf.modules())
        if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            return False
        now = _tensors(self.model)
        return [vars(part).get("forward") for part in parts] == self.forwards and all(
            torch.equal(now[name], tensor) for name, tensor in self.tensors.items()
        )


_MAKE = {name: getattr(examples, name).__wrapped__ for name in ("_random_model", "_pocket_model")}
_KEPT: dict[tuple, Kept] = {}


def _kept(name: str, *arguments: object) -> PlainModel:
    key = name, *arguments
    if key not in _KEPT:
        _KEPT[key] = Kept.of(_MAKE[name](*arguments))
    return _KEPT[key].model


def _tensors(model: PlainModel) -> dict[str, torch.Tensor]:
    plain = {name: getattr(model, name) for name in ("gamma", "W_U", "W_O", "b_V", "W_out", "b_out")}
    return plain | dict(model.hf.state_dict())


def _once(kept: Kept | None, key: tuple, compute: Callable[[], object]) -> object:
    """A copy of what an unchanged model has given before, else what it gives now."""
    if kept is None or not kept.is_unchanged():
        return compute()
    if key not in kept.given:
        kept.given[key] = compute()
    return copy.deepcopy(kept.given[key])


_RUN, _ABLATE_HEADS = PlainModel.run, head_ablation.ablate_heads


def _run_once(model: PlainModel, tokens: torch.Tensor) -> PlainRun:
    kept = next((kept for kept in _KEPT.values() if kept.model is model), None)
    return _once(kept, ("run", _bytes(tokens)), lambda: _RUN(model, tokens))


def _ablate_once(library: Model, tokens: torch.Tensor, replacement: object, *more: object) -> object:
    kept = next((kept for kept in _KEPT.values() if kept.model.library is library), None)
    constants = [_bytes(values) for values in getattr(replacement, "values", ())]
    key = "ablate_heads", _bytes(tokens), type(replacement), *constants, *more
    return _once(kept, key, lambda: _ABLATE_HEADS(library, tokens, replacement, *more))


def _bytes(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.numpy().tobytes()


def _run(code: str, names: dict[str, object]) -> str:
    """What went wrong, or what was written to the error stream."""
    errors = io.StringIO()
    with (
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # as nbgrader_config.py has it
        try:
            exec(compile(code, "<cell>", "exec"), names)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return errors.getvalue()


def defined(cell: NotebookNode) -> list[str]:
    """The functions that a cell defines."""
    return [node.name for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)]


#: Makes a function give float32 wherever it gave float64.
ROUNDED = """
def {name}(*arguments, exact={name}):
    answer = exact(*arguments)
    if isinstance(answer, torch.Tensor) and answer.is_floating_point():
        return answer.float()
    return tuple(part.float() for part in answer) if isinstance(answer, tuple) else answer
"""


def rounded_source(assignment: str) -> NotebookNode:
    """The solution, with answers in float32; those that are read from a model stay as they are."""
    notebook = source(assignment)
    for name, cell in cells(notebook, solution=True, grade=False).items():
        if name != "neuron_activations":
            cell.source += "".join(ROUNDED.format(name=function) for function in defined(cell))
    return notebook


def edited(notebook: NotebookNode, change: Callable[[str], str], where: str) -> NotebookNode:
    """A notebook with one cell changed."""
    cell = cells(notebook)[where]
    cell.source = change(cell.source)
    return notebook
