"""Which neurons of later MLPs repair an ablated head, how few they are, and whether they do it by erasing less.

Neuron ``n`` of an MLP writes ``act_n W_out[n]``: its direct effect is ``DE_n = act_n (W_out[n] · u) / σ_clean``, its
self-repair the change of that when a head is ablated. *Erasure* is a negative clean direct effect, *anti-erasure*
its becoming less negative. Rushing & Nanda 2024, §5.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfrepair.engine.head_ablation import rows_that_fit
from selfrepair.analysis.head_table import select_each_top
from selfrepair.analysis.claims import Samples
from selfrepair.text.corpora import Prompts
from selfrepair.engine.direct_effect import FinalNorm, token_directions
from selfrepair.errors import UserError
from selfrepair.models.loading import Model
from selfrepair.engine.ablations import Replacement, mean_z, pairs_that_fit, partner_batches, replacement_for
from selfrepair.engine.forward import CleanRun, Replay, carry, run_clean, watching
from selfrepair.statistics import bootstrap_weights
from selfrepair.measure.heads import checked_tokens

#: Most repairing neurons that are followed one by one, and as a set.
N_SINGLE, N_SET = 10, 20
#: Shares of the head's direct effect that one neuron may repair.
THRESHOLDS = (0.5, 0.1, 0.05, 0.025, 0.01)
#: Tokens × neurons are held for so many tokens at a time.
TOKENS_AT_ONCE = 1024
#: Pairs of tokens × neurons of a set that are compared at a time.
COMPARED_AT_ONCE = 20_000_000
#: A token counts as moved if its neurons' absolute changes sum to more than this part of the head's direct effect;
#: less is rounding, as where a prompt and its donor are alike up to that token.
ROUNDING = 1e-4

Head = tuple[int, int]

HALF = "share of the last MLP's neurons that carry half of its positive change"
SINGLE = "share of tokens on which one neuron of the last MLP repairs at least 5 % of the direct effect"
OVERLAP = "Jaccard overlap of the 20 most repairing neurons between tokens"
ERASING = "share of the positive change by neurons with negative clean direct effect"
SUPPORTING = "share of the negative change by neurons with positive clean direct effect"


@dataclass(frozen=True)
class NeuronEffects:
    """Direct effects (logits) of every neuron of one MLP on some of a head's tokens: clean, and their change by the head's ablation."""

    head: Head
    mlp: int
    prompt: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    clean: Float[Tensor, "token neuron"]
    change: Float[Tensor, "token neuron"]


def first_later_mlp(model: Model, layer: int) -> int:
    """First MLP that sees what the heads of ``layer`` write: that of their own block unless attention and MLP are parallel.

    Raises:
        UserError: there is none.
    """
    first = layer + 1 if model.parallel else layer
    if not 0 <= layer < model.n_layers or first >= model.n_layers:
        raise UserError(f"{model.name}: no MLP comes after the heads of layer {layer}; choose a layer from 0 to {last_layer(model)}")
    return first


def last_layer(model: Model) -> int:
    """Last layer whose heads have an MLP after them; −1 if there is none."""
    return model.n_layers - (2 if model.parallel else 1)


def neuron_effects(
    model: Model, tokens: Int[Tensor, "prompt position"], ablation: str, selected: dict[Head, Bool[np.ndarray, "prompt position-1"]]
) -> Iterator[NeuronEffects]:
    """Ablates each head of ``selected`` in turn and gives, for its selected tokens, every neuron of every later MLP.

    Only selected tokens are taken from a pass, and no more than ``TOKENS_AT_ONCE`` of them with all neurons at a time.

    Raises:
        UserError: unknown ablation, or a head without a later MLP.
    """
    for layer, _ in selected:
        first_later_mlp(model, layer)
    replacement = replacement_for(ablation, model, mean_z(model, tokens) if ablation == "mean" else None)
    replay = Replay(model, tokens.shape[1])
    pairs = max(1, min(rows_that_fit(model, tokens.shape[1]) // 2, pairs_that_fit(model, tokens.shape[1]) // 3))
    for batch in partner_batches(len(tokens), pairs):
        masks = {head: torch.from_numpy(mask[batch.numpy()]).to(model.device) for head, mask in selected.items()}
        yield from _effects_in_batch(model, replay, tokens, batch.to(model.device), replacement, masks)


def _effects_in_batch(
    model: Model,
    replay: Replay,
    tokens: Int[Tensor, "prompt position"],
    batch: Int[Tensor, " batch"],
    replacement: Replacement,
    masks: dict[Head, Bool[Tensor, "batch position-1"]],
) -> Iterator[NeuronEffects]:
    """Those of one batch of partners."""
    wanted = torch.stack(list(masks.values())).any(0)
    seen: dict[int, Tensor] = {}
    with watching(model.mlp_output_projections, lambda mlp, activations, _: seen.update({mlp: _taken(activations, wanted)})):
        clean = run_clean(model, tokens[batch])
    reading = _reading(model, tokens[batch], clean)
    for head, mask in masks.items():
        if not mask.any():
            continue
        prompt, position = mask.nonzero(as_tuple=True)
        for mlp, after in _ablated_activations(model, replay, clean, replacement, head, mask).items():
            before = seen[mlp][mask[wanted]]
            for part in torch.arange(len(prompt), device=mask.device).split(TOKENS_AT_ONCE):
                here = prompt[part], position[part]
                effects = _read_neurons(reading[here], model.W_out(mlp), before[part], after[part])
                yield NeuronEffects(head, mlp, batch[here[0]], here[1], *effects)


@torch.no_grad()
def _reading(model: Model, tokens: Int[Tensor, "prompt position"], clean: CleanRun) -> Float[Tensor, "prompt position-1 d_model"]:
    """``u / σ_clean``."""
    direction, _ = token_directions(model, tokens)
    return direction / FinalNorm.of(model.final_norm).sigma(clean.final_residual[:, :-1])[..., None]


@torch.no_grad()
def _ablated_activations(
    model: Model, replay: Replay, clean: CleanRun, replacement: Replacement, head: Head, mask: Bool[Tensor, "prompt read_position"]
) -> dict[int, Float[Tensor, "token neuron"]]:
    """Activations of the masked tokens in every MLP after ``head`` when it is ablated."""
    layer, number = head
    first = first_later_mlp(model, layer)
    found: dict[int, Tensor] = {}
    z = clean.z[layer]
    delta = (replacement(layer, z) - z)[:, :, number] @ model.W_O(layer)[number]
    with watching(model.mlp_output_projections[first:], lambda i, activations, _: found.update({first + i: _taken(activations, mask)})):
        carry(model, replay, clean, layer, delta[None])
    return found


@torch.no_grad()
def _read_neurons(
    reading: Float[Tensor, "token d_model"],
    W_out: Float[Tensor, "neuron d_model"],
    clean: Float[Tensor, "token neuron"],
    ablated: Float[Tensor, "token neuron"],
) -> tuple[Float[Tensor, "token neuron"], Float[Tensor, "token neuron"]]:
    """Direct effects of clean activations, and their change."""
    along = reading @ W_out.to(reading.dtype).T
    return clean.to(along.dtype) * along, (ablated - clean).to(along.dtype) * along


def _taken(activations: Float[Tensor, "*batch neuron"], mask: Bool[Tensor, "prompt read_position"]) -> Float[Tensor, "token neuron"]:
    """The masked tokens of a batch, which some architectures have flattened to one dimension."""
    return activations.flatten(0, -2)[nn.functional.pad(mask, (0, 1)).flatten()]


@dataclass(frozen=True)
class NeuronRepair:
    """What the neurons of one MLP do on the top tokens of heads of one layer; everything per neuron is summed over tokens.

    Per token: the ``N_SINGLE`` ``largest`` changes (logits, descending), the ``N_SET`` neurons with the largest changes
    (``repairers``) and with the most negative clean direct effects (``erasers``), the smallest number of neurons that
    carries half of the positive change (``n_for_half``, NaN where nothing is positive), the sums of positive and of
    negative changes (``repair``, ``harm``) and the parts of them by neurons that erase (clean direct effect below 0) and
    that support (above 0). ``moved`` is false where the ablation changes nothing but rounding.

    By rank, first for repairing neurons by descending change, then for harming ones by ascending: the cumulative share of
    the token's absolute change, the clean direct effect, and the number of tokens that have such a rank.
    """

    layer: int
    mlp: int
    head: Int[np.ndarray, " token"]
    prompt: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    direct_effect: Float[np.ndarray, " token"]
    moved: Bool[np.ndarray, " token"]
    largest: Float[np.ndarray, "token single"]
    repairers: Int[np.ndarray, "token set"]
    erasers: Int[np.ndarray, "token set"]
    n_for_half: Float[np.ndarray, " token"]
    repair: Float[np.ndarray, " token"]
    repair_by_erasing: Float[np.ndarray, " token"]
    harm: Float[np.ndarray, " token"]
    harm_by_supporting: Float[np.ndarray, " token"]
    share_by_rank: Float[np.ndarray, "2 neuron"]
    clean_by_rank: Float[np.ndarray, "2 neuron"]
    tokens_by_rank: Float[np.ndarray, "2 neuron"]
    clean_by_neuron: Float[np.ndarray, " neuron"]
    change_by_neuron: Float[np.ndarray, " neuron"]

    @classmethod
    def of_effects(cls, effects: NeuronEffects, direct_effect: Float[Tensor, " token"]) -> NeuronRepair:
        """Of one chunk; ``direct_effect`` (logits) is the head's."""
        clean, change = effects.clean, effects.change
        total = change.abs().sum(1)
        moved = total > ROUNDING * direct_effect.abs()
        ordered, order = change.sort(1, descending=True)
        clean_in_order = clean.gather(1, order)
        by_rank = []
        for values, cleans in ((ordered, clean_in_order), (-ordered.flip(1), clean_in_order.flip(1))):
            there = (values > 0) & moved[:, None]
            share = values.clamp(min=0).cumsum(1) / total[:, None]
            by_rank.append(
                [x.masked_fill(~y, 0).sum(0) for x, y in ((share, moved[:, None]), (cleans, there), (there.to(share.dtype), there))]
            )
        positive = ordered.clamp(min=0)
        repair = positive.sum(1)
        short = (positive.cumsum(1) < repair[:, None] / 2).sum(1) + 1
        arrays = {
            "head": torch.full_like(effects.prompt, effects.head[1]),
            "prompt": effects.prompt,
            "position": effects.position,
            "direct_effect": direct_effect,
            "moved": moved,
            "largest": ordered[:, :N_SINGLE],
            "repairers": order[:, :N_SET],
            "erasers": clean.argsort(1)[:, :N_SET],
            "n_for_half": short.to(repair.dtype).masked_fill(~moved | (repair == 0), torch.nan),
            "repair": repair,
            "repair_by_erasing": change.clamp(min=0).masked_fill(clean >= 0, 0).sum(1),
            "harm": change.clamp(max=0).sum(1),
            "harm_by_supporting": change.clamp(max=0).masked_fill(clean <= 0, 0).sum(1),
            **dict(zip(_BY_RANK, map(torch.stack, zip(*by_rank, strict=True)), strict=True)),
            "clean_by_neuron": clean.sum(0),
            "change_by_neuron": change.sum(0),
        }
        numpy = {name: array.cpu().numpy() for name, array in arrays.items()}
        return cls(effects.head[0], effects.mlp, **{n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in numpy.items()})

    @classmethod
    def joined(cls, parts: Sequence[NeuronRepair]) -> NeuronRepair:
        """Of all tokens of ``parts``, which are of the same layer and MLP, in the order of heads, prompts and positions."""
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("layer", "mlp")]
        columns = {name: [getattr(part, name) for part in parts] for name in names}
        arrays = {name: sum(column) if name in _SUMMED else np.concatenate(column) for name, column in columns.items()}
        order = np.lexsort((arrays["position"], arrays["prompt"], arrays["head"]))
        return cls(parts[0].layer, parts[0].mlp, **{name: a if name in _SUMMED else a[order] for name, a in arrays.items()})

    @property
    def d_mlp(self) -> int:
        return len(self.clean_by_neuron)

    def repaired_alone(self, weights: Float[np.ndarray, "sample prompt"]) -> Float[np.ndarray, "threshold single sample"]:
        """Share of tokens on which the Nth most repairing neuron alone repairs at least a share (``THRESHOLDS``) of the direct effect.

        For each sample of prompts. A token whose direct effect is not positive has nothing to repair and counts as not repaired.
        """
        floor = np.multiply.outer(THRESHOLDS, np.where(self.direct_effect > 0, self.direct_effect, np.inf))
        repaired = (self.largest.T[None] >= floor[:, None]).astype(np.float64)
        return self.token_ratio(repaired, np.ones(len(self.prompt)), weights)

    def token_ratio(
        self, top: Float[np.ndarray, "*what token"], bottom: Float[np.ndarray, " token"], weights: Float[np.ndarray, "sample prompt"]
    ) -> Float[np.ndarray, "*what sample"]:
        """``Σ top / Σ bottom`` over tokens, a token counted as often as its prompt is drawn; NaN where a sample has none."""
        above, below = (np.zeros((*values.shape[:-1], weights.shape[1])) for values in (top, bottom))
        np.add.at(above, (..., self.prompt), top)
        np.add.at(below, self.prompt, bottom)
        drawn = below @ weights.T
        return above @ weights.T / np.where(drawn, drawn, np.nan)


_BY_RANK = ("share_by_rank", "clean_by_rank", "tokens_by_rank")
_SUMMED = (*_BY_RANK, "clean_by_neuron", "change_by_neuron")


def repairing_neurons(
    model: Model,
    tokens: Int[Tensor, "prompt position"],
    ablation: str,
    direct_effect: Float[np.ndarray, "layer head prompt position-1"],
    selected: dict[Head, Bool[np.ndarray, "prompt position-1"]],
) -> dict[Head, dict[int, NeuronRepair]]:
    """Per head of ``selected`` and later MLP, what the MLP's neurons do on the head's selected tokens.

    ``direct_effect`` is a sweep's. Only summaries are kept of the chunks that :func:`neuron_effects` gives.

    Raises:
        UserError: as :func:`neuron_effects`.
    """
    parts: dict[Head, dict[int, list[NeuronRepair]]] = {head: {} for head in selected}
    for effects in neuron_effects(model, tokens, ablation, selected):
        own = torch.from_numpy(direct_effect[effects.head]).to(effects.clean)[effects.prompt, effects.position]
        parts[effects.head].setdefault(effects.mlp, []).append(NeuronRepair.of_effects(effects, own))
    return {head: {mlp: NeuronRepair.joined(chunks) for mlp, chunks in of_head.items()} for head, of_head in parts.items()}


def chance_overlap(n_neurons: int, size: int) -> float:
    """Expected Jaccard overlap of two independent random sets of ``size`` out of ``n_neurons`` (hypergeometric)."""
    ways = [math.comb(size, common) * math.comb(n_neurons - size, size - common) for common in range(size + 1)]
    return sum(n * common / (2 * size - common) for common, n in enumerate(ways)) / math.comb(n_neurons, size)


def pair_overlaps(one: NeuronRepair, other: NeuronRepair, n_prompts: int) -> Float[np.ndarray, "2 prompt prompt"]:
    """Jaccard overlaps of the ``repairers`` of a moved token of ``one`` and one of ``other`` in a different prompt.

    By the two tokens' prompts: the sum over all such pairs, and their number.
    """
    sets, prompt, other_sets, other_prompt = (x[r.moved] for r in (one, other) for x in (r.repairers, r.prompt))
    belongs = np.eye(n_prompts)[other_prompt]
    total = np.zeros((n_prompts, n_prompts))
    at_once = max(1, COMPARED_AT_ONCE // max(1, other_sets.size))
    for start in range(0, len(sets), at_once):
        here = slice(start, start + at_once)
        member = np.zeros((len(sets[here]), one.d_mlp), dtype=bool)
        np.put_along_axis(member, sets[here], True, axis=1)
        common = member[:, other_sets].sum(-1)
        np.add.at(total, prompt[here], common / (2 * sets.shape[1] - common) @ belongs)
    number = np.multiply.outer(*(np.bincount(of, minlength=n_prompts) for of in (prompt, other_prompt)))
    return np.stack([total, number]) * (1 - np.eye(n_prompts))


def overlap_samples(
    pairs: Float[np.ndarray, "2 prompt prompt"], weights: Float[np.ndarray, "sample prompt"]
) -> Float[np.ndarray, " sample"]:
    """Mean overlap when prompts are drawn: a pair counts as often as the product of its prompts' draws; NaN without pairs."""
    total, number = (((weights @ by_prompt) * weights).sum(1) for by_prompt in pairs)
    return total / np.where(number, number, np.nan)


@dataclass(frozen=True)
class ModelNeurons:
    """One model's repairing neurons: of a ``chosen`` head, of all heads of its layer, and of the strongest head of later layers.

    ``strongest`` are the heads with the largest mean direct effect on their top tokens, one for each layer of the later
    half that has an MLP after its heads. ``text`` holds the prompts' tokens, decoded.
    """

    model: str
    chosen: Head
    strongest: list[Head]
    by_head: dict[Head, dict[int, NeuronRepair]]
    text: list[list[str]]

    @classmethod
    def measure(cls, model: Model, prompts: Prompts, sweep: xr.Dataset, fraction: float, head: Sequence[int] | None = None) -> ModelNeurons:
        """On each head's top ``fraction`` of tokens, for the ablation of ``sweep``.

        ``head`` is ``[layer, head]``; by default the strongest of the second-to-last layer.

        Raises:
            UserError: no such head, or no MLP after it.
        """
        effect = sweep["direct_effect"].values
        top = select_each_top(effect, fraction)
        strength = np.where(top, effect, 0).sum((2, 3)) / top.sum((2, 3))
        if head is None:
            layer = max(0, model.n_layers - 2)
            first_later_mlp(model, layer)
            chosen = layer, int(strength[layer].argmax())
        else:
            chosen = _checked_head(model, head)
        later = range(round(0.5 * model.n_layers), last_layer(model) + 1)
        strongest = [(layer, int(strength[layer].argmax())) for layer in later]
        wanted = dict.fromkeys([*((chosen[0], h) for h in range(model.n_heads)), *strongest])
        tokens = checked_tokens(model, prompts)
        by_head = repairing_neurons(model, tokens, sweep.attrs["ablation"], effect, {at: top[at] for at in wanted})
        text = [[model.tokenizer.decode([token]) for token in prompt] for prompt in prompts.tokens.tolist()]
        return cls(model.name, chosen, strongest, by_head, text)

    @property
    def later_mlps(self) -> list[int]:
        """The MLPs after the chosen head."""
        return sorted(self.by_head[self.chosen])

    def scopes(self, mlp: int | None = None) -> dict[str, NeuronRepair]:
        """The neurons of one later MLP (the last) on the chosen head's tokens, and on those of all heads of its layer."""
        mlp = self.later_mlps[-1] if mlp is None else mlp
        layer, head = self.chosen
        of_layer = [found[mlp] for at, found in self.by_head.items() if at[0] == layer]
        return {f"L{layer}H{head}": self.by_head[self.chosen][mlp], f"all heads of L{layer}": NeuronRepair.joined(of_layer)}

    def single_neurons(self) -> pd.DataFrame:
        """Share of tokens on which the most repairing neuron of each later MLP alone repairs at least each threshold of the direct effect."""
        once = np.ones((1, len(self.text)))
        rows = []
        for mlp in self.later_mlps:
            for scope, repair in self.scopes(mlp).items():
                rows.append((self.model, scope, mlp, *repair.repaired_alone(once)[:, 0, 0]))
        return pd.DataFrame(rows, columns=["model", "heads", "MLP", *(f"≥ {t:.3g}" for t in THRESHOLDS)])

    def overlaps(self) -> pd.DataFrame:
        """Jaccard overlap of the most repairing neurons of each later MLP between tokens of different prompts.

        Between two tokens of the chosen head, two of the same head of its layer (whichever), and one of a head and one of
        the next head of the layer, with 95 % intervals over prompts; ``chance`` is that of two random sets.
        """
        weights, n = self.weights(), len(self.text)
        layer, head = self.chosen
        rows = []
        for mlp in self.later_mlps:
            heads = [found[mlp] for at, found in self.by_head.items() if at[0] == layer]
            own = self.by_head[self.chosen][mlp]
            pairs = {
                f"L{layer}H{head}": pair_overlaps(own, own, n),
                f"one head of L{layer}": sum(pair_overlaps(one, one, n) for one in heads),
                f"two heads of L{layer}": sum(
                    pair_overlaps(one, after, n) for one, after in zip(heads, heads[1:] + heads[:1], strict=True)
                ),
            }
            for name, samples in ((name, overlap_samples(of, weights)) for name, of in pairs.items()):
                low, high = np.nanquantile(samples[1:], [0.025, 0.975])
                rows.append((self.model, mlp, name, samples[0], low, high, chance_overlap(own.d_mlp, own.repairers.shape[1])))
        return pd.DataFrame(rows, columns=["model", "MLP", "tokens of", "overlap", "low", "high", "chance"])

    def top_neurons(self, n: int = 4, n_tokens: int = 4) -> pd.DataFrame:
        """The chosen head's ``n`` strongest erasers and ``n`` strongest repairers among all neurons of later MLPs, on average.

        Direct effects and changes are means over the tokens, in logits. ``erases`` counts the tokens on which the neuron is
        one of the ``N_SET`` of its MLP with the most negative clean direct effect; the most frequent of them are shown.
        """
        found = self.by_head[self.chosen]
        places = [(mlp, neuron) for mlp in self.later_mlps for neuron in range(found[mlp].d_mlp)]
        clean, change = (
            np.concatenate([getattr(found[mlp], name) / len(found[mlp].prompt) for mlp in self.later_mlps])
            for name in ("clean_by_neuron", "change_by_neuron")
        )
        rows = []
        for kind, order in (("erasers", np.argsort(clean, kind="stable")), ("repairers", np.argsort(-change, kind="stable"))):
            for at in order[:n].tolist():
                mlp, neuron = places[at]
                repair = found[mlp]
                erased = (repair.erasers == neuron).any(1)
                counts = Counter(self._next_token(repair, token) for token in np.flatnonzero(erased).tolist())
                shown = ", ".join(f"{text!r} ×{count}" for text, count in counts.most_common(n_tokens))
                rows.append((self.model, f"top {kind}", mlp, neuron, clean[at], change[at], f"{erased.sum()} of {len(erased)}", shown))
        columns = ["model", "among", "MLP", "neuron", "clean direct effect", "change", "erases", "tokens erased most often"]
        return pd.DataFrame(rows, columns=columns)

    def examples(self, n: int = 4, n_neurons: int = 3, n_context: int = 8) -> pd.DataFrame:
        """The chosen head's ``n`` tokens of different prompts with the largest direct effect, and the neurons of the last MLP that repair most."""
        (repair, _) = self.scopes().values()
        order = np.argsort(-repair.direct_effect, kind="stable")
        _, first = np.unique(repair.prompt[order], return_index=True)
        rows = []
        for token in order[np.sort(first)][:n].tolist():
            prompt, position = int(repair.prompt[token]), int(repair.position[token])
            context = "".join(self.text[prompt][max(0, position + 1 - n_context) : position + 1])
            neurons = zip(repair.repairers[token, :n_neurons].tolist(), repair.largest[token].tolist(), strict=False)
            shown = ", ".join(f"{neuron} ({change:+.2f})" for neuron, change in neurons)
            net = repair.repair[token] + repair.harm[token]
            rows.append((self.model, repr(context), repr(self._next_token(repair, token)), repair.direct_effect[token], net, shown))
        return pd.DataFrame(rows, columns=["model", "text", "next token", "direct effect", "change of the last MLP", "neurons (change)"])

    def statistics(self) -> Samples:
        """The statistics that the claims of notebook 04 are about, last MLP, mean over the strongest heads of the later layers.

        Beside them, as a control of the last one, how much of the *negative* change is by neurons with a positive clean
        direct effect: if that is no less, the neurons merely do less of what they did, whatever it was.
        """
        weights = self.weights()
        of_heads = [repair_statistics(self.by_head[head][max(self.by_head[head])], weights) for head in self.strongest]
        return {name: np.mean([found[name] for found in of_heads], axis=0) for name in (of_heads[0] if of_heads else ())}

    def _next_token(self, repair: NeuronRepair, token: int) -> str:
        return self.text[int(repair.prompt[token])][int(repair.position[token]) + 1]

    def weights(self) -> Float[np.ndarray, "sample prompt"]:
        """Every prompt once, then bootstrap samples of the prompts."""
        n = len(self.text)
        return np.concatenate([np.ones((1, n)), bootstrap_weights(n)])


def repair_statistics(repair: NeuronRepair, weights: Float[np.ndarray, "sample prompt"]) -> Samples:
    """The statistics of one head and MLP for each sample of prompts; NaN where a sample has none of the head's tokens."""
    counted = np.isfinite(repair.n_for_half).astype(np.float64)
    share = np.nan_to_num(repair.n_for_half) / repair.d_mlp
    return {
        HALF: repair.token_ratio(share, counted, weights),
        SINGLE: repair.repaired_alone(weights)[THRESHOLDS.index(0.05), 0],
        OVERLAP: overlap_samples(pair_overlaps(repair, repair, weights.shape[1]), weights),
        ERASING: repair.token_ratio(repair.repair_by_erasing, repair.repair, weights),
        SUPPORTING: repair.token_ratio(repair.harm_by_supporting, repair.harm, weights),
    }


def _checked_head(model: Model, head: Sequence[int]) -> Head:
    if len(head) != 2 or not 0 <= head[1] < model.n_heads:
        raise UserError(f"{model.name}: no head {list(head)}; give [layer, head], heads from 0 to {model.n_heads - 1}")
    layer, number = head
    first_later_mlp(model, layer)
    return layer, number
