"""The Hydra effect: what each layer does for the likeliest token, and what later ones do without it.

Everything is at the last position of a prompt, for the token ``t*`` that the clean model finds most likely
there, in centred logits. A *component* is the attention or the MLP of a layer, biases of its output
projection included; components are numbered in order of depth, attention ``2 l`` and MLP ``2 l + 1`` of layer
``l``. With ``u`` the direction of ``t*`` (:mod:`selfrepair.engine.direct_effect`) and σ the final norm's
clean scale:

* ``effect`` of a component that writes ``c``: ``u · c / σ``, the *unembedding-based* effect.
* Ablating it puts ``c'`` in place of ``c`` at all positions and runs everything above again.
  ``direct_effect = u · (c − c') / σ``: what is lost if nothing reacts.
* ``total_effect`` = clean minus ablated logit, the *ablation-based* effect: positive if the component helped.
* ``change`` of each component downstream: its effect in the ablated run (read with ``u`` and the clean σ)
  minus clean. ``compensation`` is their sum: positive where it gives back.
* ``norm_term`` = ablated logit minus the ablated residual stream read with the clean σ: what the final norm
  gives back.

``total_effect = direct_effect − compensation − norm_term`` exactly. (McGrath et al. 2023, §2, with the direct
effect against the donor and the final norm taken apart as in Rushing & Nanda 2024.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfrepair.engine.ablations import Replacement, find_ablation
from selfrepair.engine.direct_effect import FinalNorm, token_directions
from selfrepair.engine.forward import CleanRun, Replay, float32_residual, run_clean
from selfrepair.engine.hooks import watching
from selfrepair.engine.identity_check import check_identity
from selfrepair.engine.sites import COMPONENTS
from selfrepair.measure.facts import PromptGroup, prompt_groups
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.text.facts import draw_donors, training_config

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Most donors that a prompt has.
N_DONORS = 4
#: Tokens in one pass over the blocks above: more only spill out of a CPU's caches.
TOKENS_AT_ONCE = 1024
#: One shard ablates the attention layers, the other the MLPs: every model has both, and they take as long.
ATTENTION, MLP = 0, 1


class Layers(Measurement):
    """What :func:`ablate_layers` gives; attribute ``trained_without_dropout``: true where that is known."""

    name: ClassVar[str] = "layers"
    uses: ClassVar[tuple[str, ...]] = ("model_name", "dtype", "ablation", "seed")
    along: ClassVar[str] = "ablated"

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return ("facts",)

    def fingerprint(self, settings: Settings) -> dict[str, object]:
        config = training_config(str(settings["model_name"]))
        return {"trained_without_dropout": config is not None and config["dropout"] == 0}

    def shards(self, settings: Settings) -> Sequence[int]:
        return [ATTENTION, MLP]

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        components = np.arange(shard, 2 * model.n_layers, 2)
        return ablate_layers(
            model, inputs["facts"], str(settings["ablation"]), int(settings["seed"]), components
        )


MEASUREMENT = Layers()


def ablate_layers(
    model: Model,
    facts: xr.Dataset,
    ablation: str,
    seed: int = 0,
    components: Int[np.ndarray, " ablated"] | None = None,
) -> xr.Dataset:
    """Ablates ``components`` (all by default) in turn, on every prompt of a data set as ``facts`` gives it.

    ``resample`` puts in the component's output on up to four other prompts of the same length; constants take
    the place of every prompt's output alike. All quantities are as defined above, averaged over donors.
    Variables (logits): ``effect [prompt, observed]``; ``direct_effect``, ``total_effect``, ``compensation``,
    ``norm_term`` ``[ablated, prompt]``, each with its standard deviation between donors ``…_spread`` (NaN
    with fewer than two); ``change [ablated, prompt, observed]``; ``clean_logit`` and ``constant`` (what no
    component changes) ``[prompt]``. Beside them ``n_donors`` and ``token`` ``[prompt]``, ``answered``
    (whether the token is the answer's first) and ``downstream [ablated, observed]``.

    Raises:
        UserError: unknown ablation, or a model for which effects do not sum to the logit.
    """
    chosen = np.arange(2 * model.n_layers) if components is None else components
    kind = find_ablation(ablation)
    groups = prompt_groups(facts)
    batches = [torch.from_numpy(group.tokens).to(model.device) for group in groups]
    check_identity(model, batches[0][:2])
    replacement = kind.prepare(model, batches, COMPONENTS)
    parts = []
    for number, (group, tokens) in enumerate(zip(groups, batches, strict=True)):
        pairs = torch.from_numpy(_pairs(group, replacement, seed + number)).to(model.device)
        part = _ablate_group(model, CleanLayers.of(model, tokens), pairs, replacement, chosen)
        parts.append(part.assign_coords(prompt=group.prompts))
    measured = xr.concat(parts, "prompt").sortby("prompt").assign_coords(ablated=chosen)
    answered = measured["token"].values == facts["answer"].values
    below = downstream(model.n_layers, model.parallel)[chosen]
    return measured.assign(answered=("prompt", answered), downstream=(("ablated", "observed"), below))


def downstream(n_layers: int, parallel: bool) -> Bool[np.ndarray, "ablated observed"]:
    """Which components lie downstream of which: those above; in a sequential block, its MLP too."""
    layer, is_mlp = np.divmod(np.arange(2 * n_layers), 2)
    above = layer[None] > layer[:, None]
    same_block = (layer[None] == layer[:, None]) & (is_mlp[None] > is_mlp[:, None])
    return above if parallel else above | same_block


def _pairs(group: PromptGroup, replacement: Replacement, seed: int) -> Int[np.ndarray, "pair 2"]:
    """Each prompt of a group with each of its donors; with itself where every donor would give the same."""
    if replacement.has_donors:
        return draw_donors(group.answers, N_DONORS, seed)
    return np.arange(len(group.prompts))[:, None].repeat(2, axis=1)


@dataclass(frozen=True)
class CleanLayers:
    """A clean pass over prompts of one length, and how to read effects on their likeliest token."""

    run: CleanRun
    direction: Float[Tensor, "prompt d_model"]
    constant: Float[Tensor, " prompt"]
    sigma: Float[Tensor, " prompt"]
    token: Int[Tensor, " prompt"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, tokens: Int[Tensor, "prompt position"]) -> CleanLayers:
        run = run_clean(model, tokens, mlps=True)
        last = run.final_residual[:, -1]
        with float32_residual(model):
            token = model.hf.get_output_embeddings()(model.final_norm(last)).argmax(-1)
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


@torch.no_grad()
def _ablate_group(
    model: Model,
    clean: CleanLayers,
    pairs: Int[Tensor, "pair 2"],
    replacement: Replacement,
    components: Int[np.ndarray, " ablated"],
) -> xr.Dataset:
    """The components' ablations on prompts of one length; ``pairs`` are ``(prompt, donor)``."""
    outputs = clean.run.outputs
    n_prompts, length = outputs[0].shape[:2]
    every = torch.arange(n_prompts, device=pairs.device)
    effect = torch.stack([clean.read(output[:, -1], every) for output in outputs], dim=1)
    logit = clean.logit(model, clean.run.final_residual[:, -1], every)
    above = torch.from_numpy(downstream(model.n_layers, model.parallel)).to(pairs.device)
    replay = Replay(model, length)
    by_component: dict[str, list[Tensor]] = {}
    for component in components.tolist():
        rows: dict[str, list[Tensor]] = {}
        for prompt, donor in (chunk.T for chunk in pairs.split(max(1, TOKENS_AT_ONCE // length))):
            new = replacement(component, outputs[component], donor)
            final, seen = _run_above(model, replay, clean, component, new, prompt)
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
            mean, spread = _over_donors(torch.cat(parts), pairs[:, 0], n_prompts)
            by_component.setdefault(name, []).append(mean)
            if mean.ndim == 1:
                by_component.setdefault(f"{name}_spread", []).append(spread)
    of_prompts = {"clean_logit": logit, "constant": clean.constant, "token": clean.token}
    of_prompts["n_donors"] = torch.bincount(pairs[:, 0], minlength=n_prompts)
    dims = ("ablated", "prompt", "observed")
    variables = {
        name: (dims[: 1 + values[0].ndim], torch.stack(values)) for name, values in by_component.items()
    }
    variables |= {"effect": (("prompt", "observed"), effect)}
    variables |= {name: (("prompt",), values) for name, values in of_prompts.items()}
    return xr.Dataset({name: (where, values.cpu().numpy()) for name, (where, values) in variables.items()})


def _run_above(
    model: Model,
    replay: Replay,
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
        for above in range(layer + 1, model.n_layers):
            residual = replay.block(above, residual)
    return residual[:, -1], seen


def _over_donors(
    values: Float[Tensor, "row ..."], prompt: Int[Tensor, " row"], n_prompts: int
) -> tuple[Float[Tensor, "prompt ..."], Float[Tensor, "prompt ..."]]:
    """Mean and standard deviation (NaN if there is one) of each prompt's rows."""
    empty = values.new_zeros(n_prompts, *values.shape[1:])
    count = torch.bincount(prompt, minlength=n_prompts).to(values.dtype).view(-1, *[1] * (values.ndim - 1))
    mean = empty.index_add(0, prompt, values) / count
    squares = empty.index_add(0, prompt, (values - mean[prompt]).square())
    return mean, torch.where(count > 1, (squares / (count - 1)).sqrt(), torch.nan)
