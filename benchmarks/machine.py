"""The machine that a benchmark runs on: what it is, and how time and memory are measured on it."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from selfrepair import __version__
from selfrepair.errors import UserError
from selfrepair.store.code_identity import code_version

Result = TypeVar("Result")

STATUS = Path("/proc/self/status")  # Linux


def describe_machine(device: torch.device) -> str:
    """Processor and, where used, accelerator; load."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    accelerator = ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        accelerator = f", {properties.name} with {properties.total_memory / 1e9:.0f} GB"
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{processor}, {os.cpu_count()} logical cores{accelerator}, {platform.system()}{load}"


def describe_versions() -> str:
    """Of everything that speed or numbers depend on; the code's is that of the stores of heads."""
    code = code_version("selfrepair.measure.heads", "selfrepair.engine.fast.switch")
    cuda = "" if torch.version.cuda is None else f" (CUDA {torch.version.cuda})"
    return (
        f"selfrepair {__version__} (code {code}), torch {torch.__version__}{cuda} with "
        f"{torch.get_num_threads()} threads, "
        f"transformers {version('transformers')}, transformer_lens {version('transformer_lens')}, Python "
        f"{platform.python_version()}"
    )


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock seconds of ``work()``, all of its kernels included, and its result."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes; on a CPU those that can be had without swapping, or all there are where that is not told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        return _kilobytes(meminfo, "MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_of(device: torch.device, work: Callable[[], object]) -> tuple[int, int]:
    """Bytes in use before ``work()`` and at its peak: allocated on a GPU, else this process's resident ones.

    Resident memory keeps what was freed but not given back: run it by :func:`in_fresh_process`.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return before, torch.cuda.max_memory_allocated(device)
    if STATUS.is_file():
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = _peak_resident()
    work()
    return before, _peak_resident()


def _peak_resident() -> int:
    if STATUS.is_file():
        return _kilobytes(STATUS, "VmHWM")
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kilobytes(file: Path, key: str) -> int:
    """A value of a file of ``Key:  1234 kB`` lines, in bytes."""
    (line,) = (line for line in file.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """``function(*arguments)`` in a process that has done nothing before but import the library.

    Raises:
        UserError: the process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfrepair.measure.heads"])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that measures memory was killed, most likely for want of memory; choose a smaller "
            "shape"
        ) from error
