"""How self-repair differs from token to token: its spread, its failures, what it goes with, and tokens to look at.

The tokens of a head are its top ``fraction`` by direct effect, as everywhere; of these, tokens on which the
head does not help (direct effect ≤ 0) are left out, because there self-repair has no share of a direct
effect and its sign means the opposite. Among the top 2 % there are none; with ``fraction = 1`` they are many.
"""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int, Real
from transformers import PreTrainedTokenizerBase

from selfrepair.analysis.head_table import select_each_top, with_self_repair
from selfrepair.analysis.claims import Samples
from selfrepair.models.loading import Model
from selfrepair.statistics import bootstrap_weights, select_top

LOGIT_BYTES = 1 << 28
SAMPLE_BYTES = 1 << 25
#: Where the distribution of self-repair over direct effect is read.
THRESHOLDS = np.linspace(-1, 2, 301)
#: Quantities of :func:`head_noise` that claims are about, as ``claims.yaml`` names their means over heads.
STATISTICS = {
    "spread": "spread of self-repair between tokens over mean direct effect",
    "over_corrected": "share of tokens with self-repair above the direct effect",
    "made_worse": "share of tokens with negative self-repair",
}
#: Kinds of example tokens: self-repair over direct effect lies between these.
KINDS = {"strongly repaired": (0.5, 1.0), "over-repaired": (1.0, np.inf), "made worse": (-np.inf, 0.0)}
CONTEXT = 25


@torch.no_grad()
def correct_probability(model: Model, tokens: Int[np.ndarray, "prompt token"]) -> Float[np.ndarray, "prompt position"]:
    """Clean probability of each position's correct next token; the vocabulary is held for a few prompts at a time."""
    one_prompt = tokens.shape[1] * model.W_U.shape[0] * 4
    parts = []
    for batch in torch.from_numpy(tokens).split(max(1, LOGIT_BYTES // one_prompt)):
        batch = batch.to(model.device)
        logits = model.hf(input_ids=batch, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        correct = logits.gather(-1, batch[:, 1:, None])[..., 0]
        parts.append((correct - logits.logsumexp(-1)).exp().cpu())
    return torch.cat(parts).numpy()


def with_probability(sweep: xr.Dataset, model: Model) -> xr.Dataset:
    """Adds ``self_repair`` (logits) and ``probability``, :func:`correct_probability`, to the sweep of ``model``."""
    return with_self_repair(sweep).assign(probability=(("prompt", "position"), correct_probability(model, sweep["token"].values)))


def strongest_heads(sweep: xr.Dataset, fraction: float, n_layers: int = 4) -> list[tuple[int, int]]:
    """``(layer, head)`` of the head with the largest mean direct effect over its own top tokens, in each of ``n_layers`` layers.

    The layers are spread evenly over the later half, or are the last ``n_layers`` where that holds fewer.
    """
    effect = sweep["direct_effect"].values.astype(np.float64)
    n = len(effect)
    layers = np.linspace(max(0, min(n // 2, n - n_layers)), n - 1, min(n, n_layers)).round().astype(int)
    means = np.where(select_each_top(effect[layers], fraction), effect[layers], 0).sum((2, 3))  # as many tokens for every head
    return [(int(layer), int(head)) for layer, head in zip(layers, means.argmax(1), strict=True)]


def selected_tokens(sweep: xr.Dataset, fraction: float, layer: int, head: int) -> pd.DataFrame:
    """One row per token of a head (see above): effects in logits, ``share`` = self-repair over direct effect, ``probability``.

    ``sweep`` is as :func:`with_probability` gives it.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    effect = sweep["direct_effect"].values[layer, head].astype(np.float64)
    prompt, position = np.nonzero(select_top(effect, fraction) & (effect > 0))
    names = ("direct_effect", "ablated_direct_effect", "logit_change", "self_repair")
    table = pd.DataFrame({"layer": layer, "head": head, "prompt": prompt, "position": position})
    for name in names:
        table[name] = sweep[name].values[layer, head, prompt, position].astype(np.float64)
    table["share"] = table["self_repair"] / table["direct_effect"]
    table["probability"] = sweep["probability"].values[prompt, position].astype(np.float64)
    return table


def token_noise(sweep: xr.Dataset, fraction: float, n_bootstrap: int = 1000, seed: int = 0) -> xr.Dataset:
    """:func:`head_noise` of every head of the later half of the layers, ``[layer, head, sample]``: the estimate, then samples.

    Samples draw whole prompts. ``share_at_most`` ``[layer, head, threshold]`` is the part of a head's
    tokens with self-repair over direct effect up to each threshold. ``sweep`` is as :func:`with_probability` gives it.
    """
    n_layers, n_heads, n_prompts = (sweep.sizes[dim] for dim in ("layer", "head", "prompt"))
    weights = np.concatenate([np.ones((1, n_prompts)), bootstrap_weights(n_prompts, n_bootstrap, seed)])
    layers = range(round(0.5 * n_layers), n_layers)
    found: list[Samples] = []
    below: list[np.ndarray] = []
    for layer in layers:
        for head in range(n_heads):
            tokens = selected_tokens(sweep, fraction, layer, head)
            found.append(head_noise(tokens, weights))
            below.append(np.searchsorted(np.sort(tokens["share"]), THRESHOLDS, "right") / max(1, len(tokens)))
    samples = {name: np.stack([here[name] for here in found]) for name in found[0]} | {"share_at_most": np.stack(below)}
    dims = {name: ("layer", "head", "threshold" if name == "share_at_most" else "sample") for name in samples}
    return xr.Dataset(
        {name: (dims[name], values.reshape(len(layers), n_heads, -1)) for name, values in samples.items()},
        coords={"layer": list(layers), "threshold": THRESHOLDS},
        attrs={"model": sweep.attrs["model"]},
    )


def head_noise(tokens: pd.DataFrame, weights: Float[np.ndarray, "sample prompt"]) -> Samples:
    """What one head's tokens say of the noise of its self-repair, for each sample of prompts; NaN where undefined.

    ``share``: mean self-repair over mean direct effect. ``spread``, ``within``, ``between``: standard
    deviations of self-repair over all tokens, within and between prompts, each over the mean direct
    effect (a negative estimate of a variance counts as 0); ``between_share``: part of the variance that
    lies between prompts (negative where its estimate is). ``over_corrected``, ``made_worse``: shares of tokens with self-repair above the direct effect,
    below 0. ``correlation_*``: Spearman's, of self-repair with ``direct_effect``, ``probability``, ``position``.
    """
    n_parts = -(-8 * len(weights) * len(tokens) // SAMPLE_BYTES)
    parts = [_noise(tokens, part) for part in np.array_split(weights, max(1, n_parts))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _noise(tokens: pd.DataFrame, weights: Float[np.ndarray, "sample prompt"]) -> Samples:
    prompt, effect, repair = (tokens[name].to_numpy() for name in ("prompt", "direct_effect", "self_repair"))
    times = weights[:, prompt]
    mean_effect = _mean(effect, times)
    centred = repair - repair.mean() if repair.size else repair
    variance = _mean(centred**2, times) - _mean(centred, times) ** 2
    between, within = variance_components(repair, prompt, weights)
    ranks = weighted_ranks(repair, times)
    return {
        "share": _mean(repair, times) / mean_effect,
        "spread": np.sqrt(variance.clip(min=0)) / mean_effect,
        "over_corrected": _mean((repair > effect).astype(np.float64), times),
        "made_worse": _mean((repair < 0).astype(np.float64), times),
        "within": np.sqrt(within) / mean_effect,
        "between": np.sqrt(between.clip(min=0)) / mean_effect,
        "between_share": between / (between + within),
        **{
            f"correlation_{name}": weighted_correlation(ranks, weighted_ranks(tokens[name].to_numpy(), times), times)
            for name in ("direct_effect", "probability", "position")
        },
    }


def _mean(values: Float[np.ndarray, " token"], times: Float[np.ndarray, "sample token"]) -> Float[np.ndarray, " sample"]:
    total = times.sum(1)
    return times @ values / np.where(total, total, np.nan)


def variance_components(
    values: Float[np.ndarray, " token"], prompt: Int[np.ndarray, " token"], weights: Float[np.ndarray, "sample prompt"]
) -> tuple[Float[np.ndarray, " sample"], Float[np.ndarray, " sample"]]:
    """Variance between and within prompts: one-way random-effects analysis of variance, prompts of unequal size.

    ``within`` is the mean square within prompts, ``between = (mean square between − within) / n0`` with
    ``n0 = (N − Σ n² / N) / (k − 1)`` for ``N`` tokens in ``k`` prompts of ``n``: unbiased, so possibly negative.
    A prompt drawn twice counts as two. NaN for one prompt only, or no prompt with two tokens.
    """
    n_prompts = weights.shape[1]
    size = np.bincount(prompt, minlength=n_prompts).astype(np.float64)
    values = values - values.mean() if values.size else values
    mean = np.bincount(prompt, values, n_prompts) / np.maximum(size, 1)
    inner = np.bincount(prompt, (values - mean[prompt]) ** 2, n_prompts)
    k, n, squares = (weights @ x for x in (size > 0, size, size**2))
    defined = (k > 1) & (n > k)
    k, n = np.where(defined, k, np.nan), np.where(defined, n, np.nan)
    outer = weights @ (size * mean**2) - (weights @ (size * mean)) ** 2 / n
    within = weights @ inner / (n - k)
    between = (outer / (k - 1) - within) * (k - 1) / (n - squares / n)
    return between, within


def weighted_ranks(values: Real[np.ndarray, " token"], times: Float[np.ndarray, "sample token"]) -> Float[np.ndarray, "sample token"]:
    """Rank of each value where value ``i`` comes ``times[:, i]`` times; equal values share their mean rank."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    copies = np.add.reduceat(times[:, order], starts, axis=1) if group.size else times
    return (copies.cumsum(1) - (copies - 1) / 2)[:, group]


def weighted_correlation(
    x: Float[np.ndarray, "sample token"], y: Float[np.ndarray, "sample token"], times: Float[np.ndarray, "sample token"]
) -> Float[np.ndarray, " sample"]:
    """Pearson's correlation in each sample where pair ``i`` comes ``times[:, i]`` times; NaN where one of the two is constant."""
    total = times.sum(1, keepdims=True)
    total = np.where(total, total, np.nan)
    x, y = (a - (times * a).sum(1, keepdims=True) / total for a in (x, y))
    covariance, *variances = (np.einsum("st,st,st->s", times, a, b) for a, b in ((x, y), (x, x), (y, y)))
    scale = np.sqrt(variances[0] * variances[1])
    return np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0)


def over_heads(noise: xr.Dataset) -> xr.Dataset:
    """Mean over heads; heads for which a quantity is undefined are left out of it."""
    return noise.mean(("layer", "head"))


def noise_table(noise: dict[str, xr.Dataset]) -> pd.DataFrame:
    """One row per model and quantity of :func:`head_noise`: mean over the heads of the later half, 95 % interval over prompts."""
    rows = []
    for model, found in noise.items():
        means = over_heads(found.drop_vars("share_at_most"))
        for quantity, samples in means.data_vars.items():
            defined = samples.values[1:][np.isfinite(samples.values[1:])]
            low, high = np.quantile(defined, [0.025, 0.975]) if defined.size else (np.nan, np.nan)
            rows.append((model, quantity, float(samples[0]), float(low), float(high)))
    return pd.DataFrame(rows, columns=["model", "quantity", "estimate", "low", "high"])


def noise_statistics(noise: xr.Dataset) -> Samples:
    """The statistics that the claims of notebook 02 are about; the estimate, then one value per sample."""
    means = over_heads(noise)
    return {statistic: means[quantity].values for quantity, statistic in STATISTICS.items()}


def head_shares(table: pd.DataFrame) -> dict[str, Float[np.ndarray, " head"]]:
    """Mean self-repair over mean direct effect of every head of the later half of the layers, by model, of a heads table."""
    shares = {}
    for model, rows in table.groupby("model", sort=False):
        later = rows[(rows["layer"] >= round(0.5 * rows["layer"].nunique())) & (rows["direct_effect"] > 0)]
        shares[model] = (later["self_repair"] / later["direct_effect"]).to_numpy()
    return shares


def examples(
    tokens: pd.DataFrame, token_ids: Int[np.ndarray, "prompt token"], tokenizer: PreTrainedTokenizerBase, context: int = CONTEXT
) -> pd.DataFrame:
    """Up to two of ``tokens`` per kind of :data:`KINDS`, with ``kind``, the text ``before`` and the correct ``token`` itself.

    The rule: of the kind's tokens, the one whose ``share`` is nearest in size to their median, then the
    one nearest to their 90 % quantile in another prompt.
    """
    rows = []
    for kind, (low, high) in KINDS.items():
        left = tokens[(tokens["share"] > low) & (tokens["share"] < high)]
        for wanted in np.quantile(left["share"].abs(), [0.5, 0.9]) if len(left) else ():
            if len(left):
                row = left.loc[(left["share"].abs() - wanted).abs().idxmin()]
                before, token = _decode(tokenizer, token_ids[int(row["prompt"])], int(row["position"]) + 1, context)
                rows.append({"kind": kind, **row, "before": before, "token": token})
                left = left[left["prompt"] != row["prompt"]]
    return pd.DataFrame(rows, columns=["kind", *tokens.columns, "before", "token"])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Int[np.ndarray, " token"], at: int, context: int) -> tuple[str, str]:
    """Text of the ``context`` tokens before token ``at``, and what that token adds to it (a token may be part of a character)."""
    first = max(0, at - context)
    before, whole = (tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False) for end in (at, at + 1))
    split = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole)))
    return whole[:split], whole[split:]


def examples_text(chosen: pd.DataFrame, width: int = 100) -> str:
    """The examples as plain text, the token in ⟦brackets⟧, line ends as ↵."""
    blocks = []
    for kind in KINDS:
        rows = chosen[chosen["kind"] == kind]
        if rows.empty:
            blocks.append(f"{kind.upper()}: no such token here")
        for row in rows.itertuples():
            numbers = (
                f"{kind.upper()}: L{row.layer:.0f}H{row.head:.0f}, prompt {row.prompt:.0f}, position {row.position:.0f}: "
                f"direct effect {row.direct_effect:.2f} ({row.ablated_direct_effect:.2f} when ablated), logit change {row.logit_change:+.2f}, self-repair {row.self_repair:+.2f} "
                f"({row.share:+.0%} of the direct effect), clean probability {row.probability:.2g}"
            )
            text = row.before.replace("\n", " ↵ ") + "⟦" + row.token.replace("\n", "↵").replace(" ", "\u00a0") + "⟧"
            blocks.append(
                textwrap.fill(numbers, width) + "\n" + textwrap.fill(text, width, initial_indent="    … ", subsequent_indent="    ")
            )
    return "\n\n".join(blocks)
