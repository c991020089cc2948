"""Our per-head tables beside the authors' released ones: how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from selfrepair.analysis.published import HUB_IDS, TOKENS_OF_FRACTION, published_heads, published_name
from selfrepair.errors import UserError
from selfrepair.statistics import PARTS
from selfrepair.store.files import write_atomically

#: Columns of a heads table → unit.
QUANTITIES = {
    **dict.fromkeys(("direct_effect", "logit_change", "ablated_direct_effect", "self_repair"), "logits"),
    **{f"self_repair_{part}": "logits" for part in PARTS},
    **{f"clipped_share_{part}": "share of direct effect" for part in PARTS},
}

#: What a reader looks at first → its heading.
MAIN = {
    "direct_effect": "direct effect (logits)",
    "logit_change": "logit change (logits)",
    "self_repair": "self-repair (logits)",
    "clipped_share_layernorm": "clipped LayerNorm share",
}

COLUMNS = (
    "model",
    "quantity",
    "unit",
    "n_heads",
    "correlation",
    "mean_ours",
    "mean_published",
    "mean_difference",
    "mean_absolute_difference",
    "published_in_our_interval",
)


def compare_with_published(ours: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """One row per model and quantity: how two heads tables of it agree, head by head.

    ``correlation`` is Pearson's over the model's heads, NaN where a table has the same value for all;
    differences are ours − published. No interval over heads is given: they are all that the model has, not
    a sample of them. ``published_in_our_interval`` is the share of heads whose published value lies in our
    95% interval over prompts, NaN for quantities without one; were both tables of equally many prompts and
    differed in nothing but their draw, 0.83 could be expected of a normal mean (P(|Z| < 1.96 / √2)).
    Models that are not in ``published`` are left out.

    Raises:
        UserError: a model's heads are not those of the published model of its name.
    """
    rows = []
    for model, table in ours.groupby("model", sort=False):
        released = published[published["model"] == published_name(model)]
        if released.empty:
            continue
        mine, theirs = (heads.set_index(["layer", "head"]).sort_index() for heads in (table, released))
        if not mine.index.equals(theirs.index):
            raise UserError(
                f"{model}: {_size(mine)} were measured, but the released {published_name(model)} has "
                f"{_size(theirs)}: not the same model"
            )
        rows += [
            {
                "model": model,
                "quantity": quantity,
                "unit": unit,
                "n_heads": len(mine),
                **_agreement(mine, theirs, quantity),
            }
            for quantity, unit in QUANTITIES.items()
            if quantity in released
        ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _size(heads: pd.DataFrame) -> str:
    return f"{len(heads)} heads in {heads.index.unique('layer').size} layers"


def _agreement(ours: pd.DataFrame, published: pd.DataFrame, quantity: str) -> dict[str, float]:
    x, y = (table[quantity].to_numpy(np.float64) for table in (ours, published))
    inside = (
        (ours[f"{quantity}_low"] <= y) & (y <= ours[f"{quantity}_high"])
        if f"{quantity}_low" in ours
        else pd.Series([np.nan])
    )
    return {
        "correlation": np.nan if _is_constant(x) or _is_constant(y) else float(np.corrcoef(x, y)[0, 1]),
        "mean_ours": float(x.mean()),
        "mean_published": float(y.mean()),
        "mean_difference": float((x - y).mean()),
        "mean_absolute_difference": float(np.abs(x - y).mean()),
        "published_in_our_interval": float(inside.mean()),
    }


def _is_constant(values: Float[np.ndarray, " head"]) -> bool:
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def to_markdown(comparison: pd.DataFrame) -> str:
    """One row per model: correlation, mean difference and (published mean) of the main quantities."""
    shown = {
        quantity: heading for quantity, heading in MAIN.items() if quantity in set(comparison["quantity"])
    }
    headings = ["model", "heads", *shown.values()]
    lines = [headings, ["---"] * len(headings)]
    for model, rows in comparison.groupby("model", sort=False):
        by_quantity = rows.set_index("quantity")
        lines.append(
            [model, str(rows["n_heads"].iloc[0]), *(_cell(by_quantity.loc[quantity]) for quantity in shown)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _cell(row: pd.Series) -> str:
    correlation = "r undefined" if np.isnan(row.correlation) else f"r {row.correlation:.3f}"
    inside = (
        "" if np.isnan(row.published_in_our_interval) else f", {row.published_in_our_interval:.0%} inside"
    )
    return f"{correlation}, {row.mean_difference:+.3f} ({row.mean_published:.3f}){inside}"


def report(out_dir: Path, ablations: Sequence[str], fraction: float, amount: str, dataset: str | None) -> str:
    """What a run says of itself at its end: its ``heads_resample.csv`` against the released numbers.

    All quantities go to ``comparison.csv`` beside it. Where nothing can be compared, the line says why. The
    rest is what the run's profile says: kinds of ablation, share of tokens, and how much (``amount``, in
    words) of which dataset was measured; ``None`` is the held-out prose.

    Raises:
        UserError: as :func:`compare_with_published`.
    """
    target = out_dir / "comparison.csv"
    target.unlink(missing_ok=True)  # of an earlier run
    none = "No comparison with the released numbers: "
    if "resample" not in ablations:
        return f"{none}they are of resample ablation, this run is of {' and '.join(ablations)}."
    if fraction not in TOKENS_OF_FRACTION:
        return (
            f"{none}they are over the top 2% of tokens or all of them, "
            f"this run is over the top {100 * fraction:g}%."
        )
    if not (out_dir / "heads_resample.csv").is_file():
        return f"{none}notebook 01, which makes the table of heads, has not run."
    ours = pd.read_csv(out_dir / "heads_resample.csv", dtype={"model": str})
    comparison = compare_with_published(ours, published_heads(TOKENS_OF_FRACTION[fraction]))
    if comparison.empty:
        models = ", ".join(ours["model"].unique())
        return f"{none}they are of {', '.join(HUB_IDS.values())}, this run is of {models}."
    write_atomically(target, comparison.to_csv(index=False, float_format="%.6g").encode())
    others = sorted(set(ours["model"]) - set(comparison["model"]))
    tokens = "all tokens" if fraction == 1 else f"the top {100 * fraction:g}% of tokens by direct effect"
    source = "the held-out prose" if dataset is None else dataset
    return "\n".join(
        [
            f"Our heads ({amount} of {source}) against the released ones "
            "(at least 100,000 tokens of the Pile):",
            f"resample ablation, {tokens}; correlation r over heads, mean difference ours − released "
            "(released mean),",
            "and how many released values lie inside our 95% intervals over prompts: "
            "about 80% of them would, if as many",
            "prompts were measured and nothing but their draw differed.",
            "",
            to_markdown(comparison),
            "",
            *([f"No released numbers: {', '.join(others)}."] if others else []),
            f"All quantities: {target}",
        ]
    )
