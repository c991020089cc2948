"""What comes back from students, made fit for grading: cells that lost their names get them back.

Copying a cell in JupyterLab repeats its name, Colab drops the names of all cells, and some students delete
tests. nbgrader stops at the first, for all students, and gives no points for the others.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions, NbGraderPreprocessor

Match = Callable[[NotebookNode], bool]


class RestoreCells(NbGraderPreprocessor):
    """Before grading, gives every cell of the source its one place in a submission.

    A cell without name is recognised by its id, by its text (given cells and tests), by the functions that
    it defines (solutions) or by the question above it (answers). What is not found is put in as the release
    has it. Of several cells with one name, the last counts.
    """

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        about = resources["nbgrader"]
        course = CourseDirectory(config=self.config)
        folder = course.format_path(
            course.source_directory, student_id=".", assignment_id=about["assignment"]
        )
        file = Path(folder) / f"{about['notebook']}.ipynb"
        source = nbformat.read(file, as_version=4)
        return restored(nb, ClearHiddenTests().preprocess(source, {})[0]), resources


def restored(submission: NotebookNode, source: NotebookNode) -> NotebookNode:
    """The submission with every named cell of ``source`` in it exactly once; other cells stay as they are."""
    cells = submission.cells
    for cell in _all_but_the_last_of_a_name(cells):
        del cell.metadata["nbgrader"]
    after = -1
    for index, wanted in enumerate(source.cells):
        if not _name(wanted):
            continue
        place = next((i for i, cell in enumerate(cells) if _name(cell) == _name(wanted)), None)
        if place is None:
            place = _nameless(cells, _matches(wanted, source.cells[index - 1], cells))
        if place is None:
            place = after + 1
            cells.insert(place, _as_released(wanted))
        cells[place].metadata["nbgrader"] = wanted.metadata["nbgrader"]
        after = place
    return submission


def _all_but_the_last_of_a_name(cells: list[NotebookNode]) -> Iterator[NotebookNode]:
    seen = set()
    for cell in reversed(cells):
        name = _name(cell)
        if name in seen or (not name and "nbgrader" in cell.metadata):
            yield cell
        elif name:
            seen.add(name)


def _name(cell: NotebookNode) -> str | None:
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def _nameless(cells: list[NotebookNode], matches: list[Match]) -> int | None:
    """The last cell without name that fits the first match which fits any."""
    for match in matches:
        fitting = [i for i, cell in enumerate(cells) if not _name(cell) and match(cell)]
        if fitting:
            return fitting[-1]
    return None


def _matches(wanted: NotebookNode, question: NotebookNode, cells: list[NotebookNode]) -> list[Match]:
    """What tells a cell of the source in a submission, best first."""

    def same_id(cell: NotebookNode) -> bool:
        return cell.cell_type == wanted.cell_type and cell.get("id") == wanted["id"]

    def same_text(cell: NotebookNode) -> bool:
        return cell.cell_type == wanted.cell_type and cell.source.strip() == wanted.source.strip()

    def same_functions(cell: NotebookNode) -> bool:
        return cell.cell_type == "code" and bool(_defined(wanted) & _defined(cell))

    def below_the_question(cell: NotebookNode) -> bool:
        above = cells[cells.index(cell) - 1] if cells.index(cell) else None
        return above is not None and above.source.strip() == question.source.strip()

    about = wanted.metadata["nbgrader"]
    if not about["solution"]:
        return [same_id, same_text]
    return [same_id, same_functions if wanted.cell_type == "code" else below_the_question]


def _defined(cell: NotebookNode) -> set[str]:
    """Names of the functions that a cell defines at its top, by lines if it is no valid code."""
    try:
        return {node.name for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)}
    except SyntaxError:
        lines = [line for line in cell.source.splitlines() if line.startswith("def ")]
        return {line.removeprefix("def ").partition("(")[0].strip() for line in lines}


def _as_released(wanted: NotebookNode) -> NotebookNode:
    """A cell of the source as if its student had left it out: grading puts the given text and tests in."""
    cell = nbformat.from_dict(wanted)
    if wanted.metadata["nbgrader"]["solution"]:
        stubs = ClearSolutions()
        cell.source = stubs.code_stub["python"] if wanted.cell_type == "code" else stubs.text_stub
    return cell


def unreadable(course: Path, assignment: str) -> list[str]:
    """One line for each submission that is no notebook, or has none of the assignment's name."""
    lines = []
    for folder in sorted((course / "submitted").glob(f"*/{assignment}")):
        file = folder / f"{assignment}.ipynb"
        student = folder.parent.name
        if not file.is_file():
            lines.append(f"{student}: no {file.name} in {folder}; rename what was handed in")
            continue
        try:
            nbformat.read(file, as_version=4)
        except Exception as error:  # whatever a damaged file makes nbformat raise
            lines.append(f"{student}: {file} is no notebook ({type(error).__name__}); ask for it once more")
    return lines


if __name__ == "__main__":
    problems = [line for name in sys.argv[1:] for line in unreadable(Path.cwd(), name)]
    print("\n".join(problems or ["all submissions can be read"]))
    sys.exit(bool(problems))
