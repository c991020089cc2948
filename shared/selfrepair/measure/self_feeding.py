"""Heads fed what heads write: direct effects before and after vectors are added to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.engine.batches import prompts_that_fit
from selfrepair.engine.forward import Replay, attention_z
from selfrepair.engine.reading import Reading
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import tokens_of
from selfrepair.models.devices import on_device
from selfrepair.statistics import later_half

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

SCALES = (1, 2, 3, 5, 8)
VECTORS = ("own_output", "random_head_output", "random_direction")
#: The first prompts only: 4064 tokens at 128 per prompt, against 1450 or 420 as published.
SELF_FEEDING_PROMPTS = 32
SHARD_PROMPTS = 8
#: Heads with the largest mean direct effect, which are fed whatever their layer.
STRONGEST = 5


class SelfFeeding(Measurement):
    """Direct effects (logits) of heads before and after vectors are added before their layer.

    ``before [fed, prompt, position]``, ``after [fed, vector, scale, prompt, position]``. Fed are all heads
    of the later half of the layers and the ``STRONGEST`` of the model: ``layer``, ``head`` and ``rank``,
    from 1, by mean direct effect among all heads, ``[fed]``. What is added to the residual stream, at every
    position at once, is ``scale`` times the head's own output at that position, the output there of another
    head of the model (drawn once per head from ``seed``), or a Gaussian direction (drawn per token) of the
    own output's norm: the attribute ``vectors`` names them. Only the head's own attention is run again, and
    its direct effect is read with the clean scale of the final norm. Rushing & Nanda 2024, §6.
    """

    name: ClassVar[str] = "self_feeding"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "seed")

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return ("tokens", "heads")

    def shards(self, settings: Settings) -> Sequence[int]:
        """The first prompt of every shard."""
        return range(0, min(int(settings["n_prompts"]), SELF_FEEDING_PROMPTS), SHARD_PROMPTS)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        effects = inputs["heads"]["direct_effect"].isel(prompt=slice(SELF_FEEDING_PROMPTS))
        seed = int(settings["seed"])
        fed = choose_fed(effects.values, seed)
        prompts = np.arange(shard, min(shard + SHARD_PROMPTS, effects.sizes["prompt"]))
        tokens = on_device(tokens_of(model, inputs, prompts), model.device)
        replay = Replay(model, tokens.shape[1])
        parts = [
            _feed(Reading(model, tokens[batch]), replay, fed, seed, prompts[batch.numpy()])
            for batch in torch.arange(len(prompts)).split(prompts_that_fit(model, tokens.shape[1]))
        ]
        of_fed = {name: ("fed", [getattr(head, name) for head in fed]) for name in ("layer", "head", "rank")}
        made = xr.concat(parts, "prompt").assign_coords(prompt=prompts, scale=list(SCALES), **of_fed)
        return made.assign_attrs(vectors=list(VECTORS))


MEASUREMENT = SelfFeeding()


@dataclass(frozen=True)
class FedHead:
    """A head to feed, its ``rank`` by mean direct effect, and the ``other`` whose output it is fed too."""

    layer: int
    head: int
    rank: int
    other: tuple[int, int]


def choose_fed(effects: Float[np.ndarray, "layer head prompt position"], seed: int) -> list[FedHead]:
    """All heads of the later half of the layers and the ``STRONGEST`` by mean direct effect, in order."""
    n_layers, n_heads = effects.shape[:2]
    order = [divmod(int(i), n_heads) for i in np.argsort(-effects.mean((2, 3)).ravel(), kind="stable")]
    chosen = {*order[:STRONGEST], *(head for head in order if head[0] >= later_half(n_layers))}
    return [
        FedHead(*head, order.index(head) + 1, _another_head(head, order, seed)) for head in sorted(chosen)
    ]


def _another_head(head: tuple[int, int], heads: Sequence[tuple[int, int]], seed: int) -> tuple[int, int]:
    rest = sorted(set(heads) - {head})
    return rest[np.random.Generator(np.random.PCG64([seed, *head])).integers(len(rest))]


@torch.no_grad()
def _feed(
    reading: Reading, replay: Replay, fed: Sequence[FedHead], seed: int, prompts: Int[np.ndarray, " prompt"]
) -> xr.Dataset:
    """The measurement's variables of some prompts."""
    before, after = [], []
    for head in fed:
        own = reading.output(head.layer, head.head)
        random = _random_like(own, [seed, head.layer, head.head], prompts.tolist())
        vectors = (own, reading.output(*head.other), random)  # in the order of VECTORS
        before.append(reading.effects(head.layer, reading.clean.z[head.layer])[..., head.head].cpu().numpy())
        after.append([_effects_fed(reading, replay, head, vector).cpu().numpy() for vector in vectors])
    return xr.Dataset(
        {
            "before": (("fed", "prompt", "position"), np.stack(before)),
            "after": (("fed", "vector", "scale", "prompt", "position"), np.stack(after)),
        }
    )


def _random_like(
    output: Float[Tensor, "prompt position d_model"], seed: list[int], prompts: list[int]
) -> Float[Tensor, "prompt position d_model"]:
    """A Gaussian direction per token, of ``output``'s norm there; a prompt's are the same in any batch."""
    shape = tuple(output.shape[1:])
    drawn = [
        np.random.Generator(np.random.PCG64([*seed, i])).standard_normal(shape, dtype=np.float32)
        for i in prompts
    ]
    direction = nn.functional.normalize(torch.from_numpy(np.stack(drawn)).to(output), dim=-1)
    return direction * output.norm(dim=-1, keepdim=True)


@torch.no_grad()
def _effects_fed(
    reading: Reading, replay: Replay, fed: FedHead, vector: Float[Tensor, "prompt position d_model"]
) -> Float[Tensor, "scale prompt position-1"]:
    """Direct effects (logits) of a head with ``vector`` added to its layer's input, at every scale."""
    scales = torch.tensor(SCALES, device=vector.device, dtype=reading.model.dtype)[:, None, None, None]
    residual = reading.clean.residuals[fed.layer] + scales * vector
    z = attention_z(reading.model, replay, fed.layer, residual.flatten(0, 1)).unflatten(0, residual.shape[:2])
    return reading.effects(fed.layer, z)[..., fed.head]
