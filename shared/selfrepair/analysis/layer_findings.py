"""What notebook 06 counts in its tables of layers: where an observation holds, and how often.

Arguments are tables of :mod:`selfrepair.analysis.layers`, by the names of the functions that give them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from selfrepair.analysis.estimates import ABOVE, BELOW, OPEN, sides_of

#: Logits by which a late MLP may differ and still does what it did before. Chosen after looking.
AS_BEFORE = 0.02


def sides(larger: pd.DataFrame) -> pd.Series:
    """On which side of one half ``unembedding_larger`` lies: ``more`` or ``less`` if its whole interval does.

    ``either`` if the interval has one half in it. Indexed by ``condition, model``, in order.
    """
    side = sides_of(larger, 0.5).map({ABOVE: "more", BELOW: "less", OPEN: "either"})
    return side.set_axis(pd.MultiIndex.from_frame(larger[["condition", "model"]])).rename("side")


def where_means_agree(larger: pd.DataFrame, balance: pd.DataFrame) -> pd.DataFrame:
    """Where ``unembedding_larger`` says *more*: do the means of ``balance`` say it, and what makes them?

    Rows by ``condition, model``. ``in means``: the unembedding-based effect is above the ablation-based one
    in the means, too. ``mean part``, ``later layers`` (attention and MLPs together) and ``final norm``
    (logits) sum to how much it is above.
    """
    side = sides(larger)
    rows = balance.set_index(["condition", "model"]).loc[side.index[side == "more"]]
    parts = {
        "mean part": rows["mean part"],
        "later layers": rows["by attention"] + rows["by MLPs"],
        "final norm": rows["by the final norm"],
    }
    above = rows["unembedding-based"] > rows["ablation-based"]
    return pd.DataFrame({"in means": above, **parts})


def clear_slopes(best: pd.DataFrame) -> pd.DataFrame:
    """Of ``best_layers``: how many slopes lie clearly above 0, by ``condition`` and ``part``.

    ``layers`` in all, ``clear``: the interval of the slope lies above 0; ``largest R²`` of those that are,
    NaN without any.
    """
    about = ["condition", "model", "ablated"]
    table = best.pivot(index=about, columns="quantity", values=["estimate", "low"])
    is_clear = table["low", "slope"] > 0
    part = table.index.get_level_values("ablated").str.split().str[0]
    rows = pd.DataFrame(
        {
            "condition": table.index.get_level_values("condition"),
            "part": part,
            "layers": 1,
            "clear": is_clear.to_numpy().astype(int),
            "largest R²": table["estimate", "R²"].where(is_clear).to_numpy(dtype=float),
        }
    )
    found = rows.groupby(["condition", "part"], sort=False)
    return found.agg({"layers": "sum", "clear": "sum", "largest R²": "max"})


def phrasings_apart(phrasings: pd.DataFrame) -> pd.DataFrame:
    """Of ``by_phrasing`` of several models: how far compensation over direct effect differs by phrasing.

    By model: ``apart``, the largest ratio less the smallest; ``overlap``: all intervals share a value.
    """
    by_model = phrasings.groupby("model", sort=False)
    ratio = by_model["compensation over direct effect"]
    overlap = by_model["low"].max() <= by_model["high"].min()
    return pd.DataFrame({"apart": ratio.max() - ratio.min(), "overlap": overlap})


def late_mlp_changes(late: pd.DataFrame) -> pd.DataFrame:
    """Of ``late_mlps``: what each does to the token, and what becomes of it with attention ablated.

    ``condition, model, layer``; ``lowers`` (its raw effect is below 0); ``changes``: ``more`` if its effect
    is higher by more than :data:`AS_BEFORE` once attention is ablated, ``less`` if lower by more, else ``as
    before``, also where nothing is ablated; ``turns``: it raised the token, and then lowers it.
    """
    change = late["ablated"] - late["raw"]
    changes = np.select([change > AS_BEFORE, change < -AS_BEFORE], ["more", "less"], "as before")
    lowers = late["raw"] < 0
    return late[["condition", "model", "layer"]].assign(
        lowers=lowers, changes=changes, turns=~lowers & (late["ablated"] < 0)
    )
