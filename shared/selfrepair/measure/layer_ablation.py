"""What each layer does for the likeliest token, and what later ones do without it.

Everything is read at the last position of a prompt, for the token ``t*`` that the clean model finds most
likely there, in centred logits. A *component* is the attention or the MLP of a layer, biases of its output
projection included; components are numbered in order of depth, attention ``2 l`` and MLP ``2 l + 1`` of layer
``l``. With ``u`` the direction of ``t*`` (:mod:`selfrepair.engine.direct_effect`) and σ the final norm's
clean scale:

* ``effect`` of a component that writes ``c``: ``u · c / σ``, the *unembedding-based* effect. It is what a
  head's ``direct_effect`` is (:mod:`selfrepair.measure.heads`), of a whole layer and its biases.
* Ablating it puts ``c'`` in place of ``c`` and runs everything above again.
  ``direct_effect = u · (c − c') / σ``, against the donor: what is lost if nothing reacts. Of a head that is
  ``direct_effect − ablated_direct_effect``.
* ``total_effect`` = clean minus ablated logit, the *ablation-based* effect: positive if the component helped.
  Of a head that is ``−logit_change``.
* ``change`` of each component downstream: its effect in the ablated run (read with ``u`` and the clean σ)
  minus clean. ``compensation`` is their sum: positive where it gives back.
* ``norm_term`` = ablated logit minus the ablated residual stream read with the clean σ: what the final norm
  gives back.

``total_effect = direct_effect − compensation − norm_term`` exactly, so that a head's self-repair,
``logit_change − (ablated_direct_effect − direct_effect)``, is ``compensation + norm_term`` of a layer.
(McGrath et al. 2023, §2.3 to §2.5 and §4, with the direct effect against the donor and the final norm taken
apart as in Rushing & Nanda 2024.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from selfrepair.engine.ablations import Replacement, find_ablation
from selfrepair.engine.direct_effect import FinalNorm, token_directions
from selfrepair.engine.forward import Blocks, CleanRun, Replay, run_clean, unembed
from selfrepair.engine.hooks import watching
from selfrepair.engine.identity_check import check_identity
from selfrepair.engine.one_position import CleanKeys, OnePosition
from selfrepair.engine.sites import COMPONENTS
from selfrepair.measure.facts import PromptGroup, prompt_groups
from selfrepair.measure.measurement import Inputs, Settings
from selfrepair.measure.unseen_tokens import learnt_from
from selfrepair.text.facts import draw_donors

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Most donors that a prompt has, by the positions at which a component's output is replaced. At the last
#: alone, 15, as McGrath et al. 2023 (§2.4) do it; at all of them every donor costs a pass over the prompt.
N_DONORS = {"last": 15, "all": 4}
#: Tokens in one pass over the blocks above: more only spill out of a CPU's caches.
TOKENS_AT_ONCE = 1024


def ablate_on_facts(
    model: Model,
    facts: xr.Dataset,
    settings: Settings,
    inputs: Inputs,
    components: Int[np.ndarray, " ablated"] | None = None,
) -> xr.Dataset:
    """What :func:`ablate_layers` gives on a data set of ``facts``; of ``inputs``, what the ablation needs.

    Beside it ``answered [prompt]``: whether the most likely token is the answer's first.

    Raises:
        UserError: unknown ablation, or as there.
    """
    ablation, groups = find_ablation(str(settings["ablation"])), prompt_groups(facts)
    answers = facts["answer"].values
    batches = [torch.from_numpy(group.tokens).to(model.device) for group in groups]
    replacement = ablation.prepare(model, learnt_from(model, settings, inputs, batches), COMPONENTS)
    positions, seed = str(settings["layer_positions"]), int(settings["seed"])
    measured = ablate_layers(model, groups, answers, replacement, positions, seed, components)
    return measured.assign(answered=("prompt", measured["token"].values == answers))


def ablate_layers(
    model: Model,
    groups: Sequence[PromptGroup],
    answers: Int[np.ndarray, " prompt"],
    replacement: Replacement,
    positions: str,
    seed: int = 0,
    components: Int[np.ndarray, " ablated"] | None = None,
) -> xr.Dataset:
    """Ablates ``components`` (all by default) in turn, on prompts numbered from 0 in ``groups``.

    ``positions`` are those at which outputs are replaced: ``last``, or ``all`` (``N_DONORS`` by name). Donors
    are other prompts, with other ``answers`` where there are any: of any group, each at its last position, or
    of the same group at the same positions. What no donor gives takes the place of every prompt's output
    alike. All quantities are as defined above, averaged over donors. Variables (logits):
    ``effect [prompt, observed]``; ``direct_effect``, ``total_effect``, ``compensation``, ``norm_term``
    ``[ablated, prompt]``, each with its standard deviation between donors ``…_spread`` (NaN with fewer than
    two); ``change [ablated, prompt, observed]``; ``clean_logit`` and ``constant`` (what no
    component changes) ``[prompt]``. Beside them ``n_donors`` and ``token`` ``[prompt]`` and
    ``downstream [ablated, observed]``.

    Raises:
        UserError: a model for which effects do not sum to the logit.
    """
    chosen = np.arange(2 * model.n_layers) if components is None else components
    batches = [torch.from_numpy(group.tokens).to(model.device) for group in groups]
    check_identity(model, batches[0][:2])
    make_ready = _at_last_position if positions == "last" else _everywhere
    parts = [
        _ablate_group(model, ready, replacement, chosen).assign_coords(prompt=group.prompts)
        for group, ready in zip(
            groups, make_ready(model, groups, batches, answers, replacement, seed), strict=True
        )
    ]
    measured = xr.concat(parts, "prompt").sortby("prompt").assign_coords(ablated=chosen)
    below = downstream(model.n_layers, model.parallel)[chosen]
    return measured.assign(downstream=(("ablated", "observed"), below))


def downstream(n_layers: int, parallel: bool) -> Bool[np.ndarray, "ablated observed"]:
    """Which components lie downstream of which: those above; in a sequential block, its MLP too."""
    layer, is_mlp = np.divmod(np.arange(2 * n_layers), 2)
    above = layer[None] > layer[:, None]
    same_block = (layer[None] == layer[:, None]) & (is_mlp[None] > is_mlp[:, None])
    return above if parallel else above | same_block


@dataclass(frozen=True)
class CleanLayers:
    """A clean pass over prompts of one length, and how to read effects on their likeliest token."""

    run: CleanRun
    direction: Float[Tensor, "prompt d_model"]
    constant: Float[Tensor, " prompt"]
    sigma: Float[Tensor, " prompt"]
    token: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, model: Model, tokens: Int[Tensor, "prompt position"]) -> CleanLayers:
        return cls._of(model, run_clean(model, tokens, mlps=True))

    @classmethod
    def at_last_position(
        cls, model: Model, tokens: Int[Tensor, "prompt position"]
    ) -> tuple[CleanLayers, CleanKeys]:
        """The same with what the pass leaves at the last position alone, and its keys and values."""
        cache = DynamicCache()
        run = run_clean(model, tokens, mlps=True, last_only=True, cache=cache)
        return cls._of(model, run), CleanKeys.of(model, tokens, cache)

    @classmethod
    @torch.no_grad()
    def _of(cls, model: Model, run: CleanRun) -> CleanLayers:
        last = run.final_residual[:, -1]
        token = unembed(model, last).argmax(-1)
        direction, constant = token_directions(model, torch.stack([token, token], dim=1))
        return cls(run, direction[:, 0], constant[:, 0], FinalNorm.of(model.final_norm).sigma(last), token)

    def read(
        self, written: Float[Tensor, "row d_model"], prompt: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """Effect (logits) on its prompt's token of what each row writes at the last position."""
        return (
            torch.linalg.vecdot(written.to(self.direction.dtype), self.direction[prompt]) / self.sigma[prompt]
        )

    def logit(
        self, model: Model, final: Float[Tensor, "row d_model"], prompt: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """Centred logit of its prompt's token that each row's residual gives, by its own scale."""
        sigma = FinalNorm.of(model.final_norm).sigma(final)
        along = torch.linalg.vecdot(final.to(self.direction.dtype), self.direction[prompt])
        return along / sigma + self.constant[prompt]


@dataclass(frozen=True)
class Ready:
    """Prompts of one length, ready to be run again with a component's output replaced.

    ``clean`` and ``sources`` hold the positions at which outputs are replaced: ``sources``, by component,
    what may take their place. ``pairs`` are of a prompt (its place in ``clean``) and its donor (in
    ``sources``). ``replay`` runs blocks for rows that belong to some prompts, ``at_once`` of them.
    """

    clean: CleanLayers
    sources: list[Float[Tensor, "source position d_model"]]
    pairs: Int[Tensor, "pair 2"]
    replay: Callable[[Int[Tensor, " row"]], Blocks]
    at_once: int


def _whichever_rows(replay: Replay, prompts: Int[Tensor, " row"]) -> Replay:
    return replay


def _everywhere(
    model: Model,
    groups: Sequence[PromptGroup],
    batches: Sequence[Int[Tensor, "_ _"]],
    answers: Int[np.ndarray, " prompt"],
    replacement: Replacement,
    seed: int,
) -> Iterator[Ready]:
    """Group by group, for outputs replaced at all positions."""
    for number, (group, tokens) in enumerate(zip(groups, batches, strict=True)):
        clean, replay = CleanLayers.of(model, tokens), Replay(model, tokens.shape[1])
        pairs = _pairs(answers[group.prompts], replacement, N_DONORS["all"], seed + number)
        yield Ready(
            clean,
            clean.run.outputs,
            torch.from_numpy(pairs).to(model.device),
            partial(_whichever_rows, replay),
            max(1, TOKENS_AT_ONCE // tokens.shape[1]),
        )


def _at_last_position(
    model: Model,
    groups: Sequence[PromptGroup],
    batches: Sequence[Int[Tensor, "_ _"]],
    answers: Int[np.ndarray, " prompt"],
    replacement: Replacement,
    seed: int,
) -> Iterator[Ready]:
    """Group by group, for outputs replaced at the last position; donors are of any group."""
    clean = [CleanLayers.at_last_position(model, tokens) for tokens in batches]
    by_number = torch.from_numpy(np.argsort(np.concatenate([group.prompts for group in groups])))
    sources = [
        torch.cat(of_groups)[by_number.to(model.device)]
        for of_groups in zip(*(of_group.run.outputs for of_group, _ in clean), strict=True)
    ]
    pairs = _pairs(answers, replacement, N_DONORS["last"], seed)
    for group, (here, keys) in zip(groups, clean, strict=True):
        own = pairs[np.isin(pairs[:, 0], group.prompts)]
        own = np.stack([np.searchsorted(group.prompts, own[:, 0]), own[:, 1]], axis=1)
        at = OnePosition(keys, keys.tokens.shape[1] - 1)
        yield Ready(here, sources, torch.from_numpy(own).to(model.device), at.rows_of, at.rows_at_once())


def _pairs(
    answers: Int[np.ndarray, " prompt"], replacement: Replacement, n_donors: int, seed: int
) -> Int[np.ndarray, "pair 2"]:
    """Each prompt with each of its donors; with itself where every donor would give the same."""
    if replacement.has_donors:
        return draw_donors(answers, n_donors, seed)
    return np.arange(len(answers))[:, None].repeat(2, axis=1)


@torch.no_grad()
def _ablate_group(
    model: Model, ready: Ready, replacement: Replacement, components: Int[np.ndarray, " ablated"]
) -> xr.Dataset:
    """The components' ablations on prompts of one length."""
    clean, pairs, outputs = ready.clean, ready.pairs, ready.clean.run.outputs
    every = torch.arange(len(clean.token), device=pairs.device)
    effect = torch.stack([clean.read(output[:, -1], every) for output in outputs], dim=1)
    logit = clean.logit(model, clean.run.final_residual[:, -1], every)
    above = torch.from_numpy(downstream(model.n_layers, model.parallel)).to(pairs.device)
    by_component: dict[str, list[Tensor]] = {}
    for component in components.tolist():
        rows: dict[str, list[Tensor]] = {}
        for prompt, donor in (chunk.T for chunk in pairs.split(ready.at_once)):
            new = replacement(component, ready.sources[component], donor)
            final, seen = _run_above(model, ready.replay(prompt), clean, component, new, prompt)
            ablated = clean.logit(model, final, prompt)
            change = torch.where(above[component], seen - effect[prompt], 0)
            found = {
                "direct_effect": clean.read((outputs[component][prompt] - new)[:, -1], prompt),
                "total_effect": logit[prompt] - ablated,
                "norm_term": ablated - clean.read(final, prompt) - clean.constant[prompt],
                "compensation": change.sum(-1),
                "change": change,
            }
            for name, values in found.items():
                rows.setdefault(name, []).append(values)
        for name, parts in rows.items():
            mean, spread = _over_donors(torch.cat(parts), pairs[:, 0], len(every))
            by_component.setdefault(name, []).append(mean)
            if mean.ndim == 1:
                by_component.setdefault(f"{name}_spread", []).append(spread)
    of_prompts = {"clean_logit": logit, "constant": clean.constant, "token": clean.token}
    of_prompts["n_donors"] = torch.bincount(pairs[:, 0], minlength=len(every))
    dims = ("ablated", "prompt", "observed")
    variables = {
        name: (dims[: 1 + values[0].ndim], torch.stack(values)) for name, values in by_component.items()
    }
    variables |= {"effect": (("prompt", "observed"), effect)}
    variables |= {name: (("prompt",), values) for name, values in of_prompts.items()}
    return xr.Dataset({name: (where, values.cpu().numpy()) for name, (where, values) in variables.items()})


def _run_above(
    model: Model,
    replay: Blocks,
    clean: CleanLayers,
    component: int,
    new: Float[Tensor, "row position d_model"],
    prompt: Int[Tensor, " row"],
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row component"]]:
    """Last final residual with ``new`` for the component's output, and effects of what ran above."""
    layer, is_mlp = divmod(component, 2)
    residuals = [*clean.run.residuals, clean.run.final_residual]
    seen = torch.zeros(len(prompt), 2 * model.n_layers, dtype=clean.direction.dtype, device=prompt.device)

    def see(index: int, _: Tensor, output: Tensor) -> None:
        last = output.view_as(new)[:, -1]  # OPT's MLP runs without a position axis
        seen[:, index] = clean.read(last, prompt)

    by_layer = zip(model.output_projections, model.mlp_output_projections, strict=True)
    with watching([projection for pair in by_layer for projection in pair], see):
        if is_mlp or model.parallel:
            residual = residuals[layer + 1][prompt] + (new - clean.run.outputs[component][prompt])
        else:
            residual = replay.block_given_attention(layer, residuals[layer][prompt], new)
        final = replay.from_block(layer + 1, residual)
    return final[:, -1], seen


def _over_donors(
    values: Float[Tensor, "row ..."], prompt: Int[Tensor, " row"], n_prompts: int
) -> tuple[Float[Tensor, "prompt ..."], Float[Tensor, "prompt ..."]]:
    """Mean and standard deviation (NaN if there is one) of each prompt's rows."""
    empty = values.new_zeros(n_prompts, *values.shape[1:])
    count = torch.bincount(prompt, minlength=n_prompts).to(values.dtype).view(-1, *[1] * (values.ndim - 1))
    mean = empty.index_add(0, prompt, values) / count
    squares = empty.index_add(0, prompt, (values - mean[prompt]).square())
    return mean, torch.where(count > 1, (squares / (count - 1)).sqrt(), torch.nan)
