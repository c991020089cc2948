"""What is kept of the neurons of an MLP on some tokens: sums, counts, and the few that change most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from selfrepair.statistics import select_top

if TYPE_CHECKING:
    from selfrepair.measure.neuron_effects import NeuronEffects

#: How tokens of a head are selected: by its direct effect, by how much the MLPs repair when it is ablated,
#: by how much they break.
SELECTIONS = ("direct effect", "repair", "breakage")
#: Variables of the measurement ``heads`` that say what ablating a head does.
OF_A_HEAD = ("direct_effect", "ablated_direct_effect", "logit_change", "self_repair_mlps")
#: Shares of the head's direct effect that one neuron may repair, as the authors' figure has them.
THRESHOLDS = (0.5, 0.1, 0.05, 0.025, 0.01)
#: Neurons whose changes are kept one by one, and those that are kept as a set.
N_FEW, N_SET = 5, 20
#: A token counts as moved if its neurons' absolute changes sum to more than this part of the head's direct
#: effect; less is rounding, as where a prompt and its donor are alike up to that token.
ROUNDING = 1e-4


@dataclass(frozen=True)
class HeadTokens:
    """What ablating a head does on some tokens (logits), and by which of ``SELECTIONS`` each is selected."""

    direct_effect: Float[np.ndarray, "*token"]
    self_repair: Float[np.ndarray, "*token"]
    mlps_repair: Float[np.ndarray, "*token"]
    selected: Bool[np.ndarray, "*token selection"]

    @classmethod
    def of(cls, head: xr.Dataset, fraction: float) -> HeadTokens:
        """Of one head in the measurement ``heads``; each selection takes ``fraction`` of all tokens.

        ``mlps_repair`` is the sum over all MLPs, by which the authors' figure code selects.

        Raises:
            UserError: ``fraction`` is not in (0, 1].
        """
        effect, mlps = head["direct_effect"].values, head["self_repair_mlps"].values
        repair = head["logit_change"].values - (head["ablated_direct_effect"].values - effect)
        ranked = {"direct effect": effect, "repair": mlps, "breakage": -mlps}
        selected = np.stack([select_top(ranked[name], fraction) for name in SELECTIONS], -1)
        return cls(effect, repair, mlps, selected)

    @property
    def strength(self) -> float:
        """Mean direct effect on the tokens that are selected by it."""
        top = self.selected[..., 0]
        return float(np.where(top, self.direct_effect, 0).sum() / top.sum())

    def at(self, *index: np.ndarray) -> HeadTokens:
        """Those at some prompts, or prompts and positions."""
        return HeadTokens(
            self.direct_effect[index],
            self.self_repair[index],
            self.mlps_repair[index],
            self.selected[index],
        )


#: Variables by name: dimensions and values.
Summary = dict[str, tuple[tuple[str, ...], np.ndarray]]


def summarize(effects: NeuronEffects, tokens: HeadTokens) -> Summary:
    """What is kept of a chunk of tokens; ``tokens`` are the same, of the ablated head.

    ``side`` 0 is that of repairing neurons. Side 1 is side 0 with the signs of all direct effects and
    changes reversed: neurons that break instead of repairing, that support instead of erasing.

    Per ``row`` (token): ``prompt`` and ``position``; the fields of ``tokens``, ``selected [row,
    selection]``; ``moved``, false where the ablation changes nothing but rounding; ``mlp_direct_effect``, the
    sum of clean direct effects over neurons (without the MLP's bias). ``[row, side]``: ``total``, the sum of
    positive changes; ``by_erasing``, the part of it by neurons that erase (clean direct effect below 0);
    ``changed_by_erasing``, the sum of *absolute* changes of those; ``n_for_half``, the smallest number of
    neurons that carries half of ``total``, 0 where there is none. ``n_above [row, side, threshold]``: how
    many change by at least so much of the head's direct effect, 0 where that is not positive. ``largest`` and
    ``largest_clean [row, side, few]``: the largest changes, and the clean direct effects there. Sets of
    neurons ``[row, set]``: the most repairing first (``repairers``), the largest absolute (``strongest``) and
    the most negative (``erasers``) clean direct effects. Effects, changes and their sums are logits.

    Summed over the tokens selected by direct effect, in float64: ``clean_by_neuron`` and ``change_by_neuron
    [neuron]``; over those of them that are moved, by rank ``[side, neuron]``, largest change first: the
    cumulative share of the token's absolute change (``share_by_rank``), the clean direct effect
    (``clean_by_rank``), and the number of tokens that have such a rank (``tokens_by_rank``).
    """
    clean, change = effects.clean, effects.change
    direct_effect = torch.from_numpy(tokens.direct_effect).to(clean)
    top = torch.from_numpy(tokens.selected[:, 0]).to(clean.device)
    absolute = change.abs().sum(1)
    moved = absolute > ROUNDING * direct_effect.abs()
    ordered, order = change.sort(1, descending=True)
    in_order = clean.gather(1, order)
    both = ((ordered, in_order), (-ordered.flip(1), -in_order.flip(1)))
    sides = [_of_side(*side, direct_effect, moved) for side in both]
    ranks = [_by_rank(*side, absolute, moved & top) for side in both]
    n_set = min(N_SET, clean.shape[1])
    per_row = {
        "prompt": effects.prompt,
        "position": effects.position,
        "direct_effect": direct_effect,
        "self_repair": torch.from_numpy(tokens.self_repair).to(clean),
        "mlps_repair": torch.from_numpy(tokens.mlps_repair).to(clean),
        "moved": moved,
        "mlp_direct_effect": clean.sum(1),
    }
    variables: dict[str, tuple[tuple[str, ...], Tensor]] = {
        name: (("row",), values) for name, values in per_row.items()
    }
    variables["selected"] = ("row", "selection"), torch.from_numpy(tokens.selected)
    for name, dims in _OF_A_SIDE.items():
        variables[name] = ("row", "side", *dims), torch.stack([side[name] for side in sides], 1)
    variables["repairers"] = ("row", "set"), order[:, :n_set].int()
    variables["strongest"] = ("row", "set"), clean.abs().topk(n_set, 1).indices.int()
    variables["erasers"] = ("row", "set"), clean.topk(n_set, 1, largest=False).indices.int()
    for name in ranks[0]:
        variables[name] = ("side", "neuron"), torch.stack([side[name] for side in ranks]).double()
    variables["clean_by_neuron"] = ("neuron",), clean[top].sum(0).double()
    variables["change_by_neuron"] = ("neuron",), change[top].sum(0).double()
    return {name: (dims, values.cpu().numpy()) for name, (dims, values) in variables.items()}


#: Variables of a side, with their dimensions beside ``row`` and ``side``.
_OF_A_SIDE: dict[str, tuple[str, ...]] = {
    "total": (),
    "by_erasing": (),
    "changed_by_erasing": (),
    "n_for_half": (),
    "n_above": ("threshold",),
    "largest": ("few",),
    "largest_clean": ("few",),
}


def _of_side(
    ordered: Float[Tensor, "token neuron"],
    clean: Float[Tensor, "token neuron"],
    direct_effect: Float[Tensor, " token"],
    moved: Bool[Tensor, " token"],
) -> dict[str, Tensor]:
    """Of one side; ``ordered`` are the changes, positive and largest first, ``clean`` the effects there."""
    positive = ordered.clamp(min=0)
    total = positive.sum(1)
    n_for_half = (positive.cumsum(1) < total[:, None] / 2).sum(1) + 1
    wanted = direct_effect.masked_fill(direct_effect <= 0, torch.inf)[:, None]
    return {
        "total": total,
        "by_erasing": positive.masked_fill(clean >= 0, 0).sum(1),
        "changed_by_erasing": ordered.abs().masked_fill(clean >= 0, 0).sum(1),
        "n_for_half": n_for_half.masked_fill(~moved | (total == 0), 0).int(),
        "n_above": torch.stack([(ordered >= part * wanted).sum(1) for part in THRESHOLDS], 1).int(),
        "largest": ordered[:, :N_FEW],
        "largest_clean": clean[:, :N_FEW],
    }


def _by_rank(
    ordered: Float[Tensor, "token neuron"],
    clean: Float[Tensor, "token neuron"],
    absolute: Float[Tensor, " token"],
    counted: Bool[Tensor, " token"],
) -> dict[str, Float[Tensor, " neuron"]]:
    """Sums over counted tokens by rank; ``ordered`` and ``clean`` are as in :func:`_of_side`."""
    there = (ordered > 0) & counted[:, None]
    share = ordered.clamp(min=0).cumsum(1) / absolute[:, None]
    return {
        "share_by_rank": share.masked_fill(~counted[:, None], 0).sum(0),
        "clean_by_rank": clean.masked_fill(~there, 0).sum(0),
        "tokens_by_rank": there.to(share.dtype).sum(0),
    }


def joined(chunks: Sequence[Summary]) -> Summary:
    """Of all tokens of ``chunks``, which are of the same neurons."""
    whole = {}
    for name, (dims, _) in chunks[0].items():
        values = [chunk[name][1] for chunk in chunks]
        whole[name] = dims, np.concatenate(values) if dims[0] == "row" else np.sum(values, 0)
    return whole
