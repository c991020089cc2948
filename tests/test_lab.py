"""Notebook 00 in JupyterLab, as a reader has it: opened, run, and its control changed, in a real browser."""

import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import nbformat
import pytest
from browser import PROGRAM, Page

from selfrepair.paths import NOTEBOOKS

NOTEBOOK = "00_self_repair_by_hand.ipynb"
#: Seconds that a start or a whole notebook may take.
PATIENCE = 300
IDLE = "document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]')"
#: The control with that label, the outputs below it in its cell, and all pictures and texts of those.
HEAD = "[...document.querySelectorAll('.jupyter-widgets')].find(box => box.querySelector(':scope > label')?.innerText === 'head')"
SELECT = f"{HEAD}?.querySelector('select')"
SHOWN = f"""(cell => [
    [...cell.querySelectorAll('.jp-OutputArea-output img')].map(image => image.src).join(' '),
    [...cell.querySelectorAll('.jp-RenderedHTMLCommon')].map(text => text.innerHTML).join(' '),
])({SELECT}.closest('.jp-Cell'))"""


@contextmanager
def jupyter_lab(folder, notebooks):
    """The address of a JupyterLab that shows a folder, and keeps whatever it keeps in another."""
    own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name}_DIR": str(folder / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
    ]
    options += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks}"]
    folder.mkdir()
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env={**os.environ, **own, "JUPYTER_PREFER_ENV_PATH": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"JupyterLab did not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}"
    finally:
        server.terminate()  # and its kernels with it
        server.wait(PATIENCE)


def answers(port):
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow("a reader opens notebook 00 in JupyterLab, and its control changes the picture")
@pytest.mark.skipif(PROGRAM is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)")
def test_the_control_of_notebook_00_changes_the_picture(tmp_path):
    notebook = nbformat.read(NOTEBOOKS / NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = parameters.source.replace(
        "out_dir = None", f"out_dir = {str(tmp_path / 'results')!r}"
    )
    for cell in notebook.cells:  # nothing that is shown is from before
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / NOTEBOOK)
    with (
        jupyter_lab(tmp_path / "lab", tmp_path / "notebooks") as address,
        Page(tmp_path / "browser") as page,
    ):
        page.open(address.format(NOTEBOOK), height=6000)  # cells out of view have no output
        page.wait_for(f"document.querySelectorAll('.jp-Cell').length === {len(notebook.cells)}")
        page.wait_for(f"{IDLE} && !document.querySelector('.jp-Spinner')")
        page.run(
            "[...document.querySelectorAll('.lm-MenuBar-item')].find(item => item.innerText === 'Run')"
            ".dataset.is = 'run'"
        )
        page.click("[data-is=run]")
        page.click(".lm-Menu-item[data-command='runmenu:run-all']")
        page.wait_for(f"{SELECT} && {SHOWN}.every(Boolean) && {IDLE}", PATIENCE)
        picture, text = page.run(SHOWN)
        chosen = page.run(f"{SELECT}.selectedIndex")
        other = chosen - 1 if chosen else 1
        # Without the list that a mouse opens: a headless browser has no window for it.
        page.run(f"void Object.assign({SELECT}, {{selectedIndex: {other}}})")
        page.run(f"{SELECT}.dispatchEvent(new Event('change', {{bubbles: true}}))")
        page.wait_for(f"{SHOWN}[0] !== {picture!r}")
        page.wait_for(f"{SHOWN}[1] !== {text!r}")
        assert page.run(f"{SELECT}.selectedIndex") == other
        page.run(f"void {SELECT}.closest('.jp-Cell').scrollIntoView()")
        page.screenshot(tmp_path / "after.png")
        failed = "[...document.querySelectorAll('.jp-OutputArea-output[data-mime-type*=error]')].map(error => error.innerText)"
        assert page.run(failed) == []
        assert page.complaints == []
