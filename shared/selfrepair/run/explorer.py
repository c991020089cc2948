"""The explorer of the results page: direct effect against self-repair of every head, drawn by Vega-Lite.

The page holds all that it needs: data, charts (made with Altair), and Vega's own script. That script
evaluates no text (``ast``), so that the page's policy needs no ``unsafe-eval``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from selfrepair.plots.style import looks

SCRIPT = Path(__file__).with_name("explorer.js")
#: Left by a run: tokens of every head in context, by model and head, as :func:`head_tokens` gives them.
TOKENS = "head_tokens.json"
#: Vega's names of Matplotlib's markers.
SHAPES = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "D": "diamond",
    "P": "cross",
}
#: What the explorer has of each head → the column of a heads table.
NUMBERS = {
    "direct_effect": "direct_effect",
    "logit_change": "logit_change",
    "self_repair": "self_repair",
    "low": "self_repair_low",
    "high": "self_repair_high",
    "layernorm": "self_repair_layernorm",
    "heads": "self_repair_heads",
    "mlps": "self_repair_mlps",
}


@dataclass(frozen=True)
class Explorer:
    """What the page needs: names to choose from, JSON of data and charts, and two scripts."""

    kinds: list[str]
    models: list[str]
    data: Markup
    charts: Markup
    library: Markup
    script: Markup


def explorer(tables: Mapping[str, pd.DataFrame], tokens: Mapping[str, Any]) -> Explorer:
    """Of heads tables by kind of ablation, and of what :data:`TOKENS` holds (empty if there is none)."""
    heads = [head for kind, table in tables.items() for head in _heads(kind, table)]
    models = list(dict.fromkeys(head["model"] for head in heads))
    data = {"heads": heads, "tokens": tokens.get("models"), "tokensOf": tokens.get("ablation")}
    charts = [scatter(heads, next(iter(tables))), _split()]
    return Explorer(
        list(tables),
        models,
        _json(data),
        _json(charts),
        _library(),
        Markup(SCRIPT.read_text(encoding="utf-8")),
    )


def scatter(heads: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The chart of all heads as Vega-Lite; its signals ``kind``, ``only`` (a model) and ``picked`` choose."""
    import altair as alt

    models = list(dict.fromkeys(head["model"] for head in heads))
    styles = looks(models).values()
    colour = alt.Scale(domain=models, range=[colour for colour, _ in styles])
    shape = alt.Scale(domain=models, range=[SHAPES.get(marker, "cross") for _, marker in styles])
    names = [
        alt.param(name=name, value=value) for name, value in (("kind", kind), ("only", ""), ("picked", ""))
    ]
    is_picked = "datum.id === picked"
    tooltip = [
        *(alt.Tooltip(f"{name}:N") for name in ("model", "layer", "head", "ablation")),
        alt.Tooltip("direct_effect:Q", title="direct effect", format=".3f"),
        alt.Tooltip("logit_change:Q", title="logit change", format=".3f"),
        alt.Tooltip("self_repair:Q", title="self-repair", format=".3f"),
        *(alt.Tooltip(f"{end}:Q", title=f"95% interval, {end}", format=".3f") for end in ("low", "high")),
    ]
    points = (
        alt.Chart(alt.Data(values=heads))
        .transform_filter("datum.ablation === kind && (only === '' || datum.model === only)")
        .mark_point(filled=True, cursor="pointer")
        .encode(
            x=alt.X("direct_effect:Q", title="mean direct effect (logits)"),
            y=alt.Y("self_repair:Q", title="mean self-repair (logits)"),
            color=alt.Color("model:N", scale=colour, legend=alt.Legend(title=None)),
            shape=alt.Shape("model:N", scale=shape),
            size=alt.condition(is_picked, alt.value(260), alt.value(60)),
            opacity=alt.condition(is_picked, alt.value(1), alt.value(0.65)),
            stroke=alt.condition(is_picked, alt.value("black"), alt.value("transparent")),
            tooltip=tooltip,
        )
        .add_params(*names)
    )
    zero = alt.Chart(alt.Data(values=[{"zero": 0}]))
    lines = [zero.mark_rule(color="#999").encode(**{axis: alt.datum(0)}) for axis in ("x", "y")]
    chart = alt.layer(*lines, points).properties(height=380, **_as_wide_as_the_page())
    return chart.configure_legend(orient="bottom", columns=2, labelLimit=200).to_dict()


def _split() -> dict[str, Any]:
    """What parts a head's self-repair is made of, as Vega-Lite; the page fills its data set ``split``."""
    import altair as alt

    parts = ["final norm", "other heads", "MLPs"]
    bars = (
        alt.Chart(alt.Data(name="split", values=[{"part": part, "value": 0} for part in parts]))
        .mark_bar(color="#0173b2")
        .encode(
            x=alt.X("value:Q", title="self-repair (logits)"),
            y=alt.Y("part:N", title=None, sort=parts),
            tooltip=[alt.Tooltip("part:N"), alt.Tooltip("value:Q", format=".3f")],
        )
    )
    return bars.properties(height=90, **_as_wide_as_the_page()).to_dict()


def _as_wide_as_the_page() -> dict[str, Any]:
    import altair as alt

    autosize = alt.AutoSizeParams(type="fit-x", contains="padding")
    return {"width": "container", "autosize": autosize, "background": "white"}


def _heads(kind: str, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a heads table as JSON; ``id`` is the same for a head under every kind of ablation."""
    found = []
    for row in table.to_dict("records"):
        place = {
            "ablation": kind,
            "model": row["model"],
            "layer": int(row["layer"]),
            "head": int(row["head"]),
        }
        numbers = {name: _number(row.get(column, np.nan)) for name, column in NUMBERS.items()}
        found.append({"id": f"{row['model']} L{place['layer']}H{place['head']}", **place, **numbers})
    return found


def _number(value: float) -> float | None:
    return round(float(value), 4) + 0.0 if np.isfinite(value) else None


def _json(content: object) -> Markup:
    """JSON as it may stand in a script element, whatever the texts in it."""
    return Markup(json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


@cache
def _library() -> Markup:
    import vl_convert

    library: Any = vl_convert  # its stub asks for a snippet that it does not need
    return Markup(library.javascript_bundle())
