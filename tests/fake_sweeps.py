"""Made-up sweeps of heads, and plain numbers of their tokens."""

import math
import statistics

import numpy as np
import xarray as xr
from tasks import OF_HEADS

LAYERS, HEADS, PROMPTS, POSITIONS = 4, 2, 6, 25
FRACTION = 0.1


def fake_sweep(seed=0, architecture="gpt2", ablation="resample"):
    rng = np.random.default_rng(seed)
    data = {
        name: (("layer", "head", "prompt", "position"), rng.normal(size=(LAYERS, HEADS, PROMPTS, POSITIONS)))
        for name in OF_HEADS
    }
    data["sigma_ablated"][1][:] = 1 + 0.1 * data["sigma_ablated"][1]
    data["sigma_clean"] = (("prompt", "position"), 1 + 0.1 * rng.normal(size=(PROMPTS, POSITIONS)))
    return xr.Dataset(data, attrs={"model": "fake", "architecture": architecture, "ablation": ablation})


def tokens_of(dataset, layer, head, prompts=range(PROMPTS)):
    """Plain numbers of a head's top tokens; a prompt named twice gives its tokens twice."""
    rows = []
    for prompt in range(PROMPTS):
        for position in range(POSITIONS):
            row = {name: float(dataset[name][layer, head, prompt, position]) for name in OF_HEADS}
            row |= {"prompt": prompt, "sigma_clean": float(dataset["sigma_clean"][prompt, position])}
            repair = row["logit_change"] - (row["ablated_direct_effect"] - row["direct_effect"])
            row["heads"], row["mlps"] = row["self_repair_heads"], row["self_repair_mlps"]
            row["layernorm"] = repair - row["heads"] - row["mlps"]
            rows.append(row)
    rows.sort(key=lambda row: -row["direct_effect"])
    top = rows[: math.ceil(FRACTION * len(rows))]
    return [row for prompt in prompts for row in top if row["prompt"] == prompt]


def counted(rows, part):
    ratios = [row[part] / row["direct_effect"] for row in rows]
    return {
        "clipped": statistics.fmean(min(1, max(0, ratio)) for ratio in ratios),
        "unclipped mean": statistics.fmean(ratios),
        "median": statistics.median_low(ratios),
        "ratio of means": sum(row[part] for row in rows) / sum(row["direct_effect"] for row in rows),
    }


def floor(rows, part):
    """Every token once with each sign of what it repairs."""
    ratios = [sign * row[part] / row["direct_effect"] for row in rows for sign in (1, -1)]
    return statistics.fmean(min(1, max(0, ratio)) for ratio in ratios)


def without_repair(seed=0, ablation="resample", model="fake", prompts=12):
    """A sweep in which the final norm's part is noise; heads and MLPs do nothing.

    What it does on one half of the prompts it undoes on the other, whose direct effects are the same, so that
    it has no sign at all.
    """
    rng = np.random.default_rng(seed)
    half = (LAYERS, HEADS, prompts // 2, 40)

    def halves(values, sign=1):
        return np.concatenate([values, sign * values], axis=2)

    effect = halves(rng.lognormal(-1, 0.7, half))
    data = {name: np.zeros(effect.shape) for name in OF_HEADS}
    data |= {"direct_effect": effect, "logit_change": halves(rng.normal(0, 0.9, half), -1) - effect}
    data["sigma_ablated"] = 1 + 0.01 * halves(rng.normal(size=half), -1)
    sweep = {name: (("layer", "head", "prompt", "position"), values) for name, values in data.items()}
    sweep["sigma_clean"] = (("prompt", "position"), np.ones(effect.shape[2:]))
    return xr.Dataset(sweep, attrs={"model": model, "architecture": "gpt_neox", "ablation": ablation})
