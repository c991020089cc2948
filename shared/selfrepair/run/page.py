"""One self-contained HTML page of a results folder: claims, figures, tables of heads, what made them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd

from selfrepair.analysis.claims import LEGEND, ClaimResult, join_claims, read_claims, results
from selfrepair.analysis.comparison import report
from selfrepair.analysis.rules import VERDICTS
from selfrepair.engine.ablations import ABLATIONS
from selfrepair.errors import UserError
from selfrepair.plots import forest
from selfrepair.run.explorer import TOKENS, explorer
from selfrepair.run.page_figures import figure, sections, with_emphasis
from selfrepair.store.files import unreadable, write_atomically

if TYPE_CHECKING:
    from selfrepair.run.profiles import Profile

TEMPLATE = Path(__file__).with_name("page.html")

#: Verdict → how it is marked.
MARKS = dict(zip(VERDICTS, ("yes", "partly", "undecided", "no", "untested"), strict=True))

#: Columns of a heads table that a reader looks at first → their headings. Others follow under their own
#: names.
HEADINGS = {
    "self_repair": "self-repair, logits [95% interval]",
    "direct_effect": "direct effect, logits",
    "logit_change": "logit change, logits",
    "self_repair_layernorm": "by the final norm, logits",
    "self_repair_heads": "by other heads, logits",
    "self_repair_mlps": "by MLPs, logits",
    "clipped_share_layernorm": "clipped share, final norm",
    "clipped_floor_layernorm": "its floor (random signs), final norm",
    "clipped_share_heads": "clipped share, heads",
    "clipped_floor_heads": "its floor (random signs), heads",
    "clipped_share_mlps": "clipped share, MLPs",
    "clipped_floor_mlps": "its floor (random signs), MLPs",
    "share_of_means_layernorm": "ratio of means, final norm",
    "share_of_means_heads": "ratio of means, heads",
    "share_of_means_mlps": "ratio of means, MLPs",
    "ablated_direct_effect": "direct effect after ablation, logits",
    "n_tokens": "tokens",
}


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; columns (heading → whether its cells are numbers) can be sorted."""

    caption: str
    columns: dict[str, bool]
    rows: list[list[str]]


#: What a run's manifest says of every store and file; a page of the repository leaves it out.
LONG = ("stores", "files", "outside_the_plan")


def write_page(out_dir: Path, target: Path | None = None) -> Path:
    """Writes the page of a results folder, as ``index.html`` in it.

    What is not there is left out, and what the folder's manifest says to be outside the run's plan. In
    another place (``target``) the page is one of the repository, and small: it links the notebooks there, not
    those of the run as HTML, and the figures beside it instead of holding them; it has tables of heads of the
    first kind of ablation alone, and no explorer.

    Raises:
        UserError: nothing to show, or a file that cannot be read.
    """
    manifest = _read_json(out_dir / "manifest.json")
    outside = {out_dir / str(name) for name in manifest.get("outside_the_plan", [])}
    paths = sorted({*(out_dir / "figures").glob("*.png")} - outside)
    with ThreadPoolExecutor() as pool:
        figures = list(pool.map(partial(figure, held=target is None), paths))
    table = read_claims(file) if (file := out_dir / "figures" / "claims.csv").is_file() else None
    claims = [] if table is None else results(table)
    heads = _heads({*out_dir.glob("heads_*.csv")} - outside)
    if not (figures or claims or heads):
        raise UserError(
            f"{out_dir}: holds no figures, claims or tables of heads; run a profile into it first"
        )
    verdicts = Counter(claim.verdict for claim in claims)
    page = {
        "name": out_dir.resolve().name,
        "claims": claims,
        "forest": None if table is None else _forest(table, claims),
        "legend": with_emphasis(LEGEND),
        "tally": {verdict: verdicts[verdict] for verdict in VERDICTS if verdicts[verdict]},
        "sections": sections(figures, out_dir, target),
        "comparison": _comparison(out_dir / "comparison.csv"),
        "models": _tables(heads if target is None else dict([*heads.items()][:1])),
        "kinds": list(heads),
        "explorer": explorer(heads, _read_json(out_dir / TOKENS)) if heads and target is None else None,
        "manifest": {name: value for name, value in manifest.items() if target is None or name not in LONG},
        "images": "data:" if target is None else "'self' file: data:",
    }
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(csp_hash=_csp_hash, mark=MARKS.get, rank=list(VERDICTS).index)
    target = out_dir / "index.html" if target is None else target
    write_atomically(
        target, environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page).encode()
    )
    return target


def make_tables(profile: Profile, notebooks: Iterable[str], out: Path) -> str:
    """Writes what follows from what the notebooks left: all claims in one, and the comparison with released
    numbers, which it returns in words.

    Raises:
        UserError: a table cannot be read, or is of other models than the released numbers of their names.
    """
    of_notebooks = (out / "claims" / f"{stem[:2]}.csv" for stem in sorted(notebooks))
    if parts := [part for part in of_notebooks if part.is_file()]:
        join_claims(parts, out)
    return report(
        out,
        ablations=profile.ablations,
        fraction=profile.fraction,
        amount=profile.amount,
        dataset=profile.dataset,
    )


def _csp_hash(source: str) -> str:
    """What a Content-Security-Policy allows an inline script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _forest(table: pd.DataFrame, claims: list[ClaimResult]) -> dict[str, object]:
    """A forest plot of the long table of claims: its legend, and a strip for each claim that has a number."""
    models = forest.models_of(table)
    strips = [
        (found, forest.strip(found.claim, table[table["claim"] == found.claim.id], models))
        for found in claims
    ]
    return {"legend": forest.legend(models), "strips": [(found, strip) for found, strip in strips if strip]}


def _heads(files: Collection[Path]) -> dict[str, pd.DataFrame]:
    """Kind of ablation → its table of heads."""
    paths = {path.stem.removeprefix("heads_"): path for path in sorted(files)}
    kinds = (*(kind for kind in ABLATIONS if kind in paths), *sorted(paths.keys() - set(ABLATIONS)))
    return {kind: _read(paths[kind], ("model", "layer", "head"), dtype={"model": str}) for kind in kinds}


def _tables(heads: dict[str, pd.DataFrame]) -> dict[str, list[Table]]:
    """Model → its tables of heads, one per kind of ablation."""
    models: dict[str, list[Table]] = {}
    for kind, table in heads.items():
        for model, of_model in table.groupby("model", sort=False):
            models.setdefault(model, []).append(_table(f"{kind} ablation", _shown(of_model)))
    return models


def _shown(heads: pd.DataFrame) -> pd.DataFrame:
    """A heads table as a reader sees it: named heads, intervals beside their values."""
    intervals = {
        name.removesuffix("_low"): (name, f"{name.removesuffix('_low')}_high")
        for name in heads
        if name.endswith("_low")
    }
    hidden = {"model", "layer", "head", *(end for ends in intervals.values() for end in ends)}
    shown = {"head": [f"L{layer}H{head}" for layer, head in zip(heads["layer"], heads["head"], strict=True)]}
    for name in [
        *(name for name in HEADINGS if name in heads),
        *(name for name in heads if name not in HEADINGS),
    ]:
        if name in hidden:
            continue
        values = heads[name].map(_text)
        if name in intervals:
            low, high = (heads[end].map(_text) for end in intervals[name])
            values = values + " [" + low + ", " + high + "]"
        shown[HEADINGS.get(name, name.replace("_", " "))] = list(values)
    return pd.DataFrame(shown)


def _comparison(path: Path) -> Table | None:
    if not path.is_file():
        return None
    comparison = _read(path, ("model", "quantity"), dtype={"model": str})
    return _table(
        "Heads measured here against the published ones",
        comparison.rename(columns=lambda name: name.replace("_", " ")),
    )


def _table(caption: str, frame: pd.DataFrame) -> Table:
    texts = {"head", "model", "quantity", "unit"}
    return Table(
        caption,
        {name: name not in texts for name in frame},
        [[_text(value) for value in row] for row in frame.itertuples(index=False)],
    )


def _text(value: object) -> str:
    """A cell's text; numbers to three places, a dash where there is none."""
    if pd.isna(value):
        return "–"
    return f"{round(value, 3) + 0.0:.3f}" if isinstance(value, float) else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("no object")
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(path, error) from error
    return content


def _read(path: Path, needed: tuple[str, ...], dtype: object) -> pd.DataFrame:
    """A CSV file; only empty cells are missing values, so that a model may be called "NA"."""
    try:
        table = pd.read_csv(path, dtype=dtype, keep_default_na=False, na_values=[""])
        table[list(needed)]
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(path, error) from error
    return table
