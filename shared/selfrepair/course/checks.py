"""What test cells call: whether an answer is the right one, said in one line if it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from selfrepair.course.plain import PlainModel

#: How far an answer may be from the right one (absolute), by the coarser of both precisions.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def check(what: str, answer: object, right: Tensor) -> None:
    """Compares an answer with the right one.

    Raises:
        AssertionError: it is no tensor of that shape and kind, not finite, or further away than
            :data:`TOLERANCE`.
    """
    check_shape(what, answer, right.shape)
    assert isinstance(answer, Tensor)
    if right.dtype.is_floating_point:
        assert answer.dtype.is_floating_point, f"{what}: should hold floats, not {answer.dtype}"
        assert answer.isfinite().all(), f"{what}: is not finite everywhere"
        limit = TOLERANCE[torch.float32 if torch.float32 in (answer.dtype, right.dtype) else torch.float64]
        _check_distance(what, answer, right, limit)
    else:
        wrong = (answer != right).sum().item()
        assert wrong == 0, f"{what}: {wrong} of {right.numel()} entries are wrong"


def _check_distance(what: str, answer: Tensor, right: Tensor, limit: float) -> None:
    worst = largest_distance(answer, right)
    assert worst <= limit, f"{what}: off by up to {worst:.2g} (allowed: {limit:g})"


def largest_distance(answer: Tensor, right: Tensor) -> float:
    """Of any two entries; 0 where there are none."""
    far = (answer.detach().double() - right.detach().double()).abs()
    return far.max().item() if far.numel() else 0.0


def check_shape(what: str, answer: object, shape: tuple[int, ...]) -> None:
    """Whether an answer is a tensor of a shape.

    Raises:
        AssertionError: it is not.
    """
    assert isinstance(answer, Tensor), f"{what}: should be a tensor, not {type(answer).__name__}"
    assert answer.shape == shape, f"{what}: has shape {list(answer.shape)}, should be {list(shape)}"


def check_number(what: str, answer: object, right: float) -> None:
    """Whether an answer is a number, or a tensor of one, and the right one (as by :func:`check`).

    Raises:
        AssertionError: it is not.
    """
    assert isinstance(answer, float | int | Tensor), (
        f"{what}: should be a number, not {type(answer).__name__}"
    )
    answer = torch.as_tensor(answer, dtype=torch.float64) if not isinstance(answer, Tensor) else answer
    assert answer.numel() == 1, f"{what}: should be one number, not {answer.numel()}"
    check(what, answer.reshape(()), torch.tensor(float(right), dtype=torch.float64))


@contextmanager
def check_arrival(what: str, model: PlainModel, tokens: Int[Tensor, "prompt position"]) -> Iterator[None]:
    """Whether something that is put into the model meanwhile changes what the final norm gets.

    Raises:
        AssertionError: every run of these tokens was as the one before.
    """
    clean = model.run(tokens).residuals[-1]
    seen: list[Tensor] = []
    handle = model.final_norm.register_forward_pre_hook(lambda _, streams: seen.append(streams[0]))
    try:
        yield
    finally:
        handle.remove()
    moved = [largest_distance(stream, clean) for stream in seen if stream.shape == clean.shape]
    assert max(moved, default=0) > 0.01, f"{what}: changes nothing in the model"
