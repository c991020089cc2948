"""Notebook 05's quantities the slow way: plain float64 models, one full pass at a time; and made-up ones."""

from __future__ import annotations

import numpy as np
import reference
import torch
import xarray as xr
from families import random_tokens
from reference import out_matrix, parts

from selfrepair.measure.measurement import find_measurement
from selfrepair.measure.self_feeding import SCALES, VECTORS
from selfrepair.measure.task import described
from selfrepair.measure.tokens import of_prompts
from selfrepair.text.corpora import Prompts

HEADS = 4


def prompts(n=6, length=12, seed=0):
    return Prompts(random_tokens(n, length, seed).numpy(), "random tokens")


def tokens_of(found):
    return torch.from_numpy(found.tokens)


def measured(name, model, here, **settings):
    """A measurement of one shard of these prompts, in memory."""
    if name == "tokens":
        return of_prompts(here)
    settings = {"n_prompts": len(here.tokens), "ablation": "resample", "fraction": 0.25, "seed": 0} | settings
    measurement = find_measurement(name)
    inputs = {needed: measured(needed, model, here, **settings) for needed in measurement.needs(settings)}
    (shard,) = measurement.shards(settings)
    return measurement.compute(model, settings, inputs, shard).assign_attrs(described(model))


@torch.no_grad()
def pass_with_input(hf, tokens, layer, change):
    """z of ``layer`` and the final residual stream of a full pass in which ``change(residual)`` replaces the
    residual before that layer."""
    blocks, projections, norm = parts(hf)
    seen = {}

    def enter(_, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handles = [
        blocks[layer].register_forward_pre_hook(enter, with_kwargs=True),
        projections[layer].register_forward_pre_hook(lambda _, args: seen.update(z=args[0].clone())),
        norm.register_forward_pre_hook(lambda _, args: seen.update(final=args[0].clone())),
    ]
    try:
        hf(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen["z"], seen["final"]


def z_with_input(hf, tokens, layer, change):
    return pass_with_input(hf, tokens, layer, change)[0]


def fed_at_each(hf, tokens, layer, vector, positions):
    """z of ``layer`` and the final residual stream where ``vector [prompt, position, d_model]`` is added
    before that layer at one position, for each of ``positions`` in a full pass of its own; elsewhere as they
    were."""
    z, final = pass_with_input(hf, tokens, layer, lambda residual: residual)
    for position in positions:

        def add(residual, position=position):
            changed = residual.clone()
            changed[:, position] += vector[:, position]
            return changed

        for kept, seen in zip((z, final), pass_with_input(hf, tokens, layer, add), strict=True):
            kept[:, position] = seen[:, position]
    return z, final


def written(hf, z, layer, head):
    """What a head writes, its value bias moved out."""
    width = z.shape[-1] // HEADS
    part = slice(head * width, (head + 1) * width)
    return (z[..., part] - reference.value_bias(hf, layer)[part]) @ out_matrix(parts(hf)[1][layer])[part]


@torch.no_grad()
def effect(hf, clean, tokens, z, layer, head):
    sigma = reference.sigma(hf, clean["residual"][len(parts(hf)[0])])
    return reference.read_frozen(hf, written(hf, z, layer, head), sigma, tokens)


def close(found, wanted, tolerance=1e-4):
    found = np.asarray(found)
    wanted = wanted.numpy() if isinstance(wanted, torch.Tensor) else wanted
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def feeding(slope_by_head, n_layers=4, n_prompts=6, noise=0.0):
    """Heads whose after is slope · before + 0.3; half of before where fed everywhere, σ a tenth larger.

    ``slope_by_head``: (layer, head) → (own output, random head, random direction) at the largest scale.
    """
    rng = np.random.default_rng(0)
    n_fed = len(slope_by_head)
    before = rng.normal(size=(n_fed, n_prompts, 5))
    slope = np.ones((n_fed, 3, len(SCALES)))
    slope[:, :, -1] = list(slope_by_head.values())
    drawn = rng.normal(size=(n_fed, 3, len(SCALES), n_prompts, 5))
    after = slope[..., None, None] * before[:, None, None] + 0.3 + noise * drawn
    layers, heads = zip(*slope_by_head, strict=True)
    return xr.Dataset(
        {
            "before": (("fed", "prompt", "position"), before),
            "after": (("fed", "vector", "scale", "prompt", "position"), after),
            "after_everywhere": (("fed", "prompt", "position"), before / 2),
            "sigma_ratio": (("fed", "vector", "prompt", "position"), np.full_like(after[:, :, -1], 1 / 1.1)),
        },
        {
            "prompt": range(n_prompts),
            "position": [1, 3, 5, 7, 9],
            "scale": list(SCALES),
            "layer": ("fed", list(layers)),
            "head": ("fed", list(heads)),
            "rank": ("fed", range(1, n_fed + 1)),
        },
        {"vectors": list(VECTORS), "n_layers": n_layers},
    )


def cosines_of(layers, heads_sum):
    return xr.Dataset(
        {
            "layers": (("layer", "other_layer", "prompt"), layers),
            "heads_sum": (("shard", "any_head", "other_head"), heads_sum),
        }
    )


def some_cosines(n_layers, n_prompts=6):
    rng = np.random.default_rng(2)
    layers = rng.normal(size=(n_layers, n_layers, n_prompts))
    return cosines_of(layers + layers.swapaxes(0, 1), rng.normal(size=(3, 2 * n_layers, 2 * n_layers)))


def some_alignment(n_layers, n_prompts=6):
    rng = np.random.default_rng(3)
    gradient, final = (rng.normal(size=(n_layers, n_prompts)) for _ in range(2))
    return xr.Dataset(
        {
            "gradient": (("layer", "prompt"), gradient),
            "final": (("layer", "prompt"), final),
            "loss": (("layer_after", "prompt"), rng.uniform(2, 9, size=(n_layers + 1, n_prompts))),
        }
    )


def changes_of(ablated_heads, earlier, ablated, counts):
    return xr.Dataset(
        {
            "ablated_head": ("later_layer", ablated_heads),
            "earlier": (("later_layer", "head", "prompt"), earlier),
            "ablated": (("later_layer", "head", "prompt"), ablated),
            "count": (("later_layer", "prompt"), counts),
        }
    )
