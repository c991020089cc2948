"""What the claims about backup heads are about, and tables that sum models up (notebook 09)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.cosines import head_cosines
from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.head_growth import CONTROL, PairGrowth
from selfrepair.analysis.joint_ablation import JointCosts


def resemblances(
    growths: Mapping[str, PairGrowth], outputs: Mapping[str, xr.Dataset], patterns: Mapping[str, xr.Dataset]
) -> dict[str, dict[str, Estimate]]:
    """By model and id of ``statistics.yaml``: do backups write and attend as the head, are they shared?

    ``same-head`` beside them: how far a head's own growth repeats (no statistic of a claim).
    """
    found = {}
    for model, growth in growths.items():
        of_model: dict[str, Estimate] = {}
        attended = patterns[model]["heads"].mean("prompt").values
        for kind, cosine in (("output", head_cosines(outputs[model])), ("pattern", attended)):
            name = f"backups-{kind}-cosine"
            of_model[name], of_model[f"{name}-same-layer"] = growth.resemblance(cosine)
        of_model["same-backups"], of_model["same-head"] = growth.shared()
        of_model["same-backups-control-tokens"], _ = growth.shared(CONTROL)
        found[model] = of_model
    return found


def who_repairs_statistics(
    growths: Mapping[str, PairGrowth],
    costs: Mapping[str, JointCosts],
    alike: Mapping[str, Mapping[str, Estimate]],
) -> dict[str, dict[str, Estimate]]:
    """By model, then by ids of ``statistics.yaml``; ``alike`` is what :func:`resemblances` gives."""
    return {
        model: {
            "growth-of-strongest-tenth": growth.share_of_strongest(),
            "growth-of-strongest-tenth-gaussian": growth.share_if_gaussian(),
        }
        | costs[model].statistics()
        | {name: estimate for name, estimate in alike[model].items() if name != "same-head"}
        for model, growth in growths.items()
    }


def counted_pairs(growths: Mapping[str, PairGrowth], pairs: pd.DataFrame) -> pd.DataFrame:
    """How many pairs surely grow or shrink, on top tokens and on control tokens; ``pairs`` has all of them.

    Surely: the 95% interval lies above or below 0, which chance alone does on 2.5% of the pairs each. Beside
    them what the strongest tenth carries of the positive growth, what it would carry by
    :meth:`PairGrowth.share_if_gaussian`, how far apart the two are (``beyond Gaussian``, ``beyond low``,
    ``beyond high``), and what all pairs together do; of ``ablated heads``, how many have half of the positive
    growth (``heads for half``).
    """
    rows = []
    for model, growth in growths.items():
        here = pairs[pairs["model"] == model]
        share, gaussian, net = growth.share_of_strongest(), growth.share_if_gaussian(), growth.net()
        row = {"model": model, "pairs": len(here), "strongest tenth carries": float(share.value)}
        row |= {"low": float(share.interval().low), "high": float(share.interval().high)}
        row["if Gaussian"] = float(gaussian.value)
        beyond = share - gaussian
        row["beyond Gaussian"] = float(beyond.value)
        row |= {"beyond low": float(beyond.interval().low), "beyond high": float(beyond.interval().high)}
        row["all pairs together"] = float(net.value)
        row["ablated heads"] = len(np.unique(growth.ablated))
        row["heads for half"] = growth.heads_for_half()
        for prefix, tokens in (("", "top tokens"), ("control_", "control tokens")):
            row[f"grow, {tokens}"] = float((here[f"{prefix}low"] > 0).mean())
            row[f"shrink, {tokens}"] = float((here[f"{prefix}high"] < 0).mean())
        rows.append(row)
    return pd.DataFrame(rows)


def resemblance_gains(alike: Mapping[str, Mapping[str, Estimate]]) -> pd.DataFrame:
    """How much more alike backups are than the other heads of their layer, by model and kind (``output``,
    ``pattern``).

    ``cosine`` of backups, ``gain`` over the control, ``low, high``: 95% interval of the gain, which says only
    which pairs grow most. ``alike`` is what :func:`resemblances` gives.
    """
    rows = {}
    for model, of_model in alike.items():
        for kind in ("output", "pattern"):
            cosine = of_model[f"backups-{kind}-cosine"]
            gain = cosine - of_model[f"backups-{kind}-cosine-same-layer"]
            row = {"cosine": float(cosine.value), "gain": float(gain.value)}
            rows[model, kind] = row | gain.interval()._asdict()
    return pd.DataFrame.from_dict(rows, orient="index")


def erasers_table(growths: Mapping[str, PairGrowth]) -> pd.DataFrame:
    """:meth:`PairGrowth.by_erasers` of every model, with its 95% interval."""
    rows = []
    for model, growth in growths.items():
        share, of_all = growth.by_erasers()
        row = {"model": model, "of the growth": float(share.value)}
        row |= {"low": float(share.interval().low), "high": float(share.interval().high)}
        rows.append(row | {"of all pairs": of_all})
    return pd.DataFrame(rows)
