"""Refreshing what is committed from a run: notebooks, figures, the page, the README's claims."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from selfrepair.errors import UserError
from selfrepair.paths import FIGURES, README
from selfrepair.run.notebooks import all_notebooks, without_widgets, write_notebook
from selfrepair.run.page import write_page
from selfrepair.run.study import Study
from selfrepair.store.files import write_atomically

CLAIMS = ("\n## Claims\n\n", "\nThe rules behind the verdicts")


def update_committed(study: Study, summarise: Callable[[], object]) -> None:
    """Executes every notebook in its place; copies the figures, claims and page that they make.

    ``summarise`` writes the run's page and manifest once the notebooks have run. Nothing is
    changed unless every notebook ran through.

    Raises:
        UserError: a notebook's cell failed, or the README has no section of claims.
    """
    executed = {notebook.path: _executed(notebook.path) for notebook in all_notebooks()}
    readme = README.read_text(encoding="utf-8")
    before, begin, rest = readme.partition(CLAIMS[0])
    _, end, after = rest.partition(CLAIMS[1])
    if not (begin and end):
        raise UserError(f"{README}: has no section 'Claims' that ends with '{CLAIMS[1].strip()} …'")
    summarise()  # first: its manifest says whether files differ from the commit
    for path, notebook in executed.items():
        write_notebook(notebook, path)
    out_dir, target = study.out_dir, FIGURES / study.profile.name
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


def _executed(path: Path) -> nbformat.NotebookNode:
    print(f"{path.stem}: running in its place", file=sys.stderr)
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": os.fspath(path.parent)}}
    try:
        NotebookClient(
            notebook, timeout=None, kernel_name="python3", resources=where, coalesce_streams=True
        ).execute()
    except CellExecutionError as error:
        raise UserError(
            f"{path.stem}: {error.ename}: {str(error.evalue).splitlines()[0]}; nothing was changed"
        ) from error
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    return without_widgets(notebook)
