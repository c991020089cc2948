"""Choosing the device that work runs on."""

from __future__ import annotations

import torch

from selfrepair.errors import UserError


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; other names are torch's.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' is not available here; use cpu or auto") from error
    return device
