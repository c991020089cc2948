"""Running the notebooks of a profile, each in a kernel of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import papermill
from filelock import FileLock
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from selfrepair.errors import UserError
from selfrepair.paths import NOTEBOOKS


def run_notebooks(profile: str, out_dir: Path, parameters: dict[str, object], jobs: int = 1, only: Sequence[str] = ()) -> list[Path]:
    """Executes the notebooks (all, or those whose names begin with one of ``only``) into ``out_dir/notebooks``.

    Raises:
        UserError: no such notebook, a parameter that a notebook does not have, or cells that failed: the
            other notebooks are run to the end all the same.
    """
    sources = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    unknown = [name for name in only if not any(source.name.startswith(name) for source in sources)]
    if unknown:
        raise UserError(f"no notebook begins with {', '.join(unknown)}; there are {', '.join(source.stem for source in sources)}")
    sources = [source for source in sources if not only or source.name.startswith(tuple(only))]
    parameters = {"profile": profile, "out_dir": str(out_dir.resolve()), **parameters}
    for source in sources:
        misspelt = set(parameters) - set(papermill.inspect_notebook(str(source)))
        if misspelt:
            raise UserError(f"{source.name}: has no parameter {', '.join(sorted(misspelt))}")
    target = out_dir / "notebooks"
    target.mkdir(parents=True, exist_ok=True)
    if jobs > 1:  # kernels inherit this; more threads than cores, each spinning while it waits, would slow all of them
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // min(jobs, len(sources)))))
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        failures = [failure for failure in pool.map(lambda source: _run(source, target / source.name, parameters), sources) if failure]
    if failures:
        raise UserError("; ".join(failures))
    return [target / source.name for source in sources]


def _run(source: Path, target: Path, parameters: dict[str, object]) -> str | None:
    print(f"{source.stem}: running", file=sys.stderr)
    with FileLock(target.with_suffix(".lock")), TemporaryDirectory() as folder:
        # Sockets in a folder of its own: kernels that start at the same moment can be given the same TCP port.
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
            return f"{source.stem}: cell {error.exec_count} failed with {error.ename}: {(str(error.evalue).splitlines() or [''])[0]} (see {target})"
        except DeadKernelError:
            return f"{source.stem}: its kernel died, from too little memory perhaps (see {target})"
    print(f"{source.stem}: done, {target}", file=sys.stderr)
    return None
