"""The Hydra effect: what each layer contributes to the most likely token, and what later layers do once it is ablated.

Everything is at the last position of a prompt, for the token ``t*`` that the clean model finds most likely there, in
centred logits. A *component* is the attention or the MLP of a layer, biases of its output projection included;
components are numbered in order of depth, attention ``2 l`` and MLP ``2 l + 1`` of layer ``l``. With ``u`` the
direction of ``t*`` (:mod:`selfrepair.engine.direct_effect`) and σ the final norm's clean scale:

* ``effect`` of a component that writes ``c``: ``u · c / σ``, the *unembedding-based* effect.
* Ablating it puts ``c'`` in place of ``c`` at all positions and runs everything above again.
  ``direct_effect = u · (c − c') / σ``: what is lost if nothing reacts.
* ``total_effect`` = clean minus ablated logit, the *ablation-based* effect: positive if the component helped.
* ``change`` of each component downstream: its effect in the ablated run (read with ``u`` and the clean σ) minus clean.
  ``compensation`` is their sum: positive where it gives back.
* ``norm_term`` = ablated logit minus the ablated residual stream read with the clean σ: what the final norm gives back.

``total_effect = direct_effect − compensation − norm_term`` exactly. (McGrath et al. 2023, §2, with the direct effect
against the donor and the final norm taken apart as in Rushing & Nanda 2024.)
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from filelock import FileLock
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils import logging

from selfrepair import __version__
from selfrepair.store import datasets as results
from selfrepair.models.checkpoints import model_folder
from selfrepair.analysis.claims import Samples
from selfrepair.engine.direct_effect import FinalNorm, token_directions
from selfrepair.errors import UserError
from selfrepair.text.facts import AskedFact, FactPrompts, choose_prompts, draw_donors, training_config
from selfrepair.store.manifest import manifest_of, write_manifest
from selfrepair.models.loading import Model, load_model
from selfrepair.engine.ablations import ABLATIONS
from selfrepair.engine.forward import CleanRun, Replay, float32_residual, run_clean, watching
from selfrepair.statistics import bootstrap_weights
from selfrepair.measure.heads import check_identity

N_DONORS = 4
#: Prompts on which training checkpoints are compared.
N_OVER_TRAINING = 64
#: Tokens in one pass over the blocks above: more only spill out of a CPU's caches.
TOKENS_AT_ONCE = 1024
#: A downstream component is touched if it changes by more than this share of the direct effect.
COUPLED = 0.1
#: Logits that are no change: float32 passes stacked differently differ by as much.
ROUNDING = 1e-5
CODE = ("direct_effect.py", "facts.py", "hydra.py", "kernels.py", "models.py", "replay.py")
PARTS = ("attention", "MLP")
BY_COMPONENT = ("direct_effect", "total_effect", "norm_term", "compensation")


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class CleanLayers:
    """One clean pass over prompts of one length, and what it takes to read effects on their most likely token."""

    run: CleanRun
    outputs: list[Float[Tensor, "prompt position d_model"]]
    direction: Float[Tensor, "prompt d_model"]
    constant: Float[Tensor, " prompt"]
    sigma: Float[Tensor, " prompt"]
    token: Int[Tensor, " prompt"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, tokens: Int[Tensor, "prompt position"]) -> CleanLayers:
        mlps: list[Tensor] = []
        with watching(model.mlp_output_projections, lambda _, __, output: mlps.append(output)):
            run = run_clean(model, tokens)
        outputs = [output.view_as(run.final_residual) for pair in zip(run.attention_outputs, mlps, strict=True) for output in pair]
        last = run.final_residual[:, -1]
        with float32_residual(model):
            token = model.hf.get_output_embeddings()(model.final_norm(last)).argmax(-1)
        direction, constant = token_directions(model, torch.stack([token, token], dim=1))
        return cls(run, outputs, direction[:, 0], constant[:, 0], FinalNorm.of(model.final_norm).sigma(last), token)

    def read(self, written: Float[Tensor, "row d_model"], prompt: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Effect (logits) on its prompt's token of what each row writes at the last position."""
        return torch.linalg.vecdot(written.to(self.direction.dtype), self.direction[prompt]) / self.sigma[prompt]

    def logit(self, model: Model, final: Float[Tensor, "row d_model"], prompt: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Centred logit of its prompt's token that each row's last residual gives, with the row's own scale."""
        sigma = FinalNorm.of(model.final_norm).sigma(final)
        return torch.linalg.vecdot(final.to(self.direction.dtype), self.direction[prompt]) / sigma + self.constant[prompt]


def downstream(n_layers: int, parallel: bool) -> Bool[np.ndarray, "ablated observed"]:
    """Which components lie downstream of which: those of higher layers, and in a sequential block the MLP of its attention."""
    layer, is_mlp = np.divmod(np.arange(2 * n_layers), 2)
    above = layer[None] > layer[:, None]
    same_block = (layer[None] == layer[:, None]) & (is_mlp[None] > is_mlp[:, None])
    return above if parallel else above | same_block


def layer_effects(model: Model, prompts: FactPrompts, ablation: str, folder: Path, seed: int = 0) -> xr.Dataset:
    """:func:`ablate_layers`, from ``folder`` if it is there already.

    Raises:
        UserError: unknown ablation.
    """
    attributes = {
        "model": model.name,
        "weights_sha256": model.weights_hash(),
        "dtype": model.precision,
        "prompts_sha256": prompts.sha256,
        "ablation": ablation,
        "seed": seed,
        "version": __version__,
        "code": results.code_version(*CODE),
    }
    path = folder / f"{results.store_name(model.name, ablation, attributes)}.zarr"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        results.remove_unfinished(manifest_of(path))
        if not results.is_whole(path):
            started = time.monotonic()
            measured = ablate_layers(model, prompts, ablation, seed).assign_attrs(attributes)
            write_manifest(manifest_of(path), time.monotonic() - started, source=model.source, **measured.attrs)
            results.write_store([measured.assign_attrs(format=results.FORMAT)], path)
        return results.open_store(path)


def ablate_layers(model: Model, prompts: FactPrompts, ablation: str, seed: int = 0) -> xr.Dataset:
    """Ablates every component in turn, on every prompt; all quantities are as defined above, averaged over donors.

    ``resample`` puts in the component's output on up to four other prompts of the same length, ``mean`` its mean over
    all prompts and positions, ``zero`` nothing. Variables (logits): ``effect [observed, prompt]``; ``direct_effect``,
    ``total_effect``, ``compensation``, ``norm_term`` ``[ablated, prompt]``, each with its standard deviation between
    donors ``…_spread`` (NaN with fewer than two); ``change [ablated, observed, prompt]``; ``clean_logit`` and
    ``constant`` (what no component changes) ``[prompt]``. ``answered``: whether ``token`` is the answer's first.

    Raises:
        UserError: unknown ablation, or a model for which effects do not sum to the logit.
    """
    if ablation not in ABLATIONS:
        raise UserError(f"unknown ablation '{ablation}'; known are {', '.join(ABLATIONS)}")
    batches = [torch.tensor([prompts.tokens[i] for i in members], device=model.device) for members in prompts.groups]
    check_identity(model, batches[0][:2])
    means = _mean_outputs(model, batches) if ablation == "mean" else None
    groups = []
    for number, (members, tokens) in enumerate(zip(prompts.groups, batches, strict=True)):
        clean = CleanLayers.of(model, tokens)
        if ablation == "resample":
            pairs = draw_donors(prompts.answers[members], N_DONORS, seed + number)
        else:
            pairs = np.arange(len(members))[:, None].repeat(2, axis=1)
        groups.append(_ablate_group(model, clean, torch.from_numpy(pairs).to(model.device), ablation, means).assign_coords(prompt=members))
    measured = xr.concat(groups, "prompt").sortby("prompt")
    answered = measured["token"].values == prompts.answers
    return measured.assign(answered=("prompt", answered)).assign_attrs(model=model.name, parallel=model.parallel)


@torch.no_grad()
def _mean_outputs(model: Model, batches: Sequence[Int[Tensor, "_ _"]]) -> list[Float[Tensor, " d_model"]]:
    """Mean output of every component over all prompts and positions."""
    sums = [[output.double().sum((0, 1)) for output in CleanLayers.of(model, tokens).outputs] for tokens in batches]
    n = sum(tokens.numel() for tokens in batches)
    return [(sum(of_one) / n).to(model.dtype) for of_one in zip(*sums, strict=True)]


@torch.no_grad()
def _ablate_group(
    model: Model, clean: CleanLayers, pairs: Int[Tensor, "pair 2"], ablation: str, means: list[Float[Tensor, " d_model"]] | None
) -> xr.Dataset:
    """Every component's ablation on prompts of one length; ``pairs`` are of a prompt and the donor of its replacement."""
    n_prompts, length = clean.run.final_residual.shape[:2]
    replay = Replay(model, length)
    every = torch.arange(n_prompts, device=pairs.device)
    effect = torch.stack([clean.read(output[:, -1], every) for output in clean.outputs], dim=1)
    logit = clean.logit(model, clean.run.final_residual[:, -1], every)
    above = torch.from_numpy(downstream(model.n_layers, model.parallel)).to(pairs.device)
    means_of, spreads_of = [], []
    for component, output in enumerate(clean.outputs):
        rows = []
        for prompt, donor in (chunk.T for chunk in pairs.split(max(1, TOKENS_AT_ONCE // length))):
            if ablation == "resample":
                new = output[donor]
            else:
                new = torch.zeros_like(output[prompt]) if means is None else means[component].expand_as(output[prompt])
            final, seen = _run_above(model, replay, clean, component, new, prompt)
            change = torch.where(above[component], seen - effect[prompt], 0)
            ablated = clean.logit(model, final, prompt)
            direct_effect = clean.read((output[prompt] - new)[:, -1], prompt)
            norm_term = ablated - clean.read(final, prompt) - clean.constant[prompt]
            quantities = (direct_effect, logit[prompt] - ablated, norm_term, change.sum(-1))  # in the order of BY_COMPONENT
            rows.append(torch.cat([torch.stack(quantities, dim=1), change], dim=1))
        mean, spread = _over_donors(torch.cat(rows), pairs[:, 0], n_prompts)
        means_of.append(mean)
        spreads_of.append(spread)
    mean, spread = (torch.stack(parts).cpu().numpy() for parts in (means_of, spreads_of))
    variables = {name: (("ablated", "prompt"), mean[..., i]) for i, name in enumerate(BY_COMPONENT)}
    variables |= {f"{name}_spread": (("ablated", "prompt"), spread[..., i]) for i, name in enumerate(BY_COMPONENT)}
    variables["change"] = (("ablated", "prompt", "observed"), mean[..., len(BY_COMPONENT) :])
    variables["effect"] = (("prompt", "observed"), effect.cpu().numpy())
    variables |= {name: ("prompt", value.cpu().numpy()) for name, value in (("clean_logit", logit), ("constant", clean.constant))}
    variables["token"] = ("prompt", clean.token.cpu().numpy())
    variables["n_donors"] = ("prompt", torch.bincount(pairs[:, 0], minlength=n_prompts).cpu().numpy())
    return xr.Dataset(variables)


def _run_above(
    model: Model,
    replay: Replay,
    clean: CleanLayers,
    component: int,
    new: Float[Tensor, "row position d_model"],
    prompt: Int[Tensor, " row"],
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row component"]]:
    """Last position's final residual with ``new`` in place of the component's output, and the effects of the components that ran."""
    layer, is_mlp = divmod(component, 2)
    seen = torch.zeros(len(prompt), 2 * model.n_layers, dtype=clean.direction.dtype, device=prompt.device)

    def see(index: int, _: Tensor, output: Tensor) -> None:
        seen[:, index] = clean.read(output.view_as(new)[:, -1], prompt)  # OPT's MLP runs without a position axis

    projections = [p for pair in zip(model.output_projections, model.mlp_output_projections, strict=True) for p in pair]
    with watching(projections, see):
        if is_mlp or model.parallel:
            after = clean.run.residuals[layer + 1] if layer + 1 < model.n_layers else clean.run.final_residual
            residual = after[prompt] + (new - clean.outputs[component][prompt])
        else:
            residual = replay.block_given_attention(layer, clean.run.residuals[layer][prompt], new)
        for above in range(layer + 1, model.n_layers):
            residual = replay.block(above, residual)
    return residual[:, -1], seen


def _over_donors(
    values: Float[Tensor, "row quantity"], prompt: Int[Tensor, " row"], n_prompts: int
) -> tuple[Float[Tensor, "prompt quantity"], Float[Tensor, "prompt quantity"]]:
    """Mean and standard deviation (NaN if there is one) of each prompt's rows."""
    count = torch.bincount(prompt, minlength=n_prompts)[:, None].to(values.dtype)
    empty = values.new_zeros(n_prompts, values.shape[1])
    mean = empty.index_add(0, prompt, values) / count
    squares = empty.index_add(0, prompt, (values - mean[prompt]).square())
    return mean, torch.where(count > 1, (squares / (count - 1)).sqrt(), torch.nan)


# ---------------------------------------------------------------- over prompts, with intervals


@dataclass(frozen=True)
class LayerMeans:
    """Means over prompts (logits); last axis: the estimate, then bootstrap samples over prompts.

    ``absolute_change`` and ``absolute_direct_effect`` are means of absolute values, so that changes of either sign
    count; ``slope`` is that of compensation on direct effect over prompts (least squares, with intercept).
    """

    model: str
    n_prompts: int
    parallel: bool
    effect: Float[np.ndarray, "component sample"]
    direct_effect: Float[np.ndarray, "component sample"]
    total_effect: Float[np.ndarray, "component sample"]
    norm_term: Float[np.ndarray, "component sample"]
    compensation: Float[np.ndarray, "component sample"]
    slope: Float[np.ndarray, "component sample"]
    absolute_direct_effect: Float[np.ndarray, "component sample"]
    change: Float[np.ndarray, "component observed sample"]
    absolute_change: Float[np.ndarray, "component observed sample"]

    @classmethod
    def of(cls, effects: xr.Dataset, only: Bool[np.ndarray, " prompt"] | None = None, n_bootstrap: int = 1000, seed: int = 0) -> LayerMeans:
        """Of a data set as :func:`ablate_layers` gives it, or ``only`` of some of its prompts."""
        if only is not None:
            effects = effects.isel(prompt=np.flatnonzero(only))
        n = effects.sizes["prompt"]
        weights = np.concatenate([np.ones((1, n)), bootstrap_weights(n, n_bootstrap, seed)]) / n
        value = {name: effects[name].transpose(..., "prompt").values.astype(np.float64) for name in ("effect", "change", *BY_COMPONENT)}
        means = {name: of_prompts @ weights.T for name, of_prompts in value.items()}
        x, y = value["direct_effect"], value["compensation"]
        covariance = (x * y) @ weights.T - means["direct_effect"] * means["compensation"]
        variance = (x * x) @ weights.T - means["direct_effect"] ** 2
        return cls(
            model=effects.attrs["model"],
            n_prompts=n,
            parallel=bool(effects.attrs["parallel"]),
            slope=np.divide(covariance, variance, out=np.full_like(variance, np.nan), where=variance > 1e-12),
            absolute_direct_effect=np.abs(x) @ weights.T,
            absolute_change=np.abs(value["change"]) @ weights.T,
            **means,
        )

    @property
    def n_layers(self) -> int:
        return len(self.effect) // 2

    def later_attention(self) -> Int[np.ndarray, " chosen"]:
        """Attention components of the later half of the layers that have attention above."""
        return np.arange(2 * round(0.5 * self.n_layers), 2 * (self.n_layers - 1), 2)

    def late_mlps(self) -> Int[np.ndarray, " chosen"]:
        """MLP components of the last third of the layers, at least of the last."""
        return np.arange(2 * min(round(2 / 3 * self.n_layers), self.n_layers - 1) + 1, 2 * self.n_layers, 2)

    def attention_below_late_mlps(self) -> Int[np.ndarray, " chosen"]:
        """Attention components below all of :meth:`late_mlps`; none in a model of one parallel block."""
        return 2 * np.flatnonzero(downstream(self.n_layers, self.parallel)[::2, self.late_mlps()[0]])

    def strongest_below_late_mlps(self) -> Int[np.ndarray, " sample"]:
        """That of :meth:`attention_below_late_mlps` with the largest mean direct effect: for each sample anew."""
        attention = self.attention_below_late_mlps()
        return attention[self.direct_effect[attention].argmax(0)]

    def late_mlps_ablated(self) -> tuple[Float[np.ndarray, " sample"], Float[np.ndarray, " sample"]]:
        """Change of the late MLPs' effects, summed, when that component is ablated, and its direct effect."""
        strongest, sample = self.strongest_below_late_mlps(), np.arange(self.effect.shape[1])
        change = self.change[strongest[None], self.late_mlps()[:, None], sample[None]].sum(0)
        return change, self.direct_effect[strongest, sample]

    def coupling(self, share: float = COUPLED) -> Float[np.ndarray, "layer sample"]:
        """Share of the components downstream of each attention layer whose mean absolute change is above ``share`` of its
        mean absolute direct effect; NaN where nothing is downstream."""
        below = downstream(self.n_layers, self.parallel)[::2, :, None]
        touched = (self.absolute_change[::2] > np.maximum(share * self.absolute_direct_effect[::2, None], ROUNDING)) & below
        n_below = below.sum(1).astype(np.float64)
        return np.divide(touched.sum(1), n_below, out=np.full(touched[:, 0].shape, np.nan), where=n_below > 0)

    def compensation_share(self) -> Float[np.ndarray, " sample"]:
        """Compensation over direct effect, both summed over :meth:`later_attention`; NaN without any."""
        direct_effect = self.direct_effect[self.later_attention()].sum(0)
        return self.compensation[self.later_attention()].sum(0) / np.where(direct_effect == 0, np.nan, direct_effect)

    def by_layer(self) -> pd.DataFrame:
        """``model, part, layer, quantity, estimate, low, high`` of every quantity that each component has one of."""
        rows = []
        for quantity in ("effect", *BY_COMPONENT, "slope"):
            value = getattr(self, quantity)
            low, high = interval(value)
            for component in range(len(value)):
                layer, is_mlp = divmod(component, 2)
                rows.append((self.model, PARTS[is_mlp], layer, quantity, value[component, 0], low[component], high[component]))
        return pd.DataFrame(rows, columns=["model", "part", "layer", "quantity", "estimate", "low", "high"])


def interval(samples: Float[np.ndarray, "*many sample"]) -> tuple[np.ndarray | float, np.ndarray | float]:
    """95 % percentile interval along the last axis, whose first entry is the estimate; NaN where there is none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        low, high = np.nanquantile(samples[..., 1:], [0.025, 0.975], axis=-1)
    return low, high


def hydra_statistics(means: LayerMeans, without_dropout: bool) -> Samples:
    """The statistics that the claims of notebook 06 are about; those that a model has too few layers for are left out.

    ``without_dropout``: it is known to have been trained without.
    """
    half = slice(2 * round(0.5 * means.n_layers), None, 2)
    statistics = {
        "ablation-based over unembedding-based effect, attention layers of the later half": means.total_effect[half].sum(0)
        / means.effect[half].sum(0),
        "unembedding-based effect of MLPs in the last third of layers, mean": means.effect[means.late_mlps()].mean(0),
    }
    if downstream(means.n_layers, means.parallel)[::2].any():
        statistics["share of downstream layers that change by more than a tenth of the direct effect, mean over attention layers"] = (
            np.nanmean(means.coupling(), axis=0)
        )
    if len(means.attention_below_late_mlps()):
        change, effect = means.late_mlps_ablated()
        statistics[
            "change of late MLPs' effect over direct effect when the attention layer with the largest direct effect below them is ablated"
        ] = change / np.where(effect == 0, np.nan, effect)
    if len(means.later_attention()):
        given_back = "compensation by downstream layers over direct effect"
        share = means.compensation_share()
        statistics[f"{given_back}, attention layers of the later half that have attention above"] = share
        statistics[
            "slope of compensation on direct effect over prompts, mean over attention layers of the later half that have attention above"
        ] = means.slope[means.later_attention()].mean(0)
        if without_dropout:
            statistics[f"{given_back}, trained without dropout"] = share
    return statistics


def trained_without_dropout(name: str) -> bool:
    """Whether the model's own record of its training says so."""
    config = training_config(name)
    return config is not None and config["dropout"] == 0


# ---------------------------------------------------------------- what the notebook draws


@dataclass(frozen=True)
class FactRun:
    """A model, the facts it was measured on, its layers' effects on them and their means."""

    name: str
    prompts: FactPrompts
    effects: xr.Dataset
    means: LayerMeans

    @classmethod
    def of(
        cls, name: str, facts: Sequence[AskedFact], n_prompts: int, ablation: str, folder: Path, seed: int = 0, device: str = "auto"
    ) -> FactRun:
        """Of the facts that the model ``name`` answers; effects are kept in ``folder``.

        Raises:
            UserError: as :func:`load_model`, :func:`choose_prompts` and :func:`ablate_layers`.
        """
        model = _load(name, device)
        prompts = choose_prompts(model, facts, n_prompts, seed)
        effects = layer_effects(model, prompts, ablation, folder, seed)
        return cls(model.name, prompts, effects, LayerMeans.of(effects))

    def by_phrasing(self) -> pd.DataFrame:
        """For each phrasing: prompts measured, compensation and direct effect (logits, sums of :meth:`LayerMeans.later_attention`)
        and their ratio with its 95 % interval."""
        rows = []
        for phrasing in sorted({fact.phrasing for fact in self.prompts.facts}):
            means = LayerMeans.of(self.effects, self.prompts.of_phrasing(phrasing))
            share = means.compensation_share()
            given, lost = (value[means.later_attention()].sum(0)[0] for value in (means.compensation, means.direct_effect))
            rows.append((self.name, phrasing, means.n_prompts, lost, given, share[0], *interval(share)))
        columns = ["model", "phrasing", "prompts", "direct effect", "compensation", "compensation over direct effect", "low", "high"]
        return pd.DataFrame(rows, columns=columns)


def _load(name: str, device: str) -> Model:
    logging.disable_progress_bar()
    return load_model(name, device)


def prompts_table(runs: Sequence[FactRun]) -> pd.DataFrame:
    """How many facts each model was asked, answered and is measured on, and the mean number of donors and their spread (logits).

    The spread is the standard deviation between donors of the total effect of one attention layer on one prompt.
    """
    rows = [
        {
            "model": run.name,
            "asked": run.prompts.n_asked,
            "answered": run.prompts.n_answered,
            "measured": len(run.prompts.facts),
            "dropped, alone in length": run.prompts.n_alone,
            "donors": float(run.effects["n_donors"].mean()),
            "spread between donors": float(run.effects["total_effect_spread"][::2].mean()),
        }
        for run in runs
    ]
    return pd.DataFrame(rows)


def worked_prompt(run: FactRun) -> tuple[int, int]:
    """``(component, prompt)``: the attention with the largest mean direct effect of those with attention above (of all, if
    there is one layer), and the prompt whose compensation for it is the median: neither the best nor the worst case."""
    attention = np.arange(0, max(2, 2 * (run.means.n_layers - 1)), 2)
    component = int(attention[run.means.direct_effect[attention, 0].argmax()])
    compensation = run.effects["compensation"].transpose("ablated", "prompt").values[component]
    return component, int(np.argsort(compensation, kind="stable")[len(compensation) // 2])


def worked_table(run: FactRun, component: int, prompt: int) -> pd.DataFrame:
    """One prompt part by part, in order of depth: ``part, clean, ablated`` (logits, averaged over donors).

    The clean column sums to the clean logit, the ablated one, with the final norm's row, to the ablated logit.
    """
    here = run.effects.isel(prompt=prompt)
    effect = here["effect"].values.astype(np.float64)
    ablated = effect + here["change"].transpose("ablated", "observed").values[component]
    ablated[component] -= float(here["direct_effect"][component])
    rest = float(here["clean_logit"]) - effect.sum()
    names = [f"{PARTS[i % 2]} {i // 2}" for i in range(len(effect))]
    return pd.DataFrame(
        {
            "part": ["embedding, constants", *names, "final norm"],
            "clean": [rest, *effect, 0.0],
            "ablated": [rest, *ablated, float(here["norm_term"][component])],
        }
    )


def checkpoints(name: str) -> list[tuple[int, str]]:
    """``(step, what to load)`` of a model's saved training checkpoints, in order, and last the model itself; empty if it has none."""
    folder = model_folder(name)
    saved = (
        [] if folder is None else [(int(path.name.removeprefix("step-")), str(path)) for path in sorted(folder.glob("checkpoints/step-*"))]
    )
    if not saved:
        return []
    return [*saved, (int(json.loads((folder / "metrics.json").read_text())["steps"]), name)]


def over_training(
    name: str, facts: Sequence[AskedFact], n_prompts: int, ablation: str, folder: Path, seed: int, device: str
) -> pd.DataFrame:
    """Facts answered, and the effects' means, at each of :func:`checkpoints`: ``model, prompts, step, quantity, estimate, low, high``.

    Prompts are drawn whether they are answered or not, and the same at each step: effects are on whatever token the
    checkpoint itself finds most likely. Attention effects are means over :meth:`LayerMeans.later_attention`.
    """
    prompts = choose_prompts(_load(name, device), facts, min(n_prompts, N_OVER_TRAINING), seed, only_answered=False)
    rows = []
    for step, saved in checkpoints(name):
        effects = layer_effects(_load(saved, device), prompts, ablation, folder, seed)
        means = LayerMeans.of(effects)
        n = means.n_prompts
        weights = np.concatenate([np.ones((1, n)), bootstrap_weights(n)]) / n
        later, late = means.later_attention(), means.late_mlps()
        change, _ = means.late_mlps_ablated()
        quantities = {
            "answered": weights @ effects["answered"].values.astype(np.float64),
            "direct effect": means.direct_effect[later].mean(0),
            "total effect": means.total_effect[later].mean(0),
            "compensation": means.compensation[later].mean(0),
            "late MLPs": means.effect[late].mean(0),
            "late MLPs, attention ablated": means.effect[late].mean(0) + change / len(late),
        }
        for quantity, samples in quantities.items():
            rows.append((name, n, step, quantity, samples[0], *interval(samples)))
    return pd.DataFrame(rows, columns=["model", "prompts", "step", "quantity", "estimate", "low", "high"])
