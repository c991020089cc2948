"""Refreshing what is committed from a run: notebooks, figures, the page, the README's claims."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat

from selfrepair.errors import UserError
from selfrepair.paths import FIGURES, README
from selfrepair.run.notebooks import Notebook, all_notebooks, write_notebook
from selfrepair.run.page import write_page
from selfrepair.run.study import Study
from selfrepair.store.files import write_atomically

CLAIMS = ("\n## Claims\n\n", "\nThe rules behind the verdicts")


def update_committed(study: Study, summarise: Callable[[], object]) -> None:
    """Puts a run's outputs into the notebooks; copies its figures, claims and page.

    ``summarise`` writes the run's page and manifest again, which say what is committed now, and refuses a run
    of anything else than today's notebooks and code. Nothing is changed then.

    Raises:
        UserError: as ``summarise``, or the README has no section of claims.
    """
    readme = README.read_text(encoding="utf-8")
    before, begin, rest = readme.partition(CLAIMS[0])
    _, end, after = rest.partition(CLAIMS[1])
    if not (begin and end):
        raise UserError(f"{README}: has no section 'Claims' that ends with '{CLAIMS[1].strip()} …'")
    summarise()
    out_dir, target = study.out_dir, FIGURES / study.profile.name
    for notebook in all_notebooks():
        executed = _with_outputs(notebook, out_dir / "notebooks" / notebook.path.name)
        write_notebook(executed, notebook.path)
    target.mkdir(parents=True, exist_ok=True)
    page = write_page(out_dir, target / "index.html")
    made = sorted((out_dir / "figures").iterdir())
    for file in made:
        shutil.copyfile(file, target / file.name)
    for file in target.iterdir():
        if file.name not in {page.name, *(one.name for one in made)}:
            file.unlink()  # no notebook draws it any more
    claims = (out_dir / "figures" / "claims.md").read_text(encoding="utf-8")
    write_atomically(README, f"{before}{begin}{claims}{end}{after}".encode())


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
