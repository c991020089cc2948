"""Tables of notebook 04: which neurons of later MLPs repair a head, how few, and whether by erasing less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.estimates import Estimate, draws
from selfrepair.analysis.neuron_repair import (
    BREAKAGE,
    BREAKING,
    DIRECT_EFFECT,
    FIRST,
    FIRST_OF_EITHER,
    REPAIR,
    REPAIRING,
    NeuronRepair,
    NeuronTotals,
    Repairs,
    mlp_part,
    repair_statistics,
    repairs_of,
    totals_of,
)
from selfrepair.analysis.neuron_sets import chance_overlap, mean_overlap, pair_overlaps
from selfrepair.statistics import Head

#: Selections of tokens, and of those for the mirror image, as tables and figures call them.
SELECTED = {"largest direct effect": (DIRECT_EFFECT, DIRECT_EFFECT), "largest MLP repair": (REPAIR, BREAKAGE)}


@dataclass(frozen=True)
class ModelNeurons:
    """One model's repairing neurons: of a chosen head, all heads of its layer, the strongest of later layers.

    ``strongest`` are the heads with the largest mean direct effect on their top tokens, one for each layer of
    the later half that has an MLP after its heads. ``text`` holds the prompts' tokens, decoded.
    """

    model: str
    chosen: Head
    strongest: list[Head]
    repairs: Repairs
    totals: dict[Head, dict[int, NeuronTotals]]
    text: list[list[str]]

    @classmethod
    def of(cls, measured: xr.Dataset, tokens: xr.Dataset, decode: Callable[[list[int]], str]) -> ModelNeurons:
        """Out of the measurements ``neurons`` and ``tokens``; ``decode`` is the tokenizer's."""
        strongest = [(layer, head) for layer, head in measured.attrs["strongest_heads"]]
        layer, head = measured.attrs["chosen_head"]
        text = [[decode([token]) for token in prompt] for prompt in tokens["token"].values.tolist()]
        return cls(
            measured.attrs["model"],
            (layer, head),
            strongest,
            repairs_of(measured),
            totals_of(measured),
            text,
        )

    @property
    def later_mlps(self) -> list[int]:
        """The MLPs after the chosen head."""
        return sorted(self.totals[self.chosen])

    def _scopes(self) -> dict[str, list[Head]]:
        """The chosen head, and all heads of its layer."""
        layer, head = self.chosen
        return {
            f"L{layer}H{head}": [self.chosen],
            f"all heads of L{layer}": [at for at in self.totals if at[0] == layer],
        }

    def scopes(self, selection: str = DIRECT_EFFECT, mlp: int | None = None) -> dict[str, NeuronRepair]:
        """One later MLP (the last) on the chosen head's tokens, and on those of all heads of its layer."""
        mlp = self.later_mlps[-1] if mlp is None else mlp
        found = self.repairs[selection]
        return {
            name: NeuronRepair.joined([found[head][mlp] for head in heads])
            for name, heads in self._scopes().items()
        }

    def total_scopes(self) -> dict[str, NeuronTotals]:
        """The last MLP's sums over the tokens of :meth:`scopes` that are selected by direct effect."""
        mlp = self.later_mlps[-1]
        return {
            name: NeuronTotals.summed([self.totals[head][mlp] for head in heads])
            for name, heads in self._scopes().items()
        }

    def mlp_parts(self) -> pd.DataFrame:
        """How much of self-repair later MLPs are, as :func:`mlp_part` counts it, selected by direct effect.

        ``repaired`` is the share of tokens with positive self-repair, ``between`` the share of these on which
        MLPs do some of it and not all.
        """
        rows = []
        for scope, repair in self.scopes().items():
            parts = {"all later MLPs": repair.mlps_repair, "last MLP": repair.mlp_repair}
            is_repaired = repair.self_repair > 0
            for name, part in parts.items():
                found = mlp_part(repair, part, self.draws())
                values = [x for of in found.values() for x in (of.value, *of.interval())]
                between = ((part > 0) & (part < repair.self_repair))[is_repaired].mean()
                rows.append((self.model, scope, is_repaired.mean(), name, between, *values))
        columns = [f"{name}{end}" for name in found for end in ("", " low", " high")]
        return pd.DataFrame(rows, columns=["model", "heads", "repaired", "of", "between", *columns])

    def single_neurons(self) -> pd.DataFrame:
        """Share of tokens on which the most repairing neuron of each later MLP alone repairs so much.

        And (``change``) on which the most breaking one breaks so much.
        """
        once = np.ones((1, len(self.text)))
        rows = []
        for mlp in self.later_mlps:
            for scope, repair in self.scopes(mlp=mlp).items():
                for change, side in (("repairs", REPAIRING), ("breaks", BREAKING)):
                    shares = repair.repaired_alone(once, side).value[:, 0]
                    rows.append((self.model, scope, mlp, change, *shares))
        names = [f"≥ {threshold:.3g}" for threshold in repair.thresholds]
        return pd.DataFrame(rows, columns=["model", "heads", "MLP", "change", *names])

    def halves(self, few: float = 0.05) -> pd.DataFrame:
        """Which share of the last MLP's neurons carries half of each side's change; all heads of the layer.

        The median over tokens, and on what share of them it is below ``few``, the end of the claim's range.
        """
        (_, repair) = self.scopes().values()
        rows = []
        for change, side in (("repairs", REPAIRING), ("breaks", BREAKING)):
            share = repair.share_for_half(side)
            rows.append((self.model, change, np.median(share), (share < few).mean()))
        return pd.DataFrame(rows, columns=["model", "change", "median", f"below {few:g}"])

    def first_neurons(self) -> pd.DataFrame:
        """What the few largest changes of the last MLP are, for all heads of the chosen one's layer.

        By how the tokens are selected, the mirror image beside (``change``). ``few of MLPs`` and ``few of
        total`` are medians over tokens of what the few largest changes make of the MLPs' repair (or breakage)
        and of the last MLP's positive (negative) change; ``erases`` is the share of tokens on which the
        neuron that changes most erases (supports), with a 95% interval.
        """
        rows = []
        for name, selections in SELECTED.items():
            for change, side, selection in zip(
                ("repairs", "breaks"), (REPAIRING, BREAKING), selections, strict=True
            ):
                (_, repair) = self.scopes(selection).values()
                share = repair.token_ratio(
                    repair.first_erases(side), np.ones(len(repair.prompt)), self.draws()
                )
                few = [np.nanmedian(of(side)) for of in (repair.few_of_mlps, repair.few_of_total)]
                rows.append(
                    (self.model, name, change, len(repair.prompt), *few, share.value, *share.interval())
                )
        columns = ["tokens", "few of MLPs", "few of total", "erases", "low", "high"]
        return pd.DataFrame(rows, columns=["model", "tokens by", "change", *columns])

    def frequencies(self, size: int = 10) -> pd.DataFrame:
        """How often the chosen head's most frequent neurons are among the ``size`` that repair most.

        ``first`` is the share of tokens that have the most frequent one, ``ten`` the part of all ``size``
        places that the ten most frequent take, ``ever`` the share of neurons that take any; the same for the
        neurons with the largest clean direct effects, and for random ones.
        """
        rows = []
        for name, (selection, _) in SELECTED.items():
            repair, _ = self.scopes(selection).values()
            sets = {kind: repair.sets(kind) for kind in ("repairers", "strongest")}
            found = {kind: of.frequencies(size) for kind, of in sets.items()}
            found["random"] = sets["repairers"].random_frequencies(size)
            for kind, often in found.items():
                places = often[:10].sum() / often.sum()
                rows.append((self.model, name, kind, often[0], places, (often > 0).mean()))
        return pd.DataFrame(rows, columns=["model", "tokens by", "neurons", "first", "ten", "ever"])

    def overlaps(self) -> pd.DataFrame:
        """Jaccard overlap of each later MLP's most repairing neurons between tokens of different prompts.

        Between two tokens of the chosen head, two of the same head of its layer (whichever), and one of a
        head and one of the next head of the layer, with 95% intervals over prompts; the same of the neurons
        with the largest absolute clean direct effects (``strongest``); ``chance`` is that of two random sets.
        """
        weights, n = self.draws(), len(self.text)
        layer, head = self.chosen
        found = self.repairs[DIRECT_EFFECT]
        rows = []
        for mlp in self.later_mlps:
            by_tokens: dict[str, list[float]] = {}
            for kind in ("repairers", "strongest"):
                heads = [of[mlp].sets(kind) for at, of in found.items() if at[0] == layer]
                own = found[self.chosen][mlp].sets(kind)
                pairs: dict[str, Any] = {
                    f"L{layer}H{head}": pair_overlaps(own, own, n),
                    f"one head of L{layer}": sum(pair_overlaps(one, one, n) for one in heads),
                    f"two heads of L{layer}": sum(
                        pair_overlaps(one, after, n)
                        for one, after in zip(heads, heads[1:] + heads[:1], strict=True)
                    ),
                }
                for name, of in pairs.items():
                    overlap = mean_overlap(of, weights)
                    by_tokens.setdefault(name, []).extend([float(overlap.value), *overlap.interval()])
            chance = chance_overlap(own.n_neurons, own.neurons.shape[1])
            rows += [(self.model, mlp, name, *values, chance) for name, values in by_tokens.items()]
        kinds = [f"{kind}{end}" for kind in ("overlap", "strongest") for end in ("", " low", " high")]
        return pd.DataFrame(rows, columns=["model", "MLP", "tokens of", *kinds, "chance"])

    def top_neurons(self, n: int = 4, n_tokens: int = 4) -> pd.DataFrame:
        """The chosen head's ``n`` strongest erasers and ``n`` strongest repairers in all later MLPs.

        Direct effects and changes are means over the tokens, in logits. ``erases`` counts the tokens on which
        the neuron is one of its MLP's ``erasers``; the most frequent of them are shown.
        """
        found, totals = self.repairs[DIRECT_EFFECT][self.chosen], self.totals[self.chosen]
        places = [(mlp, neuron) for mlp in self.later_mlps for neuron in range(found[mlp].d_mlp)]
        clean, change = (
            np.concatenate([getattr(totals[mlp], name) / len(found[mlp].prompt) for mlp in self.later_mlps])
            for name in ("clean_by_neuron", "change_by_neuron")
        )
        rows = []
        for kind, order in (
            ("erasers", np.argsort(clean, kind="stable")),
            ("repairers", np.argsort(-change, kind="stable")),
        ):
            for at in order[:n].tolist():
                mlp, neuron = places[at]
                repair = found[mlp]
                erased = (repair.erasers == neuron).any(1)
                counts = Counter(self.next_token(repair, token) for token in np.flatnonzero(erased).tolist())
                shown = ", ".join(f"{text!r} ×{count}" for text, count in counts.most_common(n_tokens))
                rows.append(
                    {
                        "model": self.model,
                        "among": f"top {kind}",
                        "MLP": mlp,
                        "neuron": neuron,
                        "clean direct effect": clean[at],
                        "change": change[at],
                        "erases": f"{erased.sum()} of {len(erased)}",
                        "tokens erased most often": shown,
                    }
                )
        return pd.DataFrame(rows)

    def statistics(self, selected: str = "largest direct effect") -> Statistics:
        """Means over the strongest heads of later layers, last MLP, on tokens of one of ``SELECTED``."""
        weights = self.draws()
        selection, mirror = SELECTED[selected]
        of_heads = [
            repair_statistics(self.repairs[selection][head][mlp], self.repairs[mirror][head][mlp], weights)
            for head in self.strongest
            for mlp in (max(self.totals[head]),)
        ]
        names = of_heads[0] if of_heads else ()
        return {name: Estimate.stack([found[name] for found in of_heads]).mean() for name in names}

    def draws(self) -> Float[np.ndarray, "draw prompt"]:
        """How often each of the prompts is drawn."""
        return draws(len(self.text))

    def next_token(self, repair: NeuronRepair, token: int) -> str:
        """The text of what is predicted at one of the tokens of ``repair``."""
        return self.text[int(repair.prompt[token])][int(repair.position[token]) + 1]


def over_models(
    models: Iterable[ModelNeurons], table: Callable[[ModelNeurons], pd.DataFrame]
) -> pd.DataFrame:
    """One of the tables of :class:`ModelNeurons`, of several models one under the other."""
    return pd.concat([table(model) for model in models], ignore_index=True)


def by_selection(models: Mapping[str, ModelNeurons]) -> dict[str, dict[str, Statistics]]:
    """Statistics of each model by how its tokens are selected; none of a model without later heads."""
    return {selected: {name: of.statistics(selected) for name, of in models.items()} for selected in SELECTED}


def claimed(found: Mapping[str, Mapping[str, Statistics]]) -> dict[str, Statistics]:
    """What the claims of notebook 04 are about, by model, out of :func:`by_selection`.

    On the tokens that the paper selects: those of largest direct effect, and of largest MLP repair where it
    looks at the neuron that repairs most.
    """
    by_effect, by_repair = found.values()
    return {
        model: {
            name: (by_repair[model] if name in (FIRST, FIRST_OF_EITHER) else statistics)[name]
            for name in statistics
        }
        for model, statistics in by_effect.items()
    }


def statistics_table(found: Mapping[str, Mapping[str, Statistics]]) -> pd.DataFrame:
    """Values out of :func:`by_selection`: a row for each statistic and selection, a column for each model."""
    models = {
        name: {selected: of_models[name] for selected, of_models in found.items()}
        for name, statistics in next(iter(found.values())).items()
        if statistics
    }
    names = dict.fromkeys(name for of in models.values() for statistics in of.values() for name in statistics)
    rows = [
        (name, selected, *(float(of[selected][name].value) for of in models.values()))
        for name in names
        for selected in found
    ]
    return pd.DataFrame(rows, columns=["statistic", "tokens by", *models])
