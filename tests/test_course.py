"""Assignments: what solutions, blank releases and wrong solutions get, and what a release holds."""

import ast
import builtins
import os
import re
import runpy
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import course_notebooks
import pytest
from course_notebooks import (
    ASSIGNMENTS,
    LEFT_OUT,
    SEED,
    SHOWN,
    WRONG,
    cells,
    defined,
    points_of,
    rounded_source,
    source,
    wrong_solutions,
)
from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions
from traitlets.config import Config

from selfrepair.course import checks
from selfrepair.course.seed import COURSE
from selfrepair.paths import REPOSITORY

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
@pytest.mark.parametrize(("solution", "seed"), [(source, SEED), (source, "7"), (rounded_source, SEED)])
def test_the_solution_gets_all_points(assignment, solution, seed, grade):
    """In float32 too."""
    graded = grade(solution(assignment), seed=seed)
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
        functions = set(defined(cell))
        notebook = source(assignment)
        cells(notebook)[where].source = LEFT_OUT
        graded = grade(notebook)
        lost = {name for name, points in graded.points.items() if not points}
        tests = {name: set(re.findall(r"\w+", cells(notebook)[name].source)) for name in graded.points}
        about = {name for name, words in tests.items() if functions & words}
        assert lost <= about, f"{where}: {graded.said}"
        assert bool(lost) == bool(about), f"{where}: no test is about it"


def names_in(code, *kinds):
    """The names that code reads (``ast.Load``) or sets (``ast.Store``) anywhere, functions' insides included."""
    tree = ast.parse(code)
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, kinds)}
    if ast.Store in kinds:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.arg):
                found.add(node.arg if isinstance(node, ast.arg) else node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return found


def test_a_question_left_out_breaks_no_other(assignment):
    """Its cells use what given cells define and what they define themselves."""
    given, questions = set(dir(builtins)) | {"__name__"}, []
    for name, cell in cells(source(assignment)).items():
        about = cell.metadata.nbgrader
        if cell.cell_type != "code" or name in SHOWN:
            continue
        if about.solution:
            questions.append([])
        if about.solution or about.grade:
            questions[-1].append(cell.source)
        else:
            given |= names_in(cell.source, ast.Store)
    for question in questions:
        code = "\n".join(question)
        assert names_in(code, ast.Load) <= given | names_in(code, ast.Store), question[0]


def test_a_test_calls_the_checks_of_the_library(assignment):
    """And not what a student has called the same: its first line imports every check that it calls."""
    for name, cell in cells(source(assignment), grade=True, solution=False).items():
        called = {word for word in names_in(cell.source, ast.Load) if word.startswith("check")}
        first = ast.parse(cell.source).body[0]
        if called:
            assert isinstance(first, ast.ImportFrom) and first.module == checks.__name__, name
            assert {alias.name for alias in first.names} == called, name
            assert not cell.source.startswith("#"), f"{name}: its first line is hidden"
        students = (COURSE / "students.md").read_text(encoding="utf-8")
        assert all(f"`{word}`" in students for word in called)


#: By assignment, functions of the library that would be the answer to a question.
ANSWERS = {
    "A2": {"select_top", "select_each_top"},
    "A3": {"clipped_share", "clipped_floor"},
    "A6": {"select_top", "select_each_top", "clipped_share", "clipped_floor"},
}


def test_what_students_get_shows_no_answer(assignment):
    text = "\n".join(cell.source for cell in released(assignment).cells)
    assert not ANSWERS.get(assignment, set()) & set(re.findall(r"\w+", text))


def test_what_is_linked_can_be_found_wherever_the_file_lies(assignment):
    text = "\n".join(cell.source for cell in source(assignment).cells if cell.cell_type == "markdown")
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", text))
    notebooks = re.findall(r"`(notebooks/[^`]*)`", text)
    assert notebooks and all((REPOSITORY / name).is_file() for name in notebooks)


def test_the_table_names_what_students_write(assignment):
    readme = (COURSE / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| {assignment} "))
    written = [
        function
        for cell in cells(source(assignment), solution=True, grade=False).values()
        for function in defined(cell)
    ]
    assert sorted(re.findall(r"`(\w+)`", row)) == sorted(written)


def test_two_students_of_one_name_hand_in_two_files():
    """By the expressions that the page has for Canvas and Moodle."""
    readme = (COURSE / "README.md").read_text(encoding="utf-8")
    canvas, moodle = re.findall(r"named_regexp='([^']*)'", readme)
    for expression, files in (
        (canvas, ["adasmith_100_7001_A1.ipynb", "adasmith_LATE_200_7002_A1-1.ipynb"]),
        (
            moodle,
            ["Ada Smith_100_assignsubmission_file/A1.ipynb", "Ada Smith_200_assignsubmission_file/A1.ipynb"],
        ),
    ):
        found = [re.match(expression, f"downloaded/A1/extracted/archive/{file}") for file in files]
        assert [one["file_id"] for one in found] == ["A1", "A1"]
        assert [one["student_id"].rpartition("_")[2] for one in found] == ["100", "200"]


def test_a_warning_costs_no_points(monkeypatch):
    """Kernels inherit the variable from nbgrader."""
    for name in ("PYTHONWARNINGS", "HF_HUB_OFFLINE", "PATH", "PYTHONPATH", "JUPYTER_PREFER_ENV_PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("PYTHONWARNINGS")
    with warnings.catch_warnings():
        runpy.run_path(str(COURSE / "nbgrader_config.py"), {"get_config": Config})
    assert os.environ["PYTHONWARNINGS"] == "ignore"


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


def released(assignment):
    release = source(assignment)
    for preprocessor in (ClearSolutions(), ClearHiddenTests()):
        release, _ = preprocessor.preprocess(release, {})
    return release


def test_a_release_holds_no_solution_hidden_test_or_output(assignment):
    text = "\n".join(cell.source for cell in released(assignment).cells)
    assert not any(mark in text for mark in MARKS) and "hidden_examples" not in text
    original = source(assignment)
    for name, cell in cells(original, solution=True).items():
        solution = re.search(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", cell.source, re.S)[1]
        assert solution.strip() not in text, name
