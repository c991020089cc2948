"""Is a head's backup worth more once the head is gone? Costs of ablating two heads, alone and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair.analysis.estimates import Estimate, draws

#: What is counted, and the sign with which more of it is a cost.
QUANTITIES = {"loss": 1, "logit": -1}
UNITS = {"loss": "nats per token", "logit": "logits"}
#: The other head: the run with it alone, and with both.
OTHERS = {"backup": "both", "middling": "both with middling"}


@dataclass(frozen=True)
class JointCosts:
    """Mean costs over each head's top tokens, of runs against the clean one.

    ``heads``: names of the ablated head, the backup and the one of middling growth, a row for each head that
    is ablated; ``costs [run, trio]`` by quantity, samples draw prompts of odd number, ``n_prompts`` of them.
    """

    model: str
    heads: pd.DataFrame
    runs: Sequence[str]
    costs: dict[str, Estimate]
    n_prompts: int

    @classmethod
    def of(cls, joint: xr.Dataset, n_bootstrap: int = 1000) -> JointCosts:
        """Of what the measurement ``joint_ablation`` gives."""
        read = joint.isel(prompt=joint["prompt"].values % 2 == 1)
        weights = draws(read.sizes["prompt"], n_bootstrap).T
        count = Estimate(read["count"].transpose("trio", "prompt").values @ weights)
        costs = {}
        for quantity, sign in QUANTITIES.items():
            sums = read[quantity].transpose("run", "trio", "prompt").values.astype(np.float64)
            costs[quantity] = Estimate((sums - sums[:1]) @ weights) / count * float(sign)
        heads = {who: [f"L{layer}H{head}" for layer, head in joint[who].values] for who in ("head", *OTHERS)}
        model, runs = str(joint.attrs["model"]), list(joint.attrs["runs"])
        return cls(model, pd.DataFrame(heads), runs, costs, read.sizes["prompt"])

    def of_run(self, quantity: str, run: str) -> Estimate:
        """``[trio]``"""
        return self.costs[quantity][self.runs.index(run)]

    def sum_of_both(self, quantity: str, other: str) -> Estimate:
        """What the head and the other cost alone, added up: ``[trio]``."""
        return self.of_run(quantity, "head") + self.of_run(quantity, other)

    def together(self, quantity: str, other: str) -> Estimate:
        """What they cost when ablated together: ``[trio]``."""
        return self.of_run(quantity, OTHERS[other])

    def excess(self, quantity: str, other: str) -> Estimate:
        """Cost together less the sum: mean over the heads."""
        return (self.together(quantity, other) - self.sum_of_both(quantity, other)).nanmean()

    def alone(self, quantity: str, other: str) -> Estimate:
        """Cost of the other head alone: mean over the heads."""
        return self.of_run(quantity, other).nanmean()

    def excess_share(self, quantity: str, other: str) -> Estimate:
        """:meth:`excess` over :meth:`alone`: how much more the other costs once the first head is gone."""
        return self.excess(quantity, other) / self.alone(quantity, other)

    def statistics(self) -> dict[str, Estimate]:
        """By ids of ``statistics.yaml``."""
        found = {}
        for quantity in QUANTITIES:
            found[f"joint-{quantity}-excess"] = self.excess(quantity, "backup")
            found[f"joint-{quantity}-excess-middling"] = self.excess(quantity, "middling")
        return found

    def table(self, quantity: str) -> pd.DataFrame:
        """A row for each head and other head: costs alone, their sum, together, and the excess."""
        rows = []
        for other in OTHERS:
            together, alone = self.together(quantity, other), self.sum_of_both(quantity, other)
            excess = together - alone
            rows.append(
                pd.DataFrame(
                    {
                        "model": self.model,
                        "head": self.heads["head"],
                        "with": self.heads[other],
                        "kind": other,
                        "head alone": self.of_run(quantity, "head").value,
                        "other alone": self.of_run(quantity, other).value,
                        "sum": alone.value,
                        "together": together.value,
                        "excess": excess.value,
                        "low": excess.interval().low,
                        "high": excess.interval().high,
                    }
                )
            )
        return pd.concat(rows, ignore_index=True)


def excess_table(found: Sequence[JointCosts], quantity: str) -> pd.DataFrame:
    """Mean excess of every model, with its 95% interval: with the backup, and with the middling head.

    ``other alone`` is what the other head costs alone, ``of that`` the excess as a share of it.
    """
    tables = []
    for one in found:
        for other in OTHERS:
            alone, share = one.alone(quantity, other).value, one.excess_share(quantity, other).value
            table = one.excess(quantity, other).table({}, model=one.model, **{"with": other})
            tables.append(table.assign(**{"other alone": alone, "of that": share}))
    return pd.concat(tables, ignore_index=True).rename(columns={"estimate": "excess"})


def beyond_control(found: Sequence[JointCosts], quantity: str) -> pd.DataFrame:
    """By model (index): how much more of everything backups have than the middling heads.

    ``excess, low, high``: the difference of the excesses; ``share, share_low, share_high``: that of the
    excesses as shares of what the other head costs alone, both with 95% intervals; ``times_alone``: how many
    times as much the backup costs alone.
    """
    rows = {}
    for one in found:
        excess = one.excess(quantity, "backup") - one.excess(quantity, "middling")
        share = one.excess_share(quantity, "backup") - one.excess_share(quantity, "middling")
        rows[one.model] = {
            **dict(zip(("excess", "low", "high"), (excess.value, *excess.interval()), strict=True)),
            **dict(zip(("share", "share_low", "share_high"), (share.value, *share.interval()), strict=True)),
            "times_alone": (one.alone(quantity, "backup") / one.alone(quantity, "middling")).value,
        }
    return pd.DataFrame.from_dict(rows, orient="index")
