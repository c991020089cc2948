"""Choosing the device and the precision that work runs in, and moving tensors between device and host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from selfrepair.choices import PRECISIONS
from selfrepair.errors import UserError

T = TypeVar("T")

#: Of torch's devices; others have no arithmetic or no float64, or were never tried.
KINDS = ("cpu", "cuda")


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; other names are torch's, of :data:`KINDS`.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name.partition(":")[0] not in KINDS:
            raise ValueError(f"none of {', '.join(KINDS)}")
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"device '{name}' is not available here; use cpu or auto") from error
    return device


def all_devices(name: str) -> list[torch.device]:
    """As :func:`resolve_device`, but ``auto`` is every visible CUDA device where there is one."""
    if name == "auto" and torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [resolve_device(name)]


def set_precision(name: str, device: torch.device) -> torch.dtype:
    """Makes this process' float32 matrix products exact or, for ``tf32``, TF32; returns the type for weights.

    Raises:
        UserError: unknown precision, or TF32 on a device that has none.
    """
    if name not in PRECISIONS:
        raise UserError(f"unknown precision '{name}'; known are {', '.join(PRECISIONS)}")
    if name == "tf32" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise UserError(
            f"TF32 needs an NVIDIA GPU of the Ampere generation or later, and this is {device}; use float32"
        )
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    return torch.float32 if name == "tf32" else getattr(torch, name)


def precision(device: torch.device, dtype: torch.dtype) -> str:
    """The name in :data:`PRECISIONS` of what weights of this type on this device are now multiplied in."""
    if dtype == torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``; the host does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; from a GPU, it is there once the device is synchronised."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """``work()``, or ``None`` if the device had too little memory for it; what it held is then free again."""
    try:
        return work()
    except torch.OutOfMemoryError:
        pass  # only past this handler does nothing hold the tensors any more
    torch.cuda.empty_cache()
    return None
