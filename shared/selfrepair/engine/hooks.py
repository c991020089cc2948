"""Hooks and stand-ins for whatever is measured, each gone again after its ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

#: Positional and named arguments of a module.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def hidden_states(positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The one of a module's arguments that it works on: the first, or the one of that name."""
    return positional[0] if positional else named["hidden_states"]


@contextmanager
def before(
    modules: Sequence[nn.Module], change: Callable[[int, tuple[Any, ...], dict[str, Any]], Arguments | None]
) -> Iterator[None]:
    """Calls ``change(index, positional, named)`` before one of ``modules`` runs.

    If it returns arguments, the module is given these.
    """

    def hook(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments | None]:
        return lambda _, positional, named: change(index, positional, named)

    with ExitStack() as handles:
        for index, module in enumerate(modules):
            handles.callback(module.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
        yield


@contextmanager
def watching(modules: Sequence[nn.Module], see: Callable[[int, Tensor, Any], object]) -> Iterator[None]:
    """Calls ``see(index, input, output)`` whenever one of ``modules`` has run; returns count as nothing."""

    def hook(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def call(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            see(index, hidden_states(positional, named), output)

        return call

    with ExitStack() as handles:
        for index, module in enumerate(modules):
            handles.callback(module.register_forward_hook(hook(index), with_kwargs=True).remove)
        yield


@contextmanager
def eager_attention(hf: PreTrainedModel) -> Iterator[None]:
    """Inside, attention modules of ``hf`` compute step by step, and give their patterns beside the output."""
    own = hf.config._attn_implementation
    hf.config._attn_implementation = "eager"
    try:
        yield
    finally:
        hf.config._attn_implementation = own


class _Reached(Exception):
    def __init__(self, given: Tensor):
        self.given = given


def input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What ``module`` is given in ``run()``, which is broken off there: the rest would be in vain.

    Raises:
        RuntimeError: the module did not run.
    """

    def stop(_: int, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _Reached(hidden_states(positional, named))

    with before([module], stop):
        try:
            run()
        except _Reached as reached:
            return reached.given
    raise RuntimeError(f"{type(module).__name__} did not run")


@contextmanager
def standing_in(parent: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Puts ``module`` in the place of the child ``name`` of ``parent``."""
    own = getattr(parent, name)
    setattr(parent, name, module)
    try:
        yield
    finally:
        setattr(parent, name, own)


@contextmanager
def widened_norms(module: nn.Module) -> Iterator[None]:
    """Lets the LayerNorms inside ``module`` compute in float32, with copies of their narrower weights.

    PyTorch's LayerNorm takes no input that is wider than its weights; RMSNorms take any.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    narrow = [(norm, name, weight) for norm in norms for name, weight in norm.named_parameters()]
    try:
        for norm, name, weight in narrow:
            setattr(norm, name, nn.Parameter(weight.float(), weight.requires_grad))
        yield
    finally:
        for norm, name, weight in narrow:
            setattr(norm, name, weight)
