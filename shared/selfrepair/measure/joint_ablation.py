"""Does the backup take over? A head and a later one ablated, each alone and both together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfrepair.engine.ablations import Replacement
from selfrepair.engine.batches import in_halves, pairs_that_fit, partner_batches, rows_that_fit
from selfrepair.engine.forward import Replay, carry, unembed
from selfrepair.engine.hooks import Arguments, before
from selfrepair.engine.reading import Reading
from selfrepair.errors import NotMeasurable
from selfrepair.measure.judged_tokens import SELECTED, TOP, judged_tokens
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import (
    head_replacement,
    needs_of_ablation,
    pair_shards,
    prompts_of_shard,
    tokens_of,
)
from selfrepair.models.devices import on_device
from selfrepair.statistics import Head

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Heads that are ablated with their backups: those with the strongest.
MOST_HEADS = 8
#: Pairs of prompts that are run.
MOST_PAIRS = 64


class Trio(NamedTuple):
    """A head, the later head that grows most without it, and one of middling growth in its place."""

    head: Head
    backup: Head
    middling: Head

    def runs(self) -> dict[str, tuple[Head, ...]]:
        """What is ablated in each run, in order of depth."""
        head, backup, middling = ((one,) for one in self)
        return {
            "clean": (),
            "head": head,
            "backup": backup,
            "both": head + backup,
            "middling": middling,
            "both with middling": head + middling,
        }


class JointAblation(Measurement):
    """Sums over the head's top tokens, on prompts of odd number: ``[run, trio, prompt]``.

    ``loss`` (nats) and ``logit`` (the centred correct one); ``count [trio, prompt]``: tokens. Attribute
    ``runs``: see :meth:`Trio.runs`. ``head``, ``backup`` and ``middling [trio, place]``: layer and head, as
    :func:`choose_trios` takes them on prompts of even number. All are ablated at all positions, by the same
    donor.
    """

    name: ClassVar[str] = "joint_ablation"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "ablation", "fraction")

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return (*needs_of_ablation(settings), "heads", "head_growth")

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings, MOST_PAIRS)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        trios = choose_trios(inputs["head_growth"])
        if not trios:
            raise NotMeasurable(f"{model.name}: no head has two heads after it, a backup and another")
        prompts = prompts_of_shard(inputs, shard)
        top = judged_tokens(inputs["heads"], float(settings["fraction"]), prompts)[SELECTED.index(TOP)]
        top &= (prompts % 2 == 1)[:, None]
        judged = {trio: top[trio.head] for trio in trios}
        tokens = tokens_of(model, inputs, prompts)
        loss, logit = ablate_jointly(model, tokens, head_replacement(model, settings, inputs), judged)
        of_runs = ("run", "trio", "prompt")
        return xr.Dataset(
            {
                "loss": (of_runs, loss.numpy()),
                "logit": (of_runs, logit.numpy()),
                "count": (of_runs[1:], np.stack([mask.sum(-1) for mask in judged.values()])),
                **{
                    name: (("trio", "place"), [getattr(trio, name) for trio in trios])
                    for name in Trio._fields
                },
            },
            {"prompt": prompts},
            {"runs": list(trios[0].runs())},
        )


MEASUREMENT = JointAblation()


def choose_trios(grown: xr.Dataset) -> list[Trio]:
    """The heads with the strongest backups, the strongest first, on prompts of even number.

    ``grown`` is what the measurement ``head_growth`` gives. A head's backup is the later head whose mean
    growth on its top tokens is the largest. Of the other later heads, the middle half by growth are of
    middling growth; taken is the one whose mean direct effect on these tokens is nearest to the backup's.
    """
    even = grown.isel(prompt=grown["prompt"].values % 2 == 0)
    count = even["count"][0].sum("prompt").values
    growth, clean_effect = (
        even[name].sum("prompt").values / np.maximum(count, 1)[..., None, None]
        for name in ("growth", "clean_effect")
    )
    growth = growth[SELECTED.index(TOP)]
    found: list[tuple[float, Trio]] = []
    for layer, number in np.argwhere(count > 0):
        own, effect = growth[layer, number], clean_effect[layer, number]
        later = [(int(above), int(head)) for above, head in np.argwhere(np.ones_like(own)) if above > layer]
        if not later:
            continue
        backup, *others = sorted(later, key=own.__getitem__, reverse=True)
        quarter = len(others) // 4
        if middle := others[quarter : len(others) - quarter]:
            nearest = min(middle, key=lambda head: abs(effect[head] - effect[backup]))
            found.append((float(own[backup]), Trio((int(layer), int(number)), backup, nearest)))
    found.sort(key=lambda strength_and_trio: -strength_and_trio[0])
    return [trio for _, trio in found[:MOST_HEADS]]


class Sums(NamedTuple):
    """What :class:`JointAblation` measures, on the host."""

    loss: Float[Tensor, "run trio prompt"]
    logit: Float[Tensor, "run trio prompt"]


@torch.no_grad()
def ablate_jointly(
    model: Model,
    tokens: Int[Tensor, "prompt token_position"],
    replacement: Replacement,
    judged: Mapping[Trio, Bool[np.ndarray, "prompt position"]],
) -> Sums:
    """Every run of each trio, on the prompts that hold tokens that its head is judged on.

    The two halves of the prompts are each other's donors.
    """
    length = tokens.shape[1]
    replay = Replay(model, length)
    n_runs = len(next(iter(judged)).runs())
    wide = torch.promote_types(torch.float32, model.dtype)
    sums = torch.zeros(2, n_runs, len(judged), len(tokens), dtype=wide)
    for batch in partner_batches(len(tokens), pairs_that_fit(model, length)):
        here = _Batch(model, replay, replacement, on_device(tokens[batch], model.device))
        for number, (trio, mask) in enumerate(judged.items()):
            chosen = torch.from_numpy(mask[batch.numpy()]).to(model.device)
            for run, ablated in enumerate(trio.runs().values()):
                sums[:, run, number, batch] = here.sums(ablated, chosen).cpu()
    return Sums(*sums)


class _Batch:
    """Runs with heads ablated, on some prompts and their donors."""

    def __init__(
        self, model: Model, replay: Replay, replacement: Replacement, tokens: Int[Tensor, "prompt position"]
    ):
        self.model, self.replay, self.tokens = model, replay, tokens
        self.reading = Reading(model, tokens)
        self.replaced = cache(lambda layer: replacement(layer, self.reading.clean.z[layer]))
        self.change = cache(lambda layer: self.reading.change(layer, replacement))
        self.rows = rows_that_fit(model, tokens.shape[1])

    def sums(
        self, ablated: tuple[Head, ...], chosen: Bool[Tensor, "prompt position"]
    ) -> Float[Tensor, "quantity prompt"]:
        """Loss and correct logit, summed over the chosen tokens of each prompt."""
        found = self.reading.direction.new_zeros(2, len(chosen))
        prompts = chosen.any(-1).nonzero()[:, 0]

        def run(first: int, last: int) -> bool:
            prompt = prompts[first:last]
            row, position = chosen[prompt].nonzero(as_tuple=True)
            final = self._final_residual(ablated, prompt)[row, position]
            of_token = self._loss_and_logit(final, self.tokens[prompt[row], position + 1])
            found.index_add_(1, prompt[row], of_token.to(found.dtype))
            return True

        in_halves(run, len(prompts), self.rows)
        return found

    def _final_residual(
        self, ablated: tuple[Head, ...], prompt: Int[Tensor, " row"]
    ) -> Float[Tensor, "row position d_model"]:
        if not ablated:
            return self.reading.clean.final_residual[prompt]
        (layer, head), *others = ablated
        delta = self.reading.written(layer, self.change(layer)[prompt, :, head : head + 1], head)

        def put_in(index: int, positional: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
            above, other = others[index]
            z = positional[0].unflatten(-1, (self.model.n_heads, -1)).clone()
            z[..., other, :] = self.replaced(above)[prompt][:, :, other].reshape(z[..., other, :].shape)
            return (z.flatten(-2), *positional[1:]), named

        with before([self.model.output_projections[above] for above, _ in others], put_in):
            return carry(self.model, self.replay, self.reading.clean, layer, delta, prompt)[0]

    def _loss_and_logit(
        self, final: Float[Tensor, "token d_model"], correct: Int[Tensor, " token"]
    ) -> Float[Tensor, "quantity token"]:
        logits = unembed(self.model, final)
        of_correct = logits.gather(-1, correct[:, None])[:, 0]
        return torch.stack([logits.logsumexp(-1) - of_correct, of_correct - logits.mean(-1)])
