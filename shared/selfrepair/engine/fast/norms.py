"""Norms as one kernel each, by ``torch.compile``."""

from __future__ import annotations

import torch
from torch import nn


def compile_norms(module: nn.Module) -> None:
    """Makes one kernel of every norm inside ``module``, for good: RMSNorm is six otherwise.

    Only they are compiled: the engine hooks into blocks, which compiled code would not notice.
    """
    for part in module.modules():
        if "Norm" in type(part).__name__:
            part.forward = torch.compile(part.forward)
