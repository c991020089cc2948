"""The switch between the engine's plain path and its fast one."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from selfrepair.engine.fast.linear_maps import faster_modules

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Environment variable that, set to anything but 0, leaves everything to the plain path.
PLAIN = "SELFREPAIR_PLAIN"


@contextmanager
def fast_path(model: Model, on: bool | None = None) -> Iterator[Model]:
    """``with fast_path(model) as model:`` the same model, computing by the fast path inside.

    It computes what the plain path does, to the rounding of the model's type. ``on`` says whether it is
    wanted; left out, the environment variable ``SELFREPAIR_PLAIN`` does, and if it is not, the model is
    given back as it is. Modules are swapped for as long as the block runs, in the plain model too, whose
    modules they are. A model may be used by one thread at a time.
    """
    if model.fast or not (is_wanted() if on is None else on):
        yield model
        return
    if model.device.type == "cpu":
        keep_freed_memory()
    with faster_modules(model.hf):
        yield dataclasses.replace(model, fast=True)


def is_wanted() -> bool:
    """What the environment says."""
    return os.environ.get(PLAIN, "0") in ("", "0")


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next operation, instead of taking it anew page by page."""
    if hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**25)
