"""The yardstick: how fast the machine multiplies matrices of a block's shapes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from machine import timed
from operations import matrices
from torch import Tensor, nn

from selfrepair.engine.fast.linear_maps import faster_modules
from selfrepair.models.loading import Model

CALLS = 5  # of each shape, in each measurement


class Matmul:
    """Products of one block's shapes with ``n_rows`` rows: PyTorch's own, and the fast path's linear maps."""

    def __init__(self, model: Model, n_rows: int):
        self.device, self.n_rows = model.device, n_rows
        weights = matrices(model.blocks[0])
        inputs = {
            w.shape[0]: torch.randn(n_rows, w.shape[0], dtype=w.dtype, device=w.device) for w in weights
        }
        layers = [nn.Linear(*w.shape, bias=False, dtype=w.dtype, device=w.device) for w in weights]
        self._layers = nn.ModuleList(layers)
        self.flops = CALLS * sum(2 * n_rows * w.numel() for w in weights)
        self.ways: dict[str, list[Callable[[], Tensor]]] = {
            "torch.matmul": [partial(torch.matmul, inputs[w.shape[0]], w) for w in weights],
            "the fast path's linear maps": [partial(layer, inputs[layer.in_features]) for layer in layers],
        }
        self._speeds: dict[str, list[float]] = {way: [] for way in self.ways}

    @torch.no_grad()
    def measure(self) -> None:
        """One more measurement of every way; operations over time, all shapes together."""
        with faster_modules(self._layers):
            for way, products in self.ways.items():
                seconds = sum(
                    timed(self.device, lambda product=product: [product() for _ in range(CALLS)])[0]
                    for product in products
                )
                self._speeds[way].append(self.flops / seconds)

    def flops_per_second(self) -> dict[str, float]:
        """By way, the median of the measurements but the first, which warms up."""
        return {way: statistics.median(speeds[1:]) for way, speeds in self._speeds.items()}
