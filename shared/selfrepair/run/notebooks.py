"""Running the notebooks of a profile, each in a kernel of its own."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import nbformat
from filelock import FileLock

from selfrepair.errors import UserError
from selfrepair.paths import NOTEBOOKS
from selfrepair.run.marks import mark, say_done
from selfrepair.store.files import write_atomically

if TYPE_CHECKING:
    from selfrepair.run.study import Study


#: The form in which a widget is shown: it is alive only beside the kernel that made it.
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Notebook:
    """A numbered notebook of the repository: its text, and what it reads."""

    path: Path

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def number(self) -> str:
        return self.stem[:2]

    @cached_property
    def cells(self) -> list[nbformat.NotebookNode]:
        return nbformat.read(self.path, as_version=4).cells

    @property
    def source(self) -> str:
        """All cells as they are written; outputs do not count."""
        return "\n\n".join(
            f"{cell.cell_type} {cell.metadata.get('tags', '')}\n{cell.source}" for cell in self.cells
        )

    @property
    def code(self) -> str:
        return "\n\n".join(cell.source for cell in self.cells if cell.cell_type == "code")

    @property
    def measurements(self) -> list[str]:
        """Names of the measurements that it reads: what its cells give to ``study.measured``."""
        calls = (node for node in ast.walk(ast.parse(self.code)) if isinstance(node, ast.Call))
        asked = (
            call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "measured"
        )
        return sorted({str(ast.literal_eval(call.args[0])) for call in asked})

    def left(self, out_dir: Path) -> list[Path]:
        """What it left in a results folder: itself, figures, claims, and tables that cells name."""
        places = [out_dir / "notebooks" / self.path.name, out_dir / "claims" / f"{self.number}.csv"]
        tables = [table for table in out_dir.glob("*.csv") if f'"{table.name}"' in self.code]
        return (
            [place for place in places if place.is_file()]
            + sorted((out_dir / "figures").glob(f"{self.number}_*"))
            + tables
        )


def all_notebooks() -> list[Notebook]:
    """The numbered notebooks, in order."""
    return [Notebook(path) for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))]


def run_notebooks(
    profile: str, out_dir: Path, parameters: dict[str, object], jobs: int = 1, only: Sequence[str] = ()
) -> list[Path]:
    """Executes notebooks (all, or those that begin with one of ``only``) into a results folder.

    Raises:
        UserError: no such notebook, a parameter that a notebook does not have, or cells that failed: the
            other notebooks are run to the end all the same.
    """
    import papermill  # takes seconds, and a plan reads notebooks too

    sources = [notebook.path for notebook in all_notebooks()]
    unknown = [
        name for name in only if not name or not any(source.name.startswith(name) for source in sources)
    ]
    if unknown:
        raise UserError(
            f"no notebook begins with {', '.join(unknown)}; there are "
            f"{', '.join(source.stem for source in sources)}"
        )
    sources = [source for source in sources if not only or source.name.startswith(tuple(only))]
    parameters = {"profile": profile, "out_dir": str(out_dir.resolve()), **parameters}
    for source in sources:
        misspelt = set(parameters) - set(papermill.inspect_notebook(str(source)))
        if misspelt:
            raise UserError(f"{source.name}: has no parameter {', '.join(sorted(misspelt))}")
    target = out_dir / "notebooks"
    target.mkdir(parents=True, exist_ok=True)
    if jobs > 1:  # kernels inherit this: threads that spin while they wait would slow all of them
        os.environ.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // min(jobs, len(sources))))
        )
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        failures = [
            failure
            for failure in pool.map(lambda source: _run(source, target / source.name, parameters), sources)
            if failure
        ]
    if failures:
        raise UserError("; ".join(failures))
    return [target / source.name for source in sources]


def run_notebook_of(study: Study, profile: str, number: str, key: str) -> None:
    """Executes one notebook of a run and marks it as done, under the plan's ``key``.

    Raises:
        UserError: no notebook has that number; or as :func:`run_notebooks`.
    """
    numbered = {notebook.number: notebook for notebook in all_notebooks()}
    if number not in numbered:
        raise UserError(f"no notebook has the number {number!r}; there are {', '.join(numbered)}")
    run_notebooks(profile, study.out_dir, {"seed": study.seed, "device": study.device}, only=[number])
    say_done(
        mark(study.out_dir, "notebooks", number), numbered[number].left(study.out_dir), study.out_dir, key=key
    )


def _run(source: Path, target: Path, parameters: dict[str, object]) -> str | None:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    print(f"{source.stem}: running", file=sys.stderr)
    with FileLock(target.with_suffix(".lock")), TemporaryDirectory() as folder:
        # Sockets in a folder of its own: kernels that start at the same moment can be given the same TCP
        # port.
        sockets = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
        try:
            papermill.execute_notebook(
                str(source),
                str(target),
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                cwd=os.fspath(source.parent),
                config=sockets,
                coalesce_streams=True,  # else it is chance in how many pieces a cell's text is kept
            )
        except PapermillExecutionError as error:
            return (
                f"{source.stem}: cell {error.exec_count} failed with {error.ename}: "
                f"{(str(error.evalue).splitlines() or [''])[0]} (see {target})"
            )
        except DeadKernelError:
            return f"{source.stem}: its kernel died, from too little memory perhaps (see {target})"
    write_notebook(without_widgets(nbformat.read(target, as_version=4)), target)
    print(f"{source.stem}: done, {target}", file=sys.stderr)
    return None


def without_widgets(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook without its widgets: the pictures that they would change stay."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return notebook


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Whole or not at all, as the Jupyter programs write it."""
    write_atomically(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode())
