"""Tables of notebook 04: which neurons of later MLPs repair a head, how few, and whether by erasing less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from selfrepair.analysis.claims import Statistics
from selfrepair.analysis.estimates import Estimate, draws
from selfrepair.analysis.neuron_repair import (
    THRESHOLDS,
    Head,
    NeuronRepair,
    chance_overlap,
    mean_overlap,
    pair_overlaps,
    repair_statistics,
    repairs_by_head,
)


@dataclass(frozen=True)
class ModelNeurons:
    """One model's repairing neurons: of a chosen head, all heads of its layer, the strongest of later layers.

    ``strongest`` are the heads with the largest mean direct effect on their top tokens, one for each layer of
    the later half that has an MLP after its heads. ``text`` holds the prompts' tokens, decoded.
    """

    model: str
    chosen: Head
    strongest: list[Head]
    by_head: dict[Head, dict[int, NeuronRepair]]
    text: list[list[str]]

    @classmethod
    def of(cls, measured: xr.Dataset, tokens: xr.Dataset, decode: Callable[[list[int]], str]) -> ModelNeurons:
        """Out of the measurements ``neurons`` and ``tokens``; ``decode`` is the tokenizer's."""
        strongest = [(layer, head) for layer, head in measured.attrs["strongest_heads"]]
        layer, head = measured.attrs["chosen_head"]
        text = [[decode([token]) for token in prompt] for prompt in tokens["token"].values.tolist()]
        return cls(measured.attrs["model"], (layer, head), strongest, repairs_by_head(measured), text)

    @property
    def later_mlps(self) -> list[int]:
        """The MLPs after the chosen head."""
        return sorted(self.by_head[self.chosen])

    def scopes(self, mlp: int | None = None) -> dict[str, NeuronRepair]:
        """One later MLP (the last) on the chosen head's tokens, and on those of all heads of its layer."""
        mlp = self.later_mlps[-1] if mlp is None else mlp
        layer, head = self.chosen
        of_layer = [found[mlp] for at, found in self.by_head.items() if at[0] == layer]
        return {
            f"L{layer}H{head}": self.by_head[self.chosen][mlp],
            f"all heads of L{layer}": NeuronRepair.joined(of_layer),
        }

    def single_neurons(self) -> pd.DataFrame:
        """Share of tokens on which the most repairing neuron of each later MLP alone repairs so much."""
        once = np.ones((1, len(self.text)))
        rows = []
        for mlp in self.later_mlps:
            for scope, repair in self.scopes(mlp).items():
                rows.append((self.model, scope, mlp, *repair.repaired_alone(once).value[:, 0]))
        return pd.DataFrame(rows, columns=["model", "heads", "MLP", *(f"≥ {t:.3g}" for t in THRESHOLDS)])

    def overlaps(self) -> pd.DataFrame:
        """Jaccard overlap of each later MLP's most repairing neurons between tokens of different prompts.

        Between two tokens of the chosen head, two of the same head of its layer (whichever), and one of a
        head and one of the next head of the layer, with 95 % intervals over prompts; ``chance`` is that of
        two random sets.
        """
        weights, n = self.draws(), len(self.text)
        layer, head = self.chosen
        rows = []
        for mlp in self.later_mlps:
            heads = [found[mlp] for at, found in self.by_head.items() if at[0] == layer]
            own = self.by_head[self.chosen][mlp]
            pairs = {
                f"L{layer}H{head}": pair_overlaps(own, own, n),
                f"one head of L{layer}": sum(pair_overlaps(one, one, n) for one in heads),
                f"two heads of L{layer}": sum(
                    pair_overlaps(one, after, n)
                    for one, after in zip(heads, heads[1:] + heads[:1], strict=True)
                ),
            }
            chance = chance_overlap(own.d_mlp, own.repairers.shape[1])
            for name, of in pairs.items():
                overlap = mean_overlap(of, weights)
                rows.append((self.model, mlp, name, float(overlap.value), *overlap.interval(), chance))
        return pd.DataFrame(rows, columns=["model", "MLP", "tokens of", "overlap", "low", "high", "chance"])

    def top_neurons(self, n: int = 4, n_tokens: int = 4) -> pd.DataFrame:
        """The chosen head's ``n`` strongest erasers and ``n`` strongest repairers in all later MLPs.

        Direct effects and changes are means over the tokens, in logits. ``erases`` counts the tokens on which
        the neuron is one of its MLP's ``erasers``; the most frequent of them are shown.
        """
        found = self.by_head[self.chosen]
        places = [(mlp, neuron) for mlp in self.later_mlps for neuron in range(found[mlp].d_mlp)]
        clean, change = (
            np.concatenate([getattr(found[mlp], name) / len(found[mlp].prompt) for mlp in self.later_mlps])
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
                counts = Counter(self._next_token(repair, token) for token in np.flatnonzero(erased).tolist())
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

    def examples(self, n: int = 4, n_neurons: int = 3, n_context: int = 8) -> pd.DataFrame:
        """The chosen head's ``n`` strongest tokens, of different prompts, and the last MLP's repairers."""
        (repair, _) = self.scopes().values()
        order = np.argsort(-repair.direct_effect, kind="stable")
        _, first = np.unique(repair.prompt[order], return_index=True)
        rows = []
        for token in order[np.sort(first)][:n].tolist():
            prompt, position = int(repair.prompt[token]), int(repair.position[token])
            context = "".join(self.text[prompt][max(0, position + 1 - n_context) : position + 1])
            repairers, changes = repair.repairers[token, :n_neurons], repair.largest[token]
            rows.append(
                {
                    "model": self.model,
                    "text": repr(context),
                    "next token": repr(self._next_token(repair, token)),
                    "direct effect": repair.direct_effect[token],
                    "change of the last MLP": repair.repair[token] + repair.harm[token],
                    "neurons (change)": ", ".join(
                        f"{neuron} ({change:+.2f})"
                        for neuron, change in zip(repairers, changes, strict=False)
                    ),
                }
            )
        return pd.DataFrame(rows)

    def statistics(self) -> Statistics:
        """What the claims of notebook 04 are about: means over the strongest heads of later layers, last MLP.

        The control of the share that erases is how much of the *negative* change is by neurons with a
        positive clean direct effect: if that is no less, the neurons merely do less of what they did,
        whatever it was.
        """
        weights = self.draws()
        of_heads = [
            repair_statistics(self.by_head[head][max(self.by_head[head])], weights) for head in self.strongest
        ]
        names = of_heads[0] if of_heads else ()
        return {name: Estimate.stack([found[name] for found in of_heads]).mean() for name in names}

    def draws(self) -> Float[np.ndarray, "draw prompt"]:
        """How often each of the prompts is drawn."""
        return draws(len(self.text))

    def _next_token(self, repair: NeuronRepair, token: int) -> str:
        return self.text[int(repair.prompt[token])][int(repair.position[token]) + 1]
