"""Assignments: what solutions, blank releases and wrong solutions get, and what a release holds."""

import ast
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import course_notebooks
import pytest
from course_notebooks import (
    ASSIGNMENTS,
    LEFT_OUT,
    SEED,
    WRONG,
    cells,
    points_of,
    source,
    wrong_solutions,
)
from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions

AUTOMATIC = {"A6": 20}  # by hand: the rest of 100
MARKS = ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN", "END HIDDEN")


@pytest.fixture(scope="module")
def grade():
    """In a process of its own, in which signatures are not checked: that would take three times as long."""
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        yield lambda *arguments, **settings: other.submit(
            course_notebooks.grade, *arguments, **settings
        ).result()


@pytest.fixture(scope="module", params=ASSIGNMENTS)
def assignment(request):
    return request.param


def test_points_sum_to_a_hundred(assignment):
    notebook = source(assignment)
    automatic = sum(points_of(notebook).values())
    by_hand = sum(
        cell.metadata.nbgrader.points for cell in cells(notebook, grade=True, solution=True).values()
    )
    assert (automatic, by_hand) == (AUTOMATIC.get(assignment, 70), 100 - AUTOMATIC.get(assignment, 70))


@pytest.mark.slow("an assignment's tests tell right from wrong")
@pytest.mark.parametrize("seed", [SEED, "7"])
def test_the_solution_gets_all_points(assignment, seed, grade):
    graded = grade(source(assignment), seed=seed)
    assert graded.points == points_of(source(assignment)), graded.said
    assert graded.said == {} and graded.close == []


@pytest.mark.slow("an assignment's tests tell right from wrong")
def test_the_blank_release_gets_none(assignment, grade):
    """Every test calls what the student writes, so none passes by itself."""
    blank, _ = ClearSolutions().preprocess(source(assignment), {})
    graded = grade(blank)
    assert set(graded.points.values()) == {0}, graded.points


@pytest.mark.slow("an assignment's tests tell right from wrong")
@pytest.mark.parametrize("wrong", wrong_solutions(), ids=lambda wrong: f"{wrong.assignment}: {wrong.name}")
def test_a_wrong_solution_gets_exactly_these_points(wrong, grade):
    """And would, did tests allow errors a hundred times as large: no mistake fails by little."""
    graded = grade(wrong.made_in(source(wrong.assignment)))
    assert graded.close == []
    assert graded.points == points_of(source(wrong.assignment)) | wrong.points, graded.said
    assert sum(graded.points.values()) < sum(points_of(source(wrong.assignment)).values())


@pytest.mark.slow("an assignment's tests tell right from wrong")
def test_an_answer_left_out_costs_its_own_tests_only(assignment, grade):
    """Later questions get their inputs from elsewhere."""
    for where, cell in cells(source(assignment), solution=True, grade=False).items():
        functions = {node.name for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)}
        notebook = source(assignment)
        cells(notebook)[where].source = LEFT_OUT
        graded = grade(notebook)
        lost = {name for name, points in graded.points.items() if not points}
        tests = {name: set(re.findall(r"\w+", cells(notebook)[name].source)) for name in graded.points}
        about = {name for name, words in tests.items() if functions & words}
        assert lost <= about, f"{where}: {graded.said}"
        assert bool(lost) == bool(about), f"{where}: no test is about it"


def test_every_assignment_has_wrong_solutions():
    assert {wrong.assignment for wrong in wrong_solutions()} == set(ASSIGNMENTS)
    assert {file.stem for file in WRONG.iterdir()} == set(ASSIGNMENTS)


def test_cells_are_what_nbgrader_expects(assignment):
    notebook = source(assignment)
    names = [cell.metadata.nbgrader.grade_id for cell in notebook.cells if "nbgrader" in cell.metadata]
    assert len(names) == len(set(names))
    assert all("nbgrader" in cell.metadata for cell in notebook.cells if cell.cell_type == "code")
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
        about = cell.metadata.get("nbgrader", {})
        assert ("BEGIN SOLUTION" in cell.source) == bool(about.get("solution"))
        assert ("BEGIN HIDDEN" in cell.source) <= bool(about.get("grade") and not about.get("solution"))
        assert all(len(line) <= 120 for line in cell.source.splitlines() if cell.cell_type == "code"), (
            cell.source
        )
    for name, cell in cells(notebook, grade=True, solution=False).items():
        last = ast.parse(cell.source).body[-1]
        assert isinstance(last, ast.For | ast.Assert | ast.With | ast.Try) or _is_check(last), (
            f"{name}: a last value that is a number would be taken for partial credit"
        )


def _is_check(node):
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith("check")


def test_a_release_holds_no_solution_hidden_test_or_output(assignment):
    release = source(assignment)
    for preprocessor in (ClearSolutions(), ClearHiddenTests()):
        release, _ = preprocessor.preprocess(release, {})
    text = "\n".join(cell.source for cell in release.cells)
    assert not any(mark in text for mark in MARKS) and "hidden_examples" not in text
    original = source(assignment)
    for name, cell in cells(original, solution=True).items():
        solution = re.search(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", cell.source, re.S)[1]
        assert solution.strip() not in text, name
