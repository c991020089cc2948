"""The whole way of an assignment with nbgrader's own commands, and what students' faults do to it."""

import copy
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import browser
import nbformat
import pytest
from course_notebooks import ASSIGNMENTS, LEFT_OUT, SEED, cells, points_of, source
from nbgrader.api import Gradebook
from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions

from selfrepair.course.seed import COURSE, VARIABLE
from selfrepair.course.submissions import restored, unreadable
from selfrepair.paths import SHARED

A = "A1"
PATIENCE = 10  # seconds that the cell with an endless loop gets


def nbgrader(*arguments, folder):
    """What one of nbgrader's commands prints in a folder."""
    return python("-m", "nbgrader", *arguments, folder=folder)


def python(*arguments, folder):
    environment = os.environ | {VARIABLE: SEED, "PYTHONPATH": str(SHARED), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- cells that lost their names, in this process


@pytest.fixture
def release():
    notebook = source(A)
    for preprocessor in (ClearSolutions(), ClearHiddenTests()):
        notebook, _ = preprocessor.preprocess(notebook, {})
    return notebook


def solved(notebook):
    """A release with the solutions in it."""
    notebook = copy.deepcopy(notebook)
    for name, cell in cells(source(A), solution=True).items():
        lines = [line for line in cell.source.splitlines() if "###" not in line]
        cells(notebook)[name].source = "\n".join(lines)
    return notebook


@pytest.fixture
def of_source():
    return ClearHiddenTests().preprocess(source(A), {})[0]


def in_order(notebook):
    return [
        (cell.metadata.nbgrader.grade_id, cell.source)
        for cell in notebook.cells
        if cell.metadata.get("nbgrader")
    ]


def test_a_submission_that_is_whole_is_not_changed(release, of_source):
    submission = solved(release)
    assert restored(copy.deepcopy(submission), of_source) == submission


def without_names(submission):
    for cell in submission.cells:
        cell.metadata.pop("nbgrader", None)


def without_names_and_ids(submission):
    """As Colab leaves it."""
    without_names(submission)
    for number, cell in enumerate(submission.cells):
        cell["id"] = f"new-{number}"


def with_empty_names(submission):
    for cell in submission.cells:
        cell.metadata["nbgrader"] = {}
        cell["id"] = "x" + cell["id"]


def with_a_copied_cell(submission):
    place = submission.cells.index(cells(submission)["sigma"])
    copied = copy.deepcopy(submission.cells[place])
    copied.source = "def sigma(residual, epsilon, subtracts_mean):\n    return 0  # my first try"
    submission.cells.insert(place, copied)


def without_a_test(submission):
    submission.cells.remove(cells(submission)["sigma_rmsnorm"])


@pytest.mark.parametrize(
    "fault",
    [without_names, without_names_and_ids, with_empty_names, with_a_copied_cell, without_a_test],
    ids=lambda fault: fault.__name__,
)
def test_cells_get_their_names_back(release, of_source, fault):
    submission = solved(release)
    wanted = in_order(submission)
    fault(submission)
    assert in_order(submission) != wanted
    restored(submission, of_source)
    assert in_order(submission) == wanted


def test_a_solution_that_is_gone_is_put_in_as_one_that_raises(release, of_source):
    submission = solved(release)
    submission.cells.remove(cells(submission)["sigma"])
    restored(submission, of_source)
    names = [name for name, _ in in_order(submission)]
    assert names == [name for name, _ in in_order(release)]
    assert cells(submission)["sigma"].source == LEFT_OUT


# --- the whole way, with nbgrader's own commands


def faulty(notebook):
    """A syntax error, an endless loop, an import that is missing and words on the error stream."""
    changes = {
        "token_direction": "def token_direction(:",
        "sigma": "def sigma(residual, epsilon, subtracts_mean):\n    while subtracts_mean:\n        pass",
        "head_direct_effects": "import a_module_that_nobody_has\n"
        + cells(notebook)["head_direct_effects"].source,
        "logit_lens": "import sys\n"
        + cells(notebook)["logit_lens"].source.replace(
            "    return", "    print('?', file=sys.stderr)\n    return"
        ),
    }
    for name, text in changes.items():
        cells(notebook)[name].source = text
    return notebook


def always_removing_the_mean(notebook):
    cell = cells(notebook)["token_direction"]
    cell.source = cell.source.replace("if subtracts_mean:", "if True:")
    return notebook


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course of one assignment, released, handed in, graded, with points by hand and feedback."""
    folder = tmp_path_factory.mktemp("school") / "course"
    shutil.copytree(COURSE / "source" / A, folder / "source" / A)
    shutil.copy(COURSE / "nbgrader_config.py", folder)
    with (folder / "nbgrader_config.py").open("a", encoding="utf-8") as file:
        file.write(
            "config.Execute.timeout_func = lambda cell: "
            f"{PATIENCE} if cell.metadata.get('nbgrader', {{}}).get('grade_id') == 'sigma_layernorm' else 120\n"
        )
    nbgrader("generate_assignment", A, folder=folder)
    released = nbformat.read(folder / "release" / A / f"{A}.ipynb", as_version=4)
    handed_in = {
        "right": solved(released),
        "wrong": always_removing_the_mean(solved(released)),
        "faulty": faulty(solved(released)),
    }
    without_names_and_ids(nameless := solved(released))
    for student, notebook in (handed_in | {"colab": nameless}).items():
        (folder / "submitted" / student / A).mkdir(parents=True)
        nbformat.write(notebook, folder / "submitted" / student / A / f"{A}.ipynb")
    (folder / "submitted" / "damaged" / A).mkdir(parents=True)
    (folder / "submitted" / "damaged" / A / f"{A}.ipynb").write_text('{"cells": [')
    (folder / "submitted" / "renamed" / A).mkdir(parents=True)
    (folder / "submitted" / "renamed" / A / "mine.ipynb").write_text("{}")
    problems = unreadable(folder, A)
    for student in ("damaged", "renamed"):
        shutil.rmtree(folder / "submitted" / student)
    said = nbgrader("autograde", A, folder=folder)
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as gradebook:
        grade = gradebook.find_grade("why_centring", A, A, "right")
        grade.manual_score, grade.needs_manual_grade = 8, False
        gradebook.find_comment("why_centring", A, A, "right").manual_comment = "Which part of u is it?"
        gradebook.db.commit()
    nbgrader("generate_feedback", A, folder=folder)
    nbgrader("export", "--to=grades.csv", folder=folder)
    return folder, problems, said


@pytest.mark.slow("teachers can grade what students hand in, with nbgrader's own commands")
def test_what_cannot_be_read_is_named_in_a_line_each(course):
    _, problems, _ = course
    assert [line.partition(":")[0] for line in problems] == ["damaged", "renamed"]
    assert all("\n" not in line and ("ask for it" in line or "rename" in line) for line in problems)


@pytest.mark.slow("teachers can grade what students hand in, with nbgrader's own commands")
def test_everybody_is_graded(course):
    folder, _, said = course
    assert "ERROR] Traceback" not in said and "SAWarning" not in said
    lost = {
        "right": {},
        "colab": {},
        "wrong": {"direction_norm": 0},
        "faulty": dict.fromkeys(points_of(source(A)), 0),
    }
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as gradebook:
        for student, less in lost.items():
            (notebook,) = gradebook.find_submission(A, student).notebooks
            found = {
                grade.name: grade.auto_score for grade in notebook.grades if grade.cell.cell_type == "code"
            }
            assert found == points_of(source(A)) | less, student


@pytest.mark.slow("teachers can grade what students hand in, with nbgrader's own commands")
def test_an_endless_loop_and_words_on_the_error_stream_are_shown(course):
    folder, _, _ = course
    graded = cells(nbformat.read(folder / "autograded" / "faulty" / A / f"{A}.ipynb", as_version=4))
    assert any(output.get("ename") == "CellTimeoutError" for output in graded["sigma_layernorm"].outputs)
    assert any(output.get("name") == "stderr" for output in graded["lens_last_stage"].outputs)
    assert any(
        output.get("ename") == "ModuleNotFoundError" for output in graded["head_direct_effects"].outputs
    )


@pytest.mark.slow("teachers can grade what students hand in, with nbgrader's own commands")
def test_grades_as_a_table(course):
    folder, _, _ = course
    with (folder / "grades.csv").open(encoding="utf-8") as file:
        scores = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    assert scores == {"right": 78, "colab": 70, "wrong": 63, "faulty": 0}


@pytest.mark.slow("teachers can grade what students hand in, with nbgrader's own commands")
@pytest.mark.skipif(browser.PROGRAM is None, reason="needs Chromium")
def test_feedback_in_a_browser(course, tmp_path):
    folder, _, _ = course
    file = folder / "feedback" / "right" / A / f"{A}.html"
    with browser.Page(tmp_path / "browser") as page:
        page.open(file)
        text = page.run("document.body.innerText")
        page.screenshot(tmp_path / "feedback.png")
    assert "Score: 78.0 / 100.0" in text and "Which part of u is it?" in text
    assert "direction_by_hand" in text


@pytest.mark.slow("nbgrader's own check passes on every solution, on whole models too")
def test_nbgrader_validates_the_solutions():
    """Tests, and all other cells: none raises, none writes to the error stream."""
    files = [Path("source") / assignment / f"{assignment}.ipynb" for assignment in ASSIGNMENTS]
    said = nbgrader("validate", "--Validator.validate_all=True", *files, folder=COURSE)
    assert said.count("Success") == len(ASSIGNMENTS), said


# --- the release as ./run_all.sh --course makes it


#: nbgrader's command for several assignments, with one start.
GENERATE = """
import sys
from nbgrader.apps import GenerateAssignmentApp
for assignment in sys.argv[1:]:
    app = GenerateAssignmentApp()
    app.initialize([assignment])
    app.start()
"""


@pytest.mark.slow("one source makes what students get")
def test_releases_are_made_by_nbgrader(tmp_path):
    folder = tmp_path / "course"
    shutil.copytree(COURSE, folder, ignore=shutil.ignore_patterns("release", "gradebook.db", "seed"))
    python("-c", GENERATE, *ASSIGNMENTS, folder=folder)
    for assignment in ASSIGNMENTS:
        text = (folder / "release" / assignment / f"{assignment}.ipynb").read_text(encoding="utf-8")
        assert "SOLUTION" not in text and "HIDDEN" not in text and '"output_type"' not in text
        assert all(line in text for line in (*LEFT_OUT.splitlines(), "YOUR ANSWER HERE"))
