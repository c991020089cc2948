"""What the neurons of later MLPs do when a head is ablated, on the tokens where the head matters most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfrepair.engine.ablations import Replacement
from selfrepair.errors import NotMeasurable, UserError
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.neuron_effects import (
    Combination,
    Head,
    NeuronEffects,
    first_later_mlp,
    last_layer,
    neuron_effects,
)
from selfrepair.measure.pairs import (
    head_replacement,
    needs_of_ablation,
    pair_shards,
    prompts_of_shard,
    tokens_of,
)
from selfrepair.statistics import later_half, select_top

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Most repairing neurons that are followed one by one, and as a set.
N_SINGLE, N_SET = 10, 20
#: A token counts as moved if its neurons' absolute changes sum to more than this part of the head's direct
#: effect; less is rounding, as where a prompt and its donor are alike up to that token.
ROUNDING = 1e-4


class Neurons(Measurement):
    """What :func:`summarize` keeps of each later MLP's neurons on the top tokens of some heads.

    The heads are all those of the chosen head's layer, and the strongest of every layer of the later half
    (:class:`HeadChoice`; attributes ``chosen_head`` and ``strongest_heads``). A ``combination`` is one of
    them with one of the MLPs after it: ``layer``, ``head`` and ``mlp [combination]``. A row is one token in
    one combination, ``combination_of_row [row]``; what is summed over tokens is ``[shard, combination,
    ...]``.
    """

    name: ClassVar[str] = "neurons"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "ablation", "fraction", "head")
    along: ClassVar[str] = "row"

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return (*needs_of_ablation(settings), "heads")

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        direct_effect = inputs["heads"]["direct_effect"]
        choice = HeadChoice.of(model, direct_effect, float(settings["fraction"]), settings["head"])
        prompts = prompts_of_shard(inputs, shard)
        tokens = tokens_of(model, inputs, prompts)
        of_shard = {head: found.of_prompts(prompts) for head, found in choice.judged_on.items()}
        found = repairing_neurons(model, tokens, head_replacement(model, settings, inputs), of_shard)
        whole = _assembled(found)
        whole["prompt"] = whole["prompt"].copy(data=prompts[whole["prompt"].values])
        return whole.assign_attrs(
            chosen_head=list(choice.chosen), strongest_heads=[list(head) for head in choice.strongest]
        )


MEASUREMENT = Neurons()


@dataclass(frozen=True)
class HeadTokens:
    """A head's direct effects (logits), and the tokens among them that it is judged on."""

    direct_effect: Float[np.ndarray, "prompt position"]
    is_top: Bool[np.ndarray, "prompt position"]

    @property
    def strength(self) -> float:
        """Mean direct effect on the top tokens."""
        return float(np.where(self.is_top, self.direct_effect, 0).sum() / self.is_top.sum())

    def of_prompts(self, prompts: Int[np.ndarray, " prompt"]) -> HeadTokens:
        """Those of some prompts."""
        return HeadTokens(self.direct_effect[prompts], self.is_top[prompts])


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
    def of(
        cls, model: Model, direct_effect: xr.DataArray, fraction: float, head: Sequence[int] | None
    ) -> HeadChoice:
        """By the direct effects ``[layer, head, prompt, position]`` (logits) on all prompts of the run.

        ``head`` is ``[layer, head]``; by default the strongest of the second-to-last layer.

        Raises:
            NotMeasurable: no head of the model has an MLP after it.
            UserError: no such head, no MLP after it, or ``fraction`` is not in (0, 1].
        """
        if last_layer(model) < 0:
            raise NotMeasurable(f"{model.name}: no MLP comes after any of its heads")
        layer = max(0, model.n_layers - 2) if head is None else _layer_of_head(model, head)
        first_later_mlp(model, layer)
        of_layer = _judged_heads(direct_effect, fraction, layer)
        chosen = _strongest(of_layer) if head is None else (layer, int(head[1]))
        judged_on, strongest = dict(of_layer), []
        for later in range(later_half(model.n_layers), last_layer(model) + 1):
            candidates = _judged_heads(direct_effect, fraction, later)
            strongest.append(_strongest(candidates))
            judged_on[strongest[-1]] = candidates[strongest[-1]]
        return cls(chosen, strongest, judged_on)


def _judged_heads(direct_effect: xr.DataArray, fraction: float, layer: int) -> dict[Head, HeadTokens]:
    """The heads of one layer, which alone is read from the disk."""
    effects = direct_effect.isel(layer=layer).values
    return {(layer, number): HeadTokens(of, select_top(of, fraction)) for number, of in enumerate(effects)}


def _strongest(heads: Mapping[Head, HeadTokens]) -> Head:
    return max(heads, key=lambda head: heads[head].strength)


def _layer_of_head(model: Model, head: Sequence[int]) -> int:
    if len(head) != 2 or not 0 <= head[1] < model.n_heads:
        raise UserError(
            f"{model.name}: no head {list(head)}; give [layer, head], heads from 0 to {model.n_heads - 1}"
        )
    return int(head[0])


def repairing_neurons(
    model: Model,
    tokens: Int[Tensor, "prompt token_position"],
    replacement: Replacement,
    heads: Mapping[Head, HeadTokens],
) -> dict[Combination, xr.Dataset]:
    """What :func:`summarize` keeps of each head's top tokens in each later MLP, and nothing else.

    Raises:
        UserError: a head without a later MLP.
    """
    chunks: dict[Combination, list[xr.Dataset]] = {}
    for head in heads:
        for mlp in range(first_later_mlp(model, head[0]), model.n_layers):
            nothing = _no_effects(model, Combination(*head, mlp))
            chunks[nothing.of] = [summarize(nothing, nothing.clean.sum(1))]
    for effects in neuron_effects(
        model, tokens, replacement, {head: of.is_top for head, of in heads.items()}
    ):
        whole = torch.from_numpy(heads[effects.of[:2]].direct_effect).to(effects.clean)
        chunks[effects.of].append(summarize(effects, whole[effects.prompt, effects.position]))
    return {of: _joined(parts) for of, parts in chunks.items()}


def _no_effects(model: Model, of: Combination) -> NeuronEffects:
    """On no token, so that what a shard gives has the same form whichever tokens it holds."""
    d_mlp = model.W_out(of.mlp).shape[0]
    none = torch.zeros(0, dtype=torch.long)
    effect = torch.zeros(0, d_mlp, dtype=torch.promote_types(model.dtype, torch.float32))
    return NeuronEffects(of, none, none, effect, effect)


def summarize(effects: NeuronEffects, direct_effect: Float[Tensor, " token"]) -> xr.Dataset:
    """What is kept of a chunk of tokens; ``direct_effect`` (logits) is the head's.

    Per ``row`` (token): its ``prompt`` and ``position``; the ``N_SINGLE`` ``largest`` changes (logits,
    descending); the ``N_SET`` neurons with the largest changes (``repairers``) and with the most negative
    clean direct effects (``erasers``); the smallest number of neurons that carries half of the positive
    change (``n_for_half``, NaN where nothing is positive); the sums of positive and of negative changes
    (``repair``, ``harm``) and the parts of them by neurons that erase (clean direct effect below 0) and that
    support (above 0). ``moved`` is false where the ablation changes nothing but rounding.

    Summed over tokens, in float64: ``clean_by_neuron`` and ``change_by_neuron [neuron]``; by rank ``[side,
    neuron]``, first for repairing neurons by descending change, then for harming ones by ascending: the
    cumulative share of the token's absolute change (``share_by_rank``), the clean direct effect
    (``clean_by_rank``), and the number of tokens that have such a rank (``tokens_by_rank``).
    """
    clean, change = effects.clean, effects.change
    total = change.abs().sum(1)
    moved = total > ROUNDING * direct_effect.abs()
    ordered, order = change.sort(1, descending=True)
    clean_in_order = clean.gather(1, order)
    repairing = _by_rank(ordered, clean_in_order, total, moved)
    harming = _by_rank(-ordered.flip(1), clean_in_order.flip(1), total, moved)
    positive = ordered.clamp(min=0)
    repair = positive.sum(1)
    n_for_half = (positive.cumsum(1) < repair[:, None] / 2).sum(1) + 1
    per_token = {
        "prompt": effects.prompt,
        "position": effects.position,
        "direct_effect": direct_effect,
        "moved": moved,
        "n_for_half": n_for_half.to(repair.dtype).masked_fill(~moved | (repair == 0), torch.nan),
        "repair": repair,
        "repair_by_erasing": change.clamp(min=0).masked_fill(clean >= 0, 0).sum(1),
        "harm": change.clamp(max=0).sum(1),
        "harm_by_supporting": change.clamp(max=0).masked_fill(clean <= 0, 0).sum(1),
    }
    variables = {name: (("row",), values) for name, values in per_token.items()}
    variables["largest"] = ("row", "single"), ordered[:, :N_SINGLE]
    variables["repairers"] = ("row", "set"), order[:, :N_SET].int()
    variables["erasers"] = ("row", "set"), clean.argsort(1)[:, :N_SET].int()
    for name in repairing:
        variables[name] = ("side", "neuron"), torch.stack([repairing[name], harming[name]]).double()
    variables["clean_by_neuron"] = ("neuron",), clean.sum(0).double()
    variables["change_by_neuron"] = ("neuron",), change.sum(0).double()
    return xr.Dataset({name: (dims, values.cpu().numpy()) for name, (dims, values) in variables.items()})


def _by_rank(
    ordered: Float[Tensor, "token neuron"],
    clean: Float[Tensor, "token neuron"],
    total: Float[Tensor, " token"],
    moved: Bool[Tensor, " token"],
) -> dict[str, Float[Tensor, " neuron"]]:
    """Sums over moved tokens by rank; ``ordered`` are the changes, positive and largest first."""
    there = (ordered > 0) & moved[:, None]
    share = ordered.clamp(min=0).cumsum(1) / total[:, None]
    return {
        "share_by_rank": share.masked_fill(~moved[:, None], 0).sum(0),
        "clean_by_rank": clean.masked_fill(~there, 0).sum(0),
        "tokens_by_rank": there.to(share.dtype).sum(0),
    }


def _joined(chunks: Sequence[xr.Dataset]) -> xr.Dataset:
    """Of all tokens of ``chunks``, which are of one combination."""
    rows = xr.concat([chunk.drop_dims("neuron") for chunk in chunks], "row")
    return rows.assign(reduce(add, [chunk.drop_dims("row") for chunk in chunks]).data_vars)


def _assembled(found: Mapping[Combination, xr.Dataset]) -> xr.Dataset:
    """All combinations in one dataset."""
    rows, totals = [], []
    for number, of_combination in enumerate(found.values()):
        own = of_combination.drop_dims("neuron")
        rows.append(own.assign(combination_of_row=("row", np.full(own.sizes["row"], number))))
        totals.append(of_combination.drop_dims("row"))
    whole = xr.concat(rows, "row").assign(xr.concat(totals, "combination").expand_dims("shard").data_vars)
    places = zip(Combination._fields, np.array(list(found)).T, strict=True)
    return whole.assign({name: ("combination", values) for name, values in places})
