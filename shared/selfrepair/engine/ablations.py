"""What takes the place of an activation that is ablated.

A new kind of ablation is a class here and its place in ``KINDS``. Every measurement replaces activations
through this file and knows no kind by name. Nothing heavy is imported, so that a wrong name is answered at
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int

from selfrepair.errors import UserError


@runtime_checkable
class Site(Protocol):
    """A kind of place in a model whose activations can be replaced (see :mod:`selfrepair.engine.sites`)."""

    def activations(
        self, model: Any, tokens: Int[Any, "prompt position"]
    ) -> Sequence[Float[Any, "prompt position *what"]]:
        """Clean activations, by place."""
        ...

    def nothing(self, model: Any) -> Sequence[Float[Any, "*what"]]:
        """What is left at each place if the component adds nothing."""
        ...

    def prepared(self, model: Any, tokens: Int[Any, "prompt position"]) -> Any:
        """Prompts made ready for :meth:`loss_gradient`."""
        ...

    def loss_gradient(
        self, model: Any, here: Any, place: int, values: Float[Any, "part width"]
    ) -> tuple[Float[Any, " part"], Float[Any, "part width"]]:
        """Mean next-token loss (nats) with a constant at all positions, and its gradient by that.

        Of each part of ``place``, which is what is ablated by itself: the heads of a layer, or the whole of a
        component.
        """
        ...


@runtime_checkable
class Replacement(Protocol):
    """An ablation made ready for one model and one kind of place.

    ``has_donors``: whether what it puts in differs from donor to donor.
    """

    has_donors: ClassVar[bool]

    def __call__(
        self, place: int, clean: Float[Any, "prompt position *what"], donors: Int[Any, " row"] | None = None
    ) -> Float[Any, "row position *what"]:
        """What takes the place of ``clean`` activations, a row for each of ``donors`` (indices of prompts).

        Without ``donors`` every prompt is one row; its donor is its partner, half a batch away.
        """
        ...


@runtime_checkable
class Ablation(Protocol):
    """A kind of ablation.

    ``has_donors`` is that of its replacements. ``is_fitted`` if it learns :class:`Constants`, which are kept:
    from all prompts, or ``fits_unseen`` from text that is never measured on.
    """

    name: ClassVar[str]
    has_donors: ClassVar[bool]
    is_fitted: ClassVar[bool]
    fits_unseen: ClassVar[bool]

    def prepare(self, model: Any, batches: Iterable[Int[Any, "_ _"]], site: Site) -> Replacement:
        """Made ready for ``site`` of ``model``; ``batches`` are the tokens of what it learns from."""
        ...


@dataclass(frozen=True)
class FromDonors:
    """The activation of another prompt at the same position.

    Raises:
        UserError: an odd number of prompts, of which one would have no partner, or be its own.
    """

    has_donors: ClassVar[bool] = True

    def __call__(
        self, place: int, clean: Float[Any, "prompt position *what"], donors: Int[Any, " row"] | None = None
    ) -> Float[Any, "row position *what"]:
        if donors is not None:
            return clean[donors]
        n_prompts = clean.shape[0]
        if n_prompts % 2:
            raise UserError(
                "resample ablation puts in what a partner half a batch away has: give an even number of "
                f"prompts, not {n_prompts}"
            )
        return clean.roll(n_prompts // 2, dims=0)


@dataclass(frozen=True)
class Constants:
    """The same at every prompt and position; ``values`` are by place."""

    values: Sequence[Float[Any, "*what"]]
    has_donors: ClassVar[bool] = False

    def __call__(
        self, place: int, clean: Float[Any, "prompt position *what"], donors: Int[Any, " row"] | None = None
    ) -> Float[Any, "row position *what"]:
        rows = clean.shape[0] if donors is None else len(donors)
        return self.values[place].to(clean.dtype).expand(rows, *clean.shape[1:])


class Resample:
    """By the activation of a donor prompt (Rushing & Nanda 2024, §2)."""

    name: ClassVar[str] = "resample"
    has_donors: ClassVar[bool] = FromDonors.has_donors
    is_fitted: ClassVar[bool] = False
    fits_unseen: ClassVar[bool] = False

    def prepare(self, model: Any, batches: Iterable[Int[Any, "_ _"]], site: Site) -> FromDonors:
        return FromDonors()


class Mean:
    """By the mean over all prompts and positions, summed in float64 (Rushing & Nanda 2024, appendix)."""

    name: ClassVar[str] = "mean"
    has_donors: ClassVar[bool] = Constants.has_donors
    is_fitted: ClassVar[bool] = True
    fits_unseen: ClassVar[bool] = False

    def prepare(self, model: Any, batches: Iterable[Int[Any, "_ _"]], site: Site) -> Constants:
        totals: list[Any] = []
        n_tokens = 0
        for tokens in batches:
            sums = [activation.double().sum((0, 1)) for activation in site.activations(model, tokens)]
            totals = [total + more for total, more in zip(totals, sums, strict=True)] if totals else sums
            n_tokens += tokens.numel()
        return Constants([total / n_tokens for total in totals])


class Zero:
    """By nothing: of a head, its value bias alone is left (Rushing & Nanda 2024, appendix)."""

    name: ClassVar[str] = "zero"
    has_donors: ClassVar[bool] = Constants.has_donors
    is_fitted: ClassVar[bool] = False
    fits_unseen: ClassVar[bool] = False

    def prepare(self, model: Any, batches: Iterable[Int[Any, "_ _"]], site: Site) -> Constants:
        return Constants(site.nothing(model))


class Optimal:
    """By the constant with which the model's loss is least (Li & Janson 2024, arXiv 2409.09951).

    Found by gradient descent from the mean, for each head or component by itself; on text that nothing is
    measured on, or a constant could be good for just these prompts.
    """

    name: ClassVar[str] = "optimal"
    has_donors: ClassVar[bool] = Constants.has_donors
    is_fitted: ClassVar[bool] = True
    fits_unseen: ClassVar[bool] = True

    def prepare(self, model: Any, batches: Iterable[Int[Any, "_ _"]], site: Site) -> Constants:
        from selfrepair.engine.optimal import least_loss

        batches = list(batches)
        return Constants(least_loss(model, batches, site, Mean().prepare(model, batches, site).values))


KINDS: dict[str, Ablation] = {kind.name: kind for kind in (Resample(), Mean(), Zero(), Optimal())}
#: Their names, in the order in which they are offered.
ABLATIONS = tuple(KINDS)


def find_ablation(name: str) -> Ablation:
    """The kind of ablation of that name.

    Raises:
        UserError: there is none.
    """
    if name not in KINDS:
        raise UserError(f"unknown ablation '{name}'; known are {', '.join(ABLATIONS)}")
    return KINDS[name]
