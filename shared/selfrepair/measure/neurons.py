"""What the neurons of later MLPs do when a head is ablated, on tokens where it or they matter most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from selfrepair.engine.ablations import Replacement
from selfrepair.errors import NotMeasurable, UserError
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.neuron_effects import (
    Combination,
    NeuronEffects,
    first_later_mlp,
    last_layer,
    neuron_effects,
)
from selfrepair.measure.neuron_summary import (
    OF_A_HEAD,
    SELECTIONS,
    THRESHOLDS,
    HeadTokens,
    Summary,
    joined,
    summarize,
)
from selfrepair.measure.pairs import (
    head_replacement,
    needs_of_ablation,
    pair_shards,
    prompts_of_shard,
    tokens_of,
)
from selfrepair.statistics import Head, later_half

if TYPE_CHECKING:
    from selfrepair.models.loading import Model


class Neurons(Measurement):
    """What :func:`~selfrepair.measure.neuron_summary.summarize` keeps of each later MLP's neurons.

    The heads are all those of the chosen head's layer, and the strongest of every layer of the later half
    (:class:`HeadChoice`; attributes ``chosen_head`` and ``strongest_heads``). A ``combination`` is one of
    them with one of the MLPs after it: ``layer``, ``head`` and ``mlp [combination]``. A row is one token in
    one combination, ``combination_of_row [row]``, that any of the ``selections`` (attribute) takes; what is
    summed over tokens is ``[shard, combination, ...]``. Attribute ``thresholds``: shares of the head's direct
    effect.
    """

    name: ClassVar[str] = "neurons"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "ablation", "fraction", "head")
    along: ClassVar[str] = "row"

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return (*needs_of_ablation(settings), "heads")

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        choice = HeadChoice.of(model, inputs["heads"], float(settings["fraction"]), settings["head"])
        prompts = prompts_of_shard(inputs, shard)
        tokens = tokens_of(model, inputs, prompts)
        of_shard = {head: found.at(prompts) for head, found in choice.judged_on.items()}
        found = repairing_neurons(model, tokens, head_replacement(model, settings, inputs), of_shard)
        whole = _assembled(found)
        whole["prompt"] = whole["prompt"].copy(data=prompts[whole["prompt"].values])
        return whole.assign_attrs(
            chosen_head=list(choice.chosen),
            strongest_heads=[list(head) for head in choice.strongest],
            selections=list(SELECTIONS),
            thresholds=list(THRESHOLDS),
        )


MEASUREMENT = Neurons()


@dataclass(frozen=True)
class HeadChoice:
    """Which heads are ablated for their neurons, and on which tokens each is judged.

    ``strongest`` are the heads with the largest mean direct effect on their top tokens, one for each layer of
    the later half that has an MLP after its heads; ``judged_on`` has them and all heads of the chosen one's
    layer.
    """

    chosen: Head
    strongest: list[Head]
    judged_on: dict[Head, HeadTokens]

    @classmethod
    def of(cls, model: Model, swept: xr.Dataset, fraction: float, head: Sequence[int] | None) -> HeadChoice:
        """By the measurement ``heads`` on all prompts of the run.

        ``head`` is ``[layer, head]``; by default the strongest of the second-to-last layer.

        Raises:
            NotMeasurable: no head of the model has an MLP after it.
            UserError: no such head, no MLP after it, or ``fraction`` is not in (0, 1].
        """
        if last_layer(model) < 0:
            raise NotMeasurable(f"{model.name}: no MLP comes after any of its heads")
        layer = max(0, model.n_layers - 2) if head is None else _layer_of_head(model, head)
        first_later_mlp(model, layer)
        of_layer = _judged_heads(swept, fraction, layer)
        chosen = _strongest(of_layer) if head is None else (layer, int(head[1]))
        judged_on, strongest = dict(of_layer), []
        for later in range(later_half(model.n_layers), last_layer(model) + 1):
            candidates = _judged_heads(swept, fraction, later)
            strongest.append(_strongest(candidates))
            judged_on[strongest[-1]] = candidates[strongest[-1]]
        return cls(chosen, strongest, judged_on)


def _judged_heads(swept: xr.Dataset, fraction: float, layer: int) -> dict[Head, HeadTokens]:
    """The heads of one layer, which alone is read from the disk."""
    here = swept[list(OF_A_HEAD)].isel(layer=layer).load()
    return {
        (layer, head): HeadTokens.of(here.isel(head=head), fraction) for head in range(here.sizes["head"])
    }


def _strongest(heads: Mapping[Head, HeadTokens]) -> Head:
    return max(heads, key=lambda head: heads[head].strength)


def _layer_of_head(model: Model, head: Sequence[int]) -> int:
    if len(head) != 2 or head[0] < 0 or not 0 <= head[1] < model.n_heads:
        raise UserError(
            f"{model.name}: no head {list(head)}; give [layer, head], heads from 0 to {model.n_heads - 1}"
        )
    return int(head[0])


def repairing_neurons(
    model: Model,
    tokens: Int[Tensor, "prompt token_position"],
    replacement: Replacement,
    heads: Mapping[Head, HeadTokens],
) -> dict[Combination, Summary]:
    """What ``summarize`` keeps of each head's selected tokens in each later MLP, and nothing else.

    Raises:
        UserError: a head without a later MLP.
    """
    chunks: dict[Combination, list[Summary]] = {}
    for head, of_head in heads.items():
        for mlp in range(first_later_mlp(model, head[0]), model.n_layers):
            nothing = _no_effects(model, Combination(*head, mlp))
            chunks[nothing.of] = [_kept(nothing, of_head)]
    selected = {head: np.asarray(of_head.selected.any(-1)) for head, of_head in heads.items()}
    for effects in neuron_effects(model, tokens, replacement, selected):
        chunks[effects.of].append(_kept(effects, heads[effects.of[:2]]))
    return {of: joined(parts) for of, parts in chunks.items()}


def _kept(effects: NeuronEffects, of_head: HeadTokens) -> Summary:
    return summarize(effects, of_head.at(effects.prompt.cpu().numpy(), effects.position.cpu().numpy()))


def _no_effects(model: Model, of: Combination) -> NeuronEffects:
    """On no token, so that what a shard gives has the same form whichever tokens it holds."""
    d_mlp = model.W_out(of.mlp).shape[0]
    none = torch.zeros(0, dtype=torch.long)
    effect = torch.zeros(0, d_mlp, dtype=torch.promote_types(model.dtype, torch.float32))
    return NeuronEffects(of, none, none, effect, effect)


def _assembled(found: Mapping[Combination, Summary]) -> xr.Dataset:
    """All combinations in one dataset."""
    parts = list(found.values())
    variables: Summary = {}
    for name, (dims, _) in parts[0].items():
        values = [part[name][1] for part in parts]
        if dims[0] == "row":
            variables[name] = dims, np.concatenate(values)
        else:
            variables[name] = ("shard", "combination", *dims), np.stack(values)[None]
    n_rows = [len(part["prompt"][1]) for part in parts]
    variables["combination_of_row"] = ("row",), np.repeat(np.arange(len(parts)), n_rows)
    for name, values in zip(Combination._fields, np.array(list(found)).T, strict=True):
        variables[name] = ("combination",), values
    return xr.Dataset(variables)
