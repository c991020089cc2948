"""Iterative inference: heads fed what heads write, layers fed an earlier input, outputs alike, updates down the gradient.

If layers refine a common estimate in small steps (Rushing & Nanda 2024, §6), a layer does much of what
its neighbour would have done, heads react to their own output already being there, and every block moves
the residual stream down the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.engine.head_ablation import rows_that_fit
from selfrepair.analysis.claims import Samples
from selfrepair.text.corpora import Prompts
from selfrepair.engine.direct_effect import FinalNorm, token_directions
from selfrepair.errors import UserError
from selfrepair.models.loading import Model
from selfrepair.paths import PUBLISHED
from selfrepair.engine.ablations import mean_z, pairs_that_fit, partner_batches, replacement_for
from selfrepair.engine.forward import Replay, carry, float32_residual, run_clean
from selfrepair.statistics import bootstrap_weights, select_top
from selfrepair.measure.heads import checked_tokens

SCALES = (1, 2, 3, 5, 8)
VECTORS = ("own_output", "random_head_output", "random_direction")
#: Self-feeding runs on the first prompts only: 4064 tokens at 128 per prompt, against 1450 or 420 as published.
SELF_FEEDING_PROMPTS = 32
#: Heads with the largest mean direct effect, which are fed whatever their layer.
STRONGEST = 5
COSINE_BYTES = 1 << 28
GRADIENT_BYTES = 1 << 30


class Reading:
    """The clean run of some prompts, and direct effects (logits) read with its final norm's scale."""

    def __init__(self, model: Model, tokens: Int[Tensor, "prompt position"]):
        self.model = model
        self.clean = run_clean(model, tokens)
        self.direction, _ = token_directions(model, tokens)
        self.sigma = FinalNorm.of(model.final_norm).sigma(self.clean.final_residual[:, :-1])

    def effects(
        self, layer: int, z: Float[Tensor, "*variant prompt position head d_head"]
    ) -> Float[Tensor, "*variant prompt position-1 head"]:
        """Direct effect of every head of ``layer`` if its ``z`` were this: ``u · (z_h − b_V,h) W_O,h / σ_clean``."""
        along = torch.einsum("pkd,hed->pkhe", self.direction, self.model.W_O(layer).to(self.direction.dtype))
        own = (z - self.model.value_biases[layer])[..., :-1, :, :].to(along.dtype)
        return torch.linalg.vecdot(own, along) / self.sigma[..., None]

    def output(self, layer: int, head: int) -> Float[Tensor, "prompt position d_model"]:
        """What a head writes: ``(z_h − b_V,h) W_O,h``."""
        z = self.clean.z[layer][:, :, head] - self.model.value_biases[layer][head]
        return z @ self.model.W_O(layer)[head]


class _Reached(Exception):
    def __init__(self, z: Tensor):
        self.z = z


def z_reached(model: Model, layer: int, run: Callable[[], object]) -> Float[Tensor, "row position head d_head"]:
    """``z`` of ``layer`` in ``run()``, which is broken off there: what comes after it costs nothing."""

    def stop(_: nn.Module, positional: tuple) -> None:
        raise _Reached(positional[0].unflatten(-1, (model.n_heads, -1)))

    handle = model.output_projections[layer].register_forward_pre_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.z
    finally:
        handle.remove()
    raise RuntimeError(f"layer {layer} did not run")


@torch.no_grad()
def attention_z(
    model: Model, replay: Replay, layer: int, residual: Float[Tensor, "row position d_model"]
) -> Float[Tensor, "row position head d_head"]:
    """``z`` of ``layer`` when ``residual`` is the residual stream before it."""
    parts = residual.split(rows_that_fit(model, residual.shape[1]))
    return torch.cat([z_reached(model, layer, lambda part=part: replay.block(layer, part)) for part in parts])


@torch.no_grad()
def direct_effects(model: Model, tokens: Int[Tensor, "prompt position"]) -> Float[np.ndarray, "layer head prompt position-1"]:
    """Direct effect (logits) of every head at every token."""
    parts = []
    for batch in tokens.split(2 * pairs_that_fit(model, tokens.shape[1])):
        reading = Reading(model, batch)
        parts.append(torch.stack([reading.effects(layer, z) for layer, z in enumerate(reading.clean.z)]).cpu())
    return torch.cat(parts, dim=1).movedim(-1, 1).numpy()


def prompt_means(per_prompt: Float[np.ndarray, "*x prompt"], n_bootstrap: int = 1000, seed: int = 0) -> Float[np.ndarray, "*x sample"]:
    """Mean over prompts: the estimate, then bootstrap samples of it."""
    return per_prompt @ _weights(per_prompt.shape[-1], n_bootstrap, seed).T / per_prompt.shape[-1]


def _weights(n_prompts: int, n_bootstrap: int, seed: int) -> Float[np.ndarray, "sample prompt"]:
    """How often each prompt counts: once for the estimate, then as drawn."""
    return np.concatenate([np.ones((1, n_prompts)), bootstrap_weights(n_prompts, n_bootstrap, seed)])


# Self-feeding


@dataclass(frozen=True)
class SelfFeeding:
    """Direct effects (logits) of heads before and after vectors are added to the residual stream before their layer.

    Axis ``fed`` follows ``heads`` (layer, head), ``vector`` follows ``VECTORS``, ``scale`` ``SCALES``.
    ``ranks`` are by mean direct effect among all heads of the model, from 1.
    """

    n_layers: int
    heads: list[tuple[int, int]]
    ranks: list[int]
    before: Float[np.ndarray, "fed prompt read_position"]
    after: Float[np.ndarray, "fed vector scale prompt read_position"]


@torch.no_grad()
def self_feeding(model: Model, prompts: Prompts, seed: int = 0) -> SelfFeeding:
    """Feeds heads their own output, another head's and random directions; R&N 2024, §6.

    The heads are all of the later half of the layers and the ``STRONGEST`` of the model. What is added, at
    every position at once, is ``scale`` times the head's own output at that position, the output there of
    another head of the model (drawn once per head from ``seed``), or a Gaussian direction (drawn per token)
    of the own output's norm. Only the head's own attention is run again, and its direct effect is read with
    the clean scale of the final norm. The first ``SELF_FEEDING_PROMPTS`` prompts are used.

    Raises:
        UserError: direct effects do not sum to the model's logits.
    """
    tokens = checked_tokens(model, prompts)[:SELF_FEEDING_PROMPTS]
    effects = direct_effects(model, tokens)
    order = [(int(i) // model.n_heads, int(i) % model.n_heads) for i in np.argsort(-effects.mean((2, 3)).ravel(), kind="stable")]
    heads = sorted({*order[:STRONGEST], *(head for head in order if head[0] >= later_half(model.n_layers))})
    others = [_another_head(head, order, seed) for head in heads]
    replay = Replay(model, tokens.shape[1])
    scales = torch.tensor(SCALES, device=model.device, dtype=model.dtype)[:, None, None, None]
    after = np.empty((len(heads), len(VECTORS), len(SCALES), *effects.shape[2:]), dtype=effects.dtype)
    for indices in torch.arange(len(tokens)).split(2 * pairs_that_fit(model, tokens.shape[1])):
        reading = Reading(model, tokens[indices])
        for i, (layer, head) in enumerate(heads):
            own = reading.output(layer, head)
            for v, added in enumerate((own, reading.output(*others[i]), _random_like(own, [seed, layer, head], indices.tolist()))):
                fed = reading.clean.residuals[layer] + scales * added
                z = attention_z(model, replay, layer, fed.flatten(0, 1)).unflatten(0, fed.shape[:2])
                after[i, v][:, indices.numpy()] = reading.effects(layer, z)[..., head].cpu().numpy()
    before = np.stack([effects[head] for head in heads])
    return SelfFeeding(model.n_layers, heads, [order.index(head) + 1 for head in heads], before, after)


def later_half(n_layers: int) -> int:
    """First layer of the later half."""
    return round(0.5 * n_layers)


def _another_head(head: tuple[int, int], heads: list[tuple[int, int]], seed: int) -> tuple[int, int]:
    rest = sorted(set(heads) - {head})
    return rest[np.random.Generator(np.random.PCG64([seed, *head])).integers(len(rest))]


def _random_like(
    output: Float[Tensor, "prompt position d_model"], seed: list[int], indices: list[int]
) -> Float[Tensor, "prompt position d_model"]:
    """A Gaussian direction per token with the norm of ``output`` there; the same for a prompt in any batch, on any device."""
    shape = tuple(output.shape[1:])
    drawn = np.stack([np.random.Generator(np.random.PCG64([*seed, i])).standard_normal(shape, dtype=np.float32) for i in indices])
    direction = nn.functional.normalize(torch.from_numpy(drawn).to(output), dim=-1)
    return direction * output.norm(dim=-1, keepdim=True)


def slopes(fed: SelfFeeding, n_bootstrap: int = 1000, seed: int = 0) -> Float[np.ndarray, "fed vector scale sample"]:
    """Slope of direct effect after on before: least squares with intercept over all tokens; samples draw whole prompts."""
    weights = _weights(fed.before.shape[1], n_bootstrap, seed)
    x, y = fed.before.astype(np.float64)[:, None, None], fed.after.astype(np.float64)
    n = x.shape[-1] * weights.sum(1)
    sum_x, sum_y, sum_xx, sum_xy = (sums.sum(-1) @ weights.T for sums in (x, y, x * x, x * y))
    return (n * sum_xy - sum_x * sum_y) / (n * sum_xx - sum_x**2)


def self_feeding_table(model: str, fed: SelfFeeding) -> pd.DataFrame:
    """One row per head, vector and scale, in the columns of the published table, and the slope's 95 % interval over prompts."""
    found = slopes(fed)
    low, high = np.quantile(found[..., 1:], [0.025, 0.975], axis=-1)
    rows = []
    for i, (layer, head) in enumerate(fed.heads):
        for v, vector in enumerate(VECTORS):
            for s, scale in enumerate(SCALES):
                after = fed.after[i, v, s]
                rows.append(
                    {
                        "model": model,
                        "layer": layer,
                        "head": head,
                        "rank_by_mean_direct_effect": fed.ranks[i],
                        "added_vector": vector,
                        "scale": scale,
                        "n_tokens": after.size,
                        "mean_direct_effect_before": fed.before[i].mean(dtype=np.float64),
                        "mean_direct_effect_after": after.mean(dtype=np.float64),
                        "slope_after_on_before": found[i, v, s, 0],
                        "median_before": np.median(fed.before[i]),
                        "median_after": np.median(after),
                        "slope_low": low[i, v, s],
                        "slope_high": high[i, v, s],
                    }
                )
    return pd.DataFrame(rows)


def published_self_feeding() -> pd.DataFrame:
    """The authors' released self-feeding numbers (R&N 2024, §6): four heads of five models, in logits."""
    return pd.read_csv(PUBLISHED / "published_self_feeding_heads.csv")


# One layer earlier


@dataclass(frozen=True)
class EarlierInput:
    """Changes of the direct effects of the heads of every layer but the first, summed per prompt (logits).

    The sums run over the tokens where the strongest head of the layer before has its largest direct
    effects (``counts`` of them in each prompt); ``ablated_heads`` are these heads. ``earlier``: the layer
    reads the residual stream before its predecessor instead of its own. ``ablated``: it reads its own, with
    that strongest head ablated.
    """

    ablated_heads: list[int]
    earlier: Float[np.ndarray, "later_layer head prompt"]
    ablated: Float[np.ndarray, "later_layer head prompt"]
    counts: Float[np.ndarray, "later_layer prompt"]


@torch.no_grad()
def one_layer_earlier(model: Model, prompts: Prompts, ablation: str, fraction: float) -> EarlierInput:
    """What every head does with its predecessor's input, and what it does when the layer before lacks its strongest head.

    The strongest head has the largest mean direct effect over its own top ``fraction`` of tokens, and both
    changes are taken on those tokens. R&N 2024, §6.

    Raises:
        UserError: unknown ablation, ``fraction`` not in (0, 1], a model of one layer, or direct effects that do not sum to the logits.
    """
    if model.n_layers < 2:
        raise UserError(f"{model.name} has one layer, which has no predecessor: give a model of at least two")
    tokens = checked_tokens(model, prompts)
    means = mean_z(model, tokens) if ablation == "mean" else None
    replacement = replacement_for(ablation, model, means)
    effects = direct_effects(model, tokens)
    strongest, selected = zip(*(_strongest(layer, fraction) for layer in effects[:-1]), strict=True)
    replay = Replay(model, tokens.shape[1])
    shape = (model.n_layers - 1, model.n_heads, len(tokens))
    earlier, ablated = np.zeros(shape), np.zeros(shape)
    pairs = max(1, min(rows_that_fit(model, tokens.shape[1]) // 2, pairs_that_fit(model, tokens.shape[1])))
    for indices in partner_batches(len(tokens), pairs):
        reading = Reading(model, tokens[indices])
        clean = reading.clean
        for before, (head, tops) in enumerate(zip(strongest, selected, strict=True)):
            layer = before + 1
            change = (replacement(before, clean.z[before]) - clean.z[before])[:, :, head] @ model.W_O(before)[head]
            without = z_reached(model, layer, lambda b=before, c=change, run=clean: carry(model, replay, run, b, c[None]))
            own = reading.effects(layer, clean.z[layer])
            chosen = torch.from_numpy(tops[indices.numpy()]).to(own)[..., None]
            for sums, z in ((earlier, attention_z(model, replay, layer, clean.residuals[before])), (ablated, without)):
                sums[before][:, indices.numpy()] = ((reading.effects(layer, z) - own) * chosen).sum(1).T.cpu().numpy()
    return EarlierInput(list(strongest), earlier, ablated, np.stack(selected).sum(-1, dtype=np.float64))


def _strongest(effects: Float[np.ndarray, "head prompt position"], fraction: float) -> tuple[int, np.ndarray]:
    """The head with the largest mean direct effect over its top ``fraction`` of tokens, and these tokens."""
    tops = [select_top(head, fraction) for head in effects]
    head = int(np.argmax([values[top].mean() for values, top in zip(effects, tops, strict=True)]))
    return head, tops[head]


def mean_changes(
    found: EarlierInput, n_bootstrap: int = 1000, seed: int = 0
) -> tuple[Float[np.ndarray, "later_layer head sample"], Float[np.ndarray, "later_layer head sample"]]:
    """Mean change (logits) per head, fed its predecessor's input and under ablation; samples draw whole prompts."""
    weights = _weights(found.counts.shape[1], n_bootstrap, seed).T
    counts = (found.counts @ weights)[:, None]
    return found.earlier @ weights / np.where(counts, counts, np.nan), found.ablated @ weights / np.where(counts, counts, np.nan)


def correlation(x: Float[np.ndarray, "layer head sample"], y: Float[np.ndarray, "layer head sample"]) -> Float[np.ndarray, " sample"]:
    """Pearson's correlation over all heads, per sample; nan where a sample has no token of some layer."""
    x, y = (values.reshape(-1, values.shape[-1]) - values.mean((0, 1)) for values in (x, y))
    return (x * y).sum(0) / np.sqrt((x * x).sum(0) * (y * y).sum(0))


# Outputs of heads


@dataclass(frozen=True)
class HeadCosines:
    """Mean cosines over tokens between the outputs of heads (value bias moved out), signed.

    ``heads`` is ordered by layer, then head; ``layers`` are means over pairs of heads per prompt, a head
    with itself left out.
    """

    heads: Float[np.ndarray, "all_heads all_heads"]
    layers: Float[np.ndarray, "layer layer prompt"]


@torch.no_grad()
def head_cosines(model: Model, prompts: Prompts) -> HeadCosines:
    """Cosine between what every two heads of the model write at the same token, mean over tokens.

    Raises:
        UserError: direct effects do not sum to the model's logits.
    """
    tokens = checked_tokens(model, prompts)
    n, n_heads = model.n_layers, model.n_heads
    at_once = max(1, COSINE_BYTES // (4 * n * n_heads * model.hf.config.hidden_size))
    total = torch.zeros(n * n_heads, n * n_heads, dtype=torch.float64, device=model.device)
    layers = []
    for batch in tokens.split(2 * pairs_that_fit(model, tokens.shape[1])):
        reading = Reading(model, batch)
        for prompt in range(len(batch)):
            gram = torch.zeros_like(total)
            for positions in torch.arange(batch.shape[1] - 1, device=model.device).split(at_once):
                outputs = [_outputs(reading, layer, prompt, positions) for layer in range(n)]
                units = nn.functional.normalize(torch.cat(outputs, dim=1), dim=-1)
                gram += torch.einsum("khd,kgd->hg", units, units)
            gram /= batch.shape[1] - 1
            total += gram
            layers.append(_between_layers(gram, n, n_heads))
    return HeadCosines((total / len(tokens)).cpu().numpy(), torch.stack(layers, dim=-1).cpu().numpy())


def _outputs(reading: Reading, layer: int, prompt: int, positions: Int[Tensor, " k"]) -> Float[Tensor, "k head d_model"]:
    own = reading.clean.z[layer][prompt, positions] - reading.model.value_biases[layer]
    written = torch.einsum("khe,hed->khd", own, reading.model.W_O(layer))
    return written.to(torch.promote_types(written.dtype, torch.float32))


def _between_layers(gram: Float[Tensor, "all_heads all_heads"], n_layers: int, n_heads: int) -> Float[Tensor, "layer layer"]:
    """Means over pairs of different heads."""
    pairs = 1 - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    blocks = [m.unflatten(1, (n_layers, n_heads)).unflatten(0, (n_layers, n_heads)).sum((1, 3)) for m in (gram * pairs, pairs)]
    return blocks[0] / blocks[1].clamp_min(1)


def cosine_by_distance(cosines: HeadCosines, n_bootstrap: int = 1000, seed: int = 0) -> Float[np.ndarray, "layer sample"]:
    """Mean signed cosine over all pairs of heads whose layers are 0, 1, 2 … apart; samples draw whole prompts."""
    n = len(cosines.layers)
    return prompt_means(np.stack([_apart(cosines, d, d) for d in range(n)]), n_bootstrap, seed)


def neighbours_minus_distant(cosines: HeadCosines, n_bootstrap: int = 1000, seed: int = 0) -> Float[np.ndarray, " sample"]:
    """Mean signed cosine between heads of neighbouring layers minus that between layers at least three apart."""
    return prompt_means(_apart(cosines, 1, 1) - _apart(cosines, 3, len(cosines.layers)), n_bootstrap, seed)


def _apart(cosines: HeadCosines, least: int, most: int) -> Float[np.ndarray, " prompt"]:
    """Per prompt, the mean over pairs of heads whose layers are ``least`` to ``most`` apart."""
    layer = np.arange(len(cosines.layers))
    distance = np.abs(layer[:, None] - layer)
    return cosines.layers[(distance >= least) & (distance <= most)].mean(0)


# Updates and gradients


@dataclass(frozen=True)
class Alignment:
    """Means over the tokens of each prompt.

    ``gradient``: cosine of a block's update of the residual stream with minus the gradient, there, of the
    prompt's summed next-token loss; ``final``: cosine of the update with the final residual; ``loss``
    (nats): of the final norm and unembedding read before each block and after the last (logit lens).
    """

    gradient: Float[np.ndarray, "layer prompt"]
    final: Float[np.ndarray, "layer prompt"]
    loss: Float[np.ndarray, "layer+1 prompt"]


def alignment(model: Model, prompts: Prompts) -> Alignment:
    """How every block's update lies to minus the loss' gradient and to the final residual; R&N 2024, §6.

    Raises:
        UserError: direct effects do not sum to the model's logits.
    """
    tokens = checked_tokens(model, prompts)
    replay = Replay(model, tokens.shape[1])
    wide = torch.promote_types(model.dtype, torch.float32)
    parts = []
    for batch in tokens.split(_prompts_with_gradients(model, tokens.shape[1])):
        residuals, gradients = residual_gradients(model, replay, batch)
        with torch.no_grad():
            stream, downhill = (torch.stack(r)[:, :, :-1].to(wide) for r in (residuals, [-gradient for gradient in gradients]))
            updates = stream.diff(dim=0)
            gradient = torch.cosine_similarity(updates, downhill, dim=-1)
            final = torch.cosine_similarity(updates, stream[-1], dim=-1)
            loss = torch.stack([next_token_loss(model, residual, batch) for residual in residuals])
        parts.append([values.mean(-1, dtype=torch.float64).cpu().numpy() for values in (gradient, final, loss)])
    return Alignment(*(np.concatenate(values, axis=1) for values in zip(*parts, strict=True)))


def residual_gradients(
    model: Model, replay: Replay, tokens: Int[Tensor, "prompt position"]
) -> tuple[list[Float[Tensor, "prompt position d_model"]], list[Float[Tensor, "prompt position d_model"]]]:
    """The residual stream before every block and after the last, and the gradients of the summed loss before every block.

    A gradient counts everything later that the residual touches, through attention other positions' losses too.
    """
    residuals = [run_clean(model, tokens).residuals[0].detach().requires_grad_()]
    with torch.enable_grad():
        for layer in range(model.n_layers):
            residuals.append(replay.block(layer, residuals[-1]))
        gradients = torch.autograd.grad(next_token_loss(model, residuals[-1], tokens).sum(), residuals[:-1])
    return [residual.detach() for residual in residuals], list(gradients)


def next_token_loss(
    model: Model, residual: Float[Tensor, "prompt position d_model"], tokens: Int[Tensor, "prompt position"]
) -> Float[Tensor, "prompt position-1"]:
    """Cross-entropy (nats) of the next token when ``residual`` is final."""
    with float32_residual(model):
        logits = model.hf.get_output_embeddings()(model.final_norm(residual[:, :-1]))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").unflatten(0, (len(tokens), -1))


def _prompts_with_gradients(model: Model, prompt_len: int) -> int:
    """Prompts whose recorded activations, about 24 d_model a block, and logits take no more than a gibibyte."""
    width = 24 * model.n_layers * model.hf.config.hidden_size + 4 * model.W_U.shape[0]
    return max(1, GRADIENT_BYTES // (prompt_len * width * 4))


# Claims


def iterative_statistics(fed: SelfFeeding, cosines: HeadCosines, aligned: Alignment, n_bootstrap: int = 1000, seed: int = 0) -> Samples:
    """The statistics that the claims of notebook 05 are about; one value per sample.

    Slopes are of the heads of the later half of the layers, and the largest and smallest are sought anew in
    every sample. Models with fewer than four layers have no layers three apart.
    """
    later = [layer >= later_half(fed.n_layers) for layer, _ in fed.heads]
    largest_scale = slopes(fed, n_bootstrap, seed)[later, :, -1]
    own, direction = (largest_scale[:, VECTORS.index(vector)] for vector in ("own_output", "random_direction"))
    found = {
        "largest slope of direct effect after on before, own output, largest scale": own.max(0),
        "smallest slope of direct effect after on before, own output, largest scale": own.min(0),
        "mean slope of direct effect after on before, random direction, largest scale": direction.mean(0),
        "mean cosine of block updates with the negative gradient of the loss": prompt_means(aligned.gradient.mean(0), n_bootstrap, seed),
    }
    if fed.n_layers >= 4:
        name = "mean cosine between outputs of neighbouring layers minus that of layers at least three apart"
        found[name] = neighbours_minus_distant(cosines, n_bootstrap, seed)
    return found


def published_statistics() -> dict[str, Samples]:
    """The same of the released slopes, the estimate alone, over the four heads of each model."""
    table = published_self_feeding()
    largest = table[table["scale"] == table["scale"].max()]
    found = {}
    for model, rows in largest.groupby("model", sort=False):
        slope = rows.groupby("added_vector")["slope_after_on_before"]
        found[str(model)] = {
            "largest slope of direct effect after on before, own output, largest scale": slope.max()[["own_output"]].to_numpy(),
            "smallest slope of direct effect after on before, own output, largest scale": slope.min()[["own_output"]].to_numpy(),
            "mean slope of direct effect after on before, random direction, largest scale": slope.mean()[["random_direction"]].to_numpy(),
        }
    return found
