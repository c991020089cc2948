"""Heads fed what heads write: direct effects before and after vectors are added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from selfrepair.engine.batches import prompts_that_fit
from selfrepair.engine.forward import Blocks, Replay, attention_z, z_reached
from selfrepair.engine.one_position import CleanKeys, OnePosition
from selfrepair.engine.reading import Reading
from selfrepair.errors import NotMeasurable
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import tokens_of
from selfrepair.models.devices import on_device
from selfrepair.statistics import later_half

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

SCALES = (1, 2, 3, 5, 8)
VECTORS = ("own_output", "random_head_output", "random_direction")
#: The first prompts only, and this many positions of each: 512 tokens, against 1450 or 420 as published.
SELF_FEEDING_PROMPTS = 32
POSITIONS = 16
SHARD_PROMPTS = 8
#: Heads with the largest mean direct effect, which are fed whatever their layer.
STRONGEST = 5


class SelfFeeding(Measurement):
    """Direct effects (logits) of heads before and after vectors are added before their layer.

    ``before [fed, prompt, position]``, ``after [fed, vector, scale, prompt, position]``. Fed are all heads
    of the later half of the layers and the ``STRONGEST`` of the model: ``layer``, ``head`` and ``rank``,
    from 1, by mean direct effect among all heads, ``[fed]``. What is added to the residual stream is
    ``scale`` times the head's own output at ``position``, the output there of another head of the model
    (drawn once per head from ``seed``), or a Gaussian direction (drawn per token) of the own output's norm:
    the attribute ``vectors`` names them. It is added at that position alone, one position per run, and the
    head's direct effect there is read with the clean scale of the final norm. Rushing & Nanda 2024, §5.3.

    Two comparisons at the largest scale. ``after_everywhere [fed, prompt, position]``: every position gets
    its own output added, all in one run, so that the context changes too. ``sigma_ratio [fed, vector,
    prompt, position]``: the final norm's clean scale over that of the fed run; the released code reads
    ``after`` times this ratio.
    """

    name: ClassVar[str] = "self_feeding"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "seed")

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return ("tokens", "heads")

    def shards(self, settings: Settings) -> Sequence[int]:
        """The first prompt of every shard."""
        return range(0, min(int(settings["n_prompts"]), SELF_FEEDING_PROMPTS), SHARD_PROMPTS)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        if model.n_layers * model.n_heads == 1:
            raise NotMeasurable(f"{model.name}: has one head, and no other one whose output it could be fed")
        effects = inputs["heads"]["direct_effect"].isel(prompt=slice(SELF_FEEDING_PROMPTS))
        seed = int(settings["seed"])
        fed = choose_fed(effects.values, seed)
        prompts = np.arange(shard, min(shard + SHARD_PROMPTS, effects.sizes["prompt"]))
        tokens = on_device(tokens_of(model, inputs, prompts), model.device)
        positions = spread_positions(effects.sizes["position"])
        parts = [
            _feed(model, tokens[batch], fed, positions, seed, prompts[batch.numpy()])
            for batch in torch.arange(len(prompts)).split(prompts_that_fit(model, tokens.shape[1]))
        ]
        of_fed = {name: ("fed", [getattr(head, name) for head in fed]) for name in ("layer", "head", "rank")}
        labels = {"prompt": prompts, "position": positions, "scale": list(SCALES), **of_fed}
        return xr.concat(parts, "prompt").assign_coords(labels).assign_attrs(vectors=list(VECTORS))


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
    in_order = np.argsort(-effects.mean((2, 3)).ravel(), kind="stable")
    order: list[tuple[int, int]] = [divmod(int(i), n_heads) for i in in_order]
    chosen = {*order[:STRONGEST], *(head for head in order if head[0] >= later_half(n_layers))}
    return [
        FedHead(*head, order.index(head) + 1, _another_head(head, order, seed)) for head in sorted(chosen)
    ]


def _another_head(head: tuple[int, int], heads: Sequence[tuple[int, int]], seed: int) -> tuple[int, int]:
    rest = sorted(set(heads) - {head})
    return rest[np.random.Generator(np.random.PCG64([seed, *head])).integers(len(rest))]


def spread_positions(n_positions: int) -> list[int]:
    """The middles of ``POSITIONS`` equal stretches of ``n_positions``; all of them where there are fewer."""
    n = min(POSITIONS, n_positions)
    return [(2 * i + 1) * n_positions // (2 * n) for i in range(n)]


@torch.no_grad()
def _feed(
    model: Model,
    tokens: Int[Tensor, "prompt token"],
    fed: Sequence[FedHead],
    positions: list[int],
    seed: int,
    prompts: Int[np.ndarray, " prompt"],
) -> xr.Dataset:
    """The measurement's variables of some prompts."""
    cache = DynamicCache()
    reading, replay = Reading(model, tokens, cache), Replay(model, tokens.shape[1])
    keys = CleanKeys.of(model, tokens, cache)
    after, sigma_ratio = [], []
    for position in positions:
        at = OnePosition(keys, position)
        here = [
            _feed_at(reading, at, list(heads), seed, prompts.tolist())
            for _, heads in groupby(fed, lambda head: head.layer)
        ]
        after.append(torch.cat([effects for effects, _ in here]))
        sigma_ratio.append(torch.cat([ratio for _, ratio in here]))
    before = [reading.effects(head.layer, reading.clean.z[head.layer])[..., head.head] for head in fed]
    everywhere = [_effects_fed_everywhere(reading, replay, head)[..., positions] for head in fed]
    made = {
        "before": (("fed", "prompt", "position"), torch.stack(before)[..., positions]),
        "after": (("fed", "vector", "scale", "prompt", "position"), torch.stack(after, -1)),
        "after_everywhere": (("fed", "prompt", "position"), torch.stack(everywhere)),
        "sigma_ratio": (("fed", "vector", "prompt", "position"), torch.stack(sigma_ratio, -1)),
    }
    return xr.Dataset({name: (dims, values.cpu().numpy()) for name, (dims, values) in made.items()})


def _feed_at(
    reading: Reading, at: OnePosition, heads: Sequence[FedHead], seed: int, prompts: Sequence[int]
) -> tuple[Float[Tensor, "fed vector scale prompt"], Float[Tensor, "fed vector prompt"]]:
    """Heads of one layer fed at one position: their direct effects there, and the final norm's ratio."""
    model, layer = reading.model, heads[0].layer
    vectors = torch.stack([_vectors(reading, head, at.position, seed, prompts) for head in heads])
    scales = torch.tensor(SCALES, device=vectors.device, dtype=model.dtype)[:, None, None]
    residual = reading.clean.residuals[layer][:, at.position] + scales * vectors[:, :, None]
    z = _rows(at, residual, lambda blocks, rows: z_reached(model, layer, lambda: blocks.block(layer, rows)))
    of_all = reading.effects_at(layer, z, at.position)
    effects = [of_all[i, ..., head.head] for i, head in enumerate(heads)]
    largest = _rows(at, residual[:, :, -1], lambda blocks, rows: blocks.from_block(layer, rows))
    return torch.stack(effects), reading.sigma[:, at.position] / reading.norm.sigma(largest)


def _vectors(
    reading: Reading, head: FedHead, position: int, seed: int, prompts: Sequence[int]
) -> Float[Tensor, "vector prompt d_model"]:
    """What the head is fed at a position, in the order of ``VECTORS``."""
    own = reading.output(head.layer, head.head, position)
    random = _random_like(own, [seed, head.layer, head.head, position], prompts)
    return torch.stack([own, reading.output(*head.other, position), random])


def _random_like(
    output: Float[Tensor, "prompt d_model"], seed: Sequence[int], prompts: Sequence[int]
) -> Float[Tensor, "prompt d_model"]:
    """A Gaussian direction for each prompt, of ``output``'s norm; a prompt's is the same in any batch."""
    drawn = [
        np.random.Generator(np.random.PCG64([*seed, i])).standard_normal(output.shape[-1], dtype=np.float32)
        for i in prompts
    ]
    direction = nn.functional.normalize(torch.from_numpy(np.stack(drawn)).to(output), dim=-1)
    return direction * output.norm(dim=-1, keepdim=True)


def _rows(
    at: OnePosition,
    residual: Float[Tensor, "*variant prompt d_model"],
    run: Callable[[Blocks, Tensor], Tensor],
) -> Float[Tensor, "*variant prompt *what"]:
    """``run(blocks, rows)`` of residuals at one position, a row for each prompt of each variant."""
    shape = residual.shape[:-1]
    prompt = torch.arange(shape[-1], device=residual.device).expand(shape).flatten()
    rows = residual.flatten(0, -2)[:, None]
    at_once = at.rows_at_once()
    parts = zip(prompt.split(at_once), rows.split(at_once), strict=True)
    return torch.cat([run(at.rows_of(of), part)[:, 0] for of, part in parts]).unflatten(0, shape)


def _effects_fed_everywhere(
    reading: Reading, replay: Replay, fed: FedHead
) -> Float[Tensor, "prompt position"]:
    """Direct effects (logits) of a head when every position gets its own output there, in one run."""
    own = reading.output(fed.layer, fed.head)
    z = attention_z(reading.model, replay, fed.layer, reading.clean.residuals[fed.layer] + SCALES[-1] * own)
    return reading.effects(fed.layer, z)[..., fed.head]
