"""Assignments executed and graded in the test's own process, by nbgrader's rules."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import nbformat
import pytest
import torch
import yaml
from nbformat import NotebookNode

from selfrepair.course import checks, examples
from selfrepair.course.seed import COURSE, VARIABLE

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
    """Points by test cell, and what cells said that failed."""

    points: dict[str, int]
    said: dict[str, str]


#: Cells that show a student's functions on a whole model; no points depend on them.
SHOWN = ("whole_model", "figure")


def grade(
    notebook: NotebookNode, coarser: float = 1.0, seed: str = SEED, skip: Collection[str] = SHOWN
) -> Graded:
    """Runs the code cells in order; a test cell has all its points or, if it raises or warns, none.

    ``coarser``: by what factor the tests allow larger errors. Models are made anew, as in a new kernel.
    """
    for made in (examples._random_model, examples._pocket_model):
        made.cache_clear()
    points, said, names = {}, {}, {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), torch.enable_grad():
        matplotlib.use("agg")
        patch.setenv(VARIABLE, seed)
        patch.setattr(
            checks, "TOLERANCE", {kind: coarser * limit for kind, limit in checks.TOLERANCE.items()}
        )
        for number, cell in enumerate(notebook.cells):
            about = cell.metadata.get("nbgrader", {})
            name = about.get("grade_id", f"cell {number}")
            if cell.cell_type != "code" or name in skip:
                continue
            complaint = _run(cell.source, names)
            if complaint:
                said[name] = complaint
            if about.get("grade"):
                points[name] = 0 if complaint else about["points"]
    return Graded(points, said)


def _run(code: str, names: dict[str, object]) -> str:
    """What went wrong, or what was written to the error stream."""
    errors = io.StringIO()
    with (
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
        try:
            exec(compile(code, "<cell>", "exec"), names)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return errors.getvalue()


def edited(notebook: NotebookNode, change: Callable[[str], str], where: str) -> NotebookNode:
    """A notebook with one cell changed."""
    cell = cells(notebook)[where]
    cell.source = change(cell.source)
    return notebook
