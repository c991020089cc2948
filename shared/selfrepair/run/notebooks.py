"""Running the notebooks of a profile, each in a kernel of its own."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from filelock import FileLock

from selfrepair.errors import UserError
from selfrepair.models.checkpoints import model_identity, short_name
from selfrepair.paths import ARMS, HELD_OUT_TEXT, NOTEBOOKS, PACKAGE, PUBLISHED
from selfrepair.run.marks import mark, say_done
from selfrepair.run.profiles import whole_profile
from selfrepair.store.code_identity import code_files, code_version
from selfrepair.store.files import identity, slug, write_atomically
from selfrepair.store.stores import open_store
from selfrepair.text.corpora import hash_documents, read_documents

if TYPE_CHECKING:
    from jupyter_client import AsyncKernelManager

    from selfrepair.run.study import Study

#: Bytes of the longest folder that paths of sockets can begin with: 107, less ``/tmpabcdefgh/kernel-5``.
LONGEST_FOR_SOCKETS = 86
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

    def files(self, study: Study) -> list[str]:
        """What it may leave in a results folder: itself, its claims, figures and tables that cells name.

        A figure may be one for each model (:func:`selfrepair.plots.style.save_of_model`).
        """
        figures = sorted(set(re.findall(rf'"({self.number}_\w+)"', self.code)))
        if "save_of_model(" in self.code:
            figures += [
                f"{name}-{slug(short_name(model))}" for name in figures for model in study.profile.models
            ]
        tables = sorted(set(re.findall(r'"([\w-]+\.csv)"', self.code)))
        if "write_heads(" in self.code:
            tables += [f"heads_{ablation}.csv" for ablation in study.profile.ablations]
        return [
            f"notebooks/{self.path.name}",
            f"claims/{self.number}.csv",
            *(f"figures/{name}.{suffix}" for name in figures for suffix in ("png", "pdf")),
            *tables,
        ]

    def left(self, study: Study) -> list[Path]:
        """Of its files, those that are there."""
        places = (study.out_dir / name for name in self.files(study))
        return [place for place in places if place.is_file()]


def all_notebooks() -> list[Notebook]:
    """The numbered notebooks, in order."""
    return [Notebook(path) for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))]


def notebook_keys(study: Study) -> dict[str, str]:
    """By notebook, what changes with it, the code that its cells run, and the tables and stores it reads."""
    return {notebook.stem: _key_of_notebook(study, notebook) for notebook in all_notebooks()}


def _key_of_notebook(study: Study, notebook: Notebook) -> str:
    stores = [
        study.task(name, model_name, ablation).path.stem
        for name in notebook.measurements
        for model_name, ablation in study.each(name)
    ]
    code = code_files(source=notebook.code)
    return identity(
        {
            "source": notebook.source,
            "code": code_version(source=notebook.code),
            "settings": dataclasses.asdict(study.profile),
            "stores": stores,
            "models": [model_identity(name) for name in study.profile.models],  # for what it computes itself
            "data": {module: hash_of() for module, hash_of in DATA_OF.items() if PACKAGE / module in code},
        }
    )


def _hash_of_published() -> str:
    tables = sorted(PUBLISHED.glob("[!.]*.csv"))  # editors keep hidden locks there
    return hashlib.sha256(b"".join(file.read_bytes() for file in tables)).hexdigest()


def _hash_of_text() -> str:
    return hash_documents(read_documents(HELD_OUT_TEXT))


def _hash_of_arms() -> str:
    return str(open_store(ARMS / "arms.zarr").attrs["sha256"])


#: Modules that read data of the repository → a hash of what they read.
DATA_OF = {
    "analysis/published.py": _hash_of_published,
    "analysis/arms.py": _hash_of_arms,
    "text/corpora.py": _hash_of_text,
}


def run_notebooks(
    out_dir: Path, parameters: dict[str, Any], jobs: int = 1, only: Sequence[str] = ()
) -> list[Path]:
    """Executes notebooks (all, or those that begin with one of ``only``) into a results folder.

    Kernels work in a folder of their own, so paths among ``parameters`` must be whole.

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
    kernels: list[AsyncKernelManager] = []
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        running = [pool.submit(_run, source, target / source.name, parameters, kernels) for source in sources]
        try:
            failures = [failure for one in running if (failure := one.result())]
        except BaseException:  # Ctrl-C, which kernels do not get; a cell may have minutes to go
            pool.shutdown(wait=False, cancel_futures=True)
            _kill(kernels, running)
            raise
    if failures:
        raise UserError("; ".join(failures))
    return [target / source.name for source in sources]


def run_notebook_of(study: Study, profile: str, number: str, key: str) -> None:
    """Executes one notebook of a run and marks it as done, under the plan's ``key``.

    What an earlier run of it left goes first, so that whatever is there afterwards is of this one.

    Raises:
        UserError: no notebook has that number; or as :func:`run_notebooks`.
    """
    numbered = {notebook.number: notebook for notebook in all_notebooks()}
    if number not in numbered:
        raise UserError(f"no notebook has the number {number!r}; there are {', '.join(numbered)}")
    for file in numbered[number].left(study):
        file.unlink()
    parameters = {
        "profile": whole_profile(profile),
        "out_dir": os.path.abspath(study.out_dir),
        "seed": study.seed,
        "device": study.device,
    }
    run_notebooks(study.out_dir, parameters, only=[number])
    say_done(mark(study.out_dir, "notebooks", number), numbered[number].left(study), study.out_dir, key=key)


def _kill(kernels: Sequence[AsyncKernelManager], running: Sequence[Future]) -> None:
    """Kills kernels, those that are about to start too, until no notebook runs any more."""
    while not all(one.done() for one in running):
        for kernel in list(kernels):
            process = getattr(kernel.provisioner, "process", None)
            if process is not None:
                process.kill()
        time.sleep(0.05)


def _folder_for_sockets() -> str:
    """Where temporary folders go, unless its path is too long for sockets in them."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= LONGEST_FOR_SOCKETS else "/tmp"


def _run(
    source: Path, target: Path, parameters: dict[str, Any], kernels: list[AsyncKernelManager]
) -> str | None:
    """Executes a notebook, noting its kernel; says what failed."""
    import papermill
    from jupyter_client import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    class Noted(AsyncKernelManager):
        def __init__(self, **settings: object):
            super().__init__(**settings)
            kernels.append(self)

    print(f"{source.stem}: running", file=sys.stderr)
    folder_for_sockets = tempfile.TemporaryDirectory(dir=_folder_for_sockets())
    with FileLock(target.with_suffix(".lock")), folder_for_sockets as folder:
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
                kernel_manager_class=Noted,
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
