"""Refreshing what is committed from a run: notebooks, figures, the page, claims, the README's findings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat

from selfrepair.analysis.claims import read_claims, results
from selfrepair.errors import UserError
from selfrepair.paths import FIGURES, README, REPOSITORY
from selfrepair.plots.style import reduced_png
from selfrepair.run.notebooks import Notebook, all_notebooks, write_notebook
from selfrepair.run.page import write_page
from selfrepair.run.study import Study
from selfrepair.store.files import write_atomically

CLAIMS_PAGE = REPOSITORY / "docs" / "claims.md"
#: Between which lines the claims of the page, and the findings of the README, are written.
CLAIMS = ("<!-- claims: written by ./run_all.sh --update -->\n", "<!-- end of claims -->\n")
FINDINGS = ("<!-- findings: written by ./run_all.sh --update -->\n", "<!-- end of findings -->\n")


def update_committed(study: Study, summarise: Callable[[], object]) -> None:
    """Puts a run's outputs into the notebooks; copies its figures, claims and page.

    ``summarise`` writes the run's page and manifest again, which say what is committed now, and refuses a run
    of anything else than today's notebooks and code. Nothing is changed then.

    Raises:
        UserError: as ``summarise``, or README or page of claims lack the lines between which to write.
    """
    around = {file: _around(file, marks) for file, marks in ((CLAIMS_PAGE, CLAIMS), (README, FINDINGS))}
    summarise()
    out_dir, target = study.out_dir, FIGURES / study.profile.name
    for notebook in all_notebooks():
        executed = _with_outputs(notebook, out_dir / "notebooks" / notebook.path.name)
        write_notebook(executed, notebook.path)
    target.mkdir(parents=True, exist_ok=True)
    made = sorted(file for file in (out_dir / "figures").iterdir() if file.suffix != ".pdf")
    page = write_page(out_dir, target / "index.html")
    for file in made:
        if file.suffix == ".png":
            write_atomically(target / file.name, reduced_png(file))
        else:
            shutil.copyfile(file, target / file.name)
    for file in target.iterdir():
        if file.name not in {page.name, *(one.name for one in made)}:
            file.unlink()  # no notebook draws it any more
    claims = (out_dir / "figures" / "claims.md").read_text(encoding="utf-8")
    findings = findings_table(out_dir / "figures" / "claims.csv")
    for (file, (before, after)), text in zip(around.items(), (claims, findings), strict=True):
        write_atomically(file, f"{before}{text}{after}".encode())


def findings_table(claims: Path) -> str:
    """The verdicts on each claim of a long table, in Markdown: on our models, and on published numbers.

    A claim that is judged on prose too, as ``<id>-prose``, has one row with both verdicts on our models.
    """
    verdicts: dict[str, list[str]] = {}
    rows = []
    for result in results(read_claims(claims)):
        claim = result.claim
        if (same := claim.id.removesuffix("-prose")) in verdicts:
            verdicts[same].append(f"on prose: {result.verdict_in_full}")
            continue
        verdicts[claim.id] = [result.verdict_in_full]
        rows.append((claim, result.published_verdict_in_full))
    lines = ["| | claim | pocket models | published |", "| --- | --- | --- | --- |"]
    for claim, published in rows:
        said = f"{claim.claim} ({claim.source})"
        cells = (claim.notebook, said, "<br>".join(verdicts[claim.id]), published)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _around(file: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """What stands before and after the place between two marks, these included.

    Raises:
        UserError: there is no such place.
    """
    before, begin, rest = file.read_text(encoding="utf-8").partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise UserError(f"{file}: has no line '{marks[0].strip()}' with '{marks[1].strip()}' below it")
    return before + begin, end + after


def _with_outputs(notebook: Notebook, executed: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of its run, whose cell of the run's own parameters is left out."""
    made = nbformat.read(executed, as_version=4)
    cells = [cell for cell in made.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    with_outputs = nbformat.read(notebook.path, as_version=4)
    count = 0
    for cell, of_the_run in zip(with_outputs.cells, cells, strict=True):
        if cell.cell_type != "code":
            continue
        count += 1
        cell.outputs, cell.execution_count = of_the_run.outputs, count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    return with_outputs
