"""Single tokens of notebook 04, in their context: where a head matters most, and what repairs it there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from selfrepair.analysis.neuron_repair import DIRECT_EFFECT, REPAIRING, NeuronRepair
from selfrepair.analysis.neurons import ModelNeurons
from selfrepair.analysis.passages import Passage, around
from selfrepair.analysis.words import signed


def passages(neurons: ModelNeurons, sweep: xr.Dataset, n: int = 3) -> list[Passage]:
    """The chosen head's ``n`` strongest tokens, of different prompts, each with what stands around it.

    Values are what all MLPs together repair of the head's ablation, out of the measurement ``heads``. The
    heading has the direct effect, the change of all MLPs (which is the marked token's value), that of the
    last one, and of the neurons of it that repair most.
    """
    repair = neurons.repairs[DIRECT_EFFECT][neurons.chosen][neurons.later_mlps[-1]]
    layer, head = neurons.chosen
    mlps_repair = sweep["self_repair_mlps"][layer, head].values
    found = []
    for row in strongest_of_prompts(repair)[:n].tolist():
        prompt, position = int(repair.prompt[row]), int(repair.position[row])
        said = _said(repair, row, float(mlps_repair[prompt, position]))
        heading = f"{neurons.model} L{layer}H{head}, {neurons.next_token(repair, row)!r}: {said}"
        found.append(around(heading, neurons.text[prompt], mlps_repair[prompt], position))
    return found


def neurons_in_context(
    text: Sequence[str],
    position: int,
    clean: Float[np.ndarray, "position neuron"],
    change: Float[np.ndarray, "position neuron"],
) -> list[Passage]:
    """The neurons that erase and that repair most at one position of a prompt, on the tokens around it.

    ``clean`` are direct effects (logits) of an MLP's neurons, ``change`` what the ablation of a head adds.
    """
    said = repr(text[position + 1])
    does = {"erases": int(clean[position].argmin()), "repairs": int(change[position].argmax())}
    return [
        around(f"neuron {neuron}, which {verb} most at {said}: {name}", text, values[:, neuron], position)
        for verb, neuron in does.items()
        for name, values in {"clean direct effect": clean, "change": change}.items()
    ]


def strongest_of_prompts(repair: NeuronRepair) -> Int[np.ndarray, " prompt"]:
    """Of each prompt the row of ``repair`` with the largest direct effect; the largest of all first."""
    order = np.argsort(-repair.direct_effect, kind="stable")
    _, first = np.unique(repair.prompt[order], return_index=True)
    return order[np.sort(first)]


def _said(repair: NeuronRepair, row: int, all_mlps: float, n_neurons: int = 2) -> str:
    changes = zip(repair.repairers[row, :n_neurons], repair.largest[row, REPAIRING], strict=False)
    neurons = ", ".join(f"{neuron} ({signed(change)})" for neuron, change in changes)
    return (
        f"direct effect {signed(repair.direct_effect[row])}, all MLPs {signed(all_mlps)}, "
        f"last MLP {signed(repair.mlp_repair[row])}, neurons {neurons}"
    )
