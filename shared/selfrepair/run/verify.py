"""Checking a results folder: is everything what the run left, and would the same come out again?"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import numpy as np
import pandas as pd
from markupsafe import escape

from selfrepair.analysis.claims import read_claims, to_markdown
from selfrepair.analysis.head_table import heads_of_models, write_heads
from selfrepair.errors import UserError
from selfrepair.measure.task import Task
from selfrepair.models.checkpoints import short_name
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.run.consistency import (
    MANIFEST,
    PARTS,
    Finding,
    check_files,
    check_marks,
    check_stores,
    run_manifest,
)
from selfrepair.run.explorer import TOKENS
from selfrepair.run.head_tokens import write_head_tokens
from selfrepair.run.marks import OF_THE_RUN, passed_over
from selfrepair.run.notebook_page import write_notebook_pages
from selfrepair.run.notebooks import notebook_keys
from selfrepair.run.page import make_tables, write_page
from selfrepair.run.profiles import Profile
from selfrepair.run.recomputed import check_store, check_unfinished, compute_again, sample_of
from selfrepair.run.study import Study, model_slug, with_needs
from selfrepair.store.code_identity import code_version
from selfrepair.store.files import hash_file, write_atomically
from selfrepair.store.manifest import packages
from selfrepair.store.stores import attributes_of, open_store
from selfrepair.text.corpora import hash_documents, read_documents

#: Any of these makes a folder that of a run of the workflow: notebooks that are run by hand leave none.
LEFT_BY_A_RUN = ("done", MANIFEST, "index.html")
#: What such notebooks leave beside what they measure.
LEFT_BY_NOTEBOOKS = ("notebooks", "figures", "claims")
#: Largest difference between tables of heads, relative, that other processors may make: they hold six digits.
TOLERANCE = 1e-4
#: Parts of a page that no reader sees: libraries and pictures hold any short text, by chance.
NOT_SHOWN = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL)


def verify(folder: Path, device: str = "auto", seed: int | None = None) -> Iterator[Finding]:
    """Checks what a run left, and computes a sample of every measurement again.

    ``seed`` says which shards; without it they are others every time. A folder of stores alone, as
    ``selfrepair sweep`` leaves it, has no manifest of its own, nor has one that notebooks were run into by
    hand: what these show is not checked. Of what is unfinished, the shards that are there are.

    What follows from other results is made again: names of stores from their attributes, attributes from the
    run's settings, tables of heads from stores, the page from tables, figures and manifest, notebooks as
    HTML from notebooks. What does not (a figure, a notebook's output, a table that a notebook alone makes,
    the time and commit of a run) has a checksum in the manifest, as every store has, and the manifest one in
    ``done/page.done`` beside the page that shows it. So one change, or one with its checksum, is noticed.
    Who changes such a thing, and all checksums up to that mark, and the page, is not: nothing in the folder
    can tell. Nor is a shard that is changed like that, unless it is in the sample. Keep the manifest's
    checksum, the last that is said of the record, elsewhere to notice that too.

    Raises:
        UserError: nothing in the folder.
    """
    stores = sorted((folder / "measured").glob("*.zarr")) or sorted(folder.glob("*.zarr"))
    unfinished = [
        shards
        for place in (folder / "measured", folder)
        for shards in sorted(place.glob("*.shards"))
        if shards.with_suffix(".zarr") not in stores  # else left by a run that was killed just then
    ]
    is_of_a_run = any((folder / name).exists() for name in LEFT_BY_A_RUN)
    if not (stores or unfinished or is_of_a_run):
        raise UserError(
            f"{folder}: no measurements and no manifest.json, so nothing to verify; give the results "
            f"folder of a run"
        )
    if is_of_a_run:
        for finding in check_record(folder):
            if finding.agrees is None:  # of an earlier run
                stores = [store for store in stores if finding.what != f"measured/{store.name}"]
            yield finding
    elif shown := [name for name in LEFT_BY_NOTEBOOKS if (folder / name).exists()]:
        why = "made by hand, so no manifest of a run says what they should be; what was measured is checked"
        yield Finding(", ".join(shown), None, why)
    tasks: list[Task] = []
    for store in stores:
        finding, task = check_store(store)
        tasks += [] if task is None else [task]
        yield finding
    yield from map(check_unfinished, unfinished)
    made: set[str] = set()
    findings: list[Finding] = []
    for task, finding in compute_again(sample_of(tasks, random.Random(seed)), device):
        findings.append(finding)
        made |= set() if finding.agrees is None else {task.measurement.name}
        yield finding
    n_made = sum(finding.agrees is not None for finding in findings)
    n_shards = sum(len(task.shards) for task in tasks)
    yield Finding(
        "computed again",
        all(finding.agrees is not False for finding in findings) if n_made else None,
        f"{n_made} of {n_shards} shards, of {len(made)} measurements: {', '.join(sorted(made))}",
    )


def check_record(folder: Path) -> Iterator[Finding]:
    """Holds a run's manifest against its files, stores and marks, and makes again what follows from these."""
    try:
        noted = run_manifest(folder / MANIFEST)
    except UserError as error:
        yield Finding(MANIFEST, False, str(error))
        return
    outside = [str(name) for name in noted["outside_the_plan"]]
    yield from (Finding(name, None, "not in the run's plan: left out") for name in outside)
    yield from check_files(folder, noted["files"], outside)
    yield from check_marks(folder, noted)
    try:
        study = Study(Profile(**noted["settings"]), noted["seed"], "cpu", folder)
        planned = _planned(study)
        keys = notebook_keys(study)
    except UserError as error:
        yield Finding(MANIFEST, None, f"its plan cannot be made again: {error}")
        return
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        yield Finding(MANIFEST, False, f"its settings are not those of a run ({error})")
        return
    if study.profile.name != noted["profile"]:
        yield Finding(MANIFEST, False, f"is of {noted['profile']}, its settings of {study.profile.name}")
    if noted["held_out_text_sha256"] != hash_documents(read_documents(HELD_OUT_TEXT)):
        yield Finding(MANIFEST, False, "its held-out text is not the one that is here")
    passed = {name: set(passed_over(folder, model_slug(name))) for name in study.profile.models}
    yield from check_stores(
        folder, noted["stores"], outside, planned, planned.keys() - _planned(study, passed).keys()
    )
    now = {"library": code_version("selfrepair.cli.main"), "packages": packages(), "notebooks": keys}
    if other := [name for name, found in now.items() if noted[name] != found]:
        why = f"made by other {', '.join(other)}; check out commit {noted['commit']} to compare"
        yield Finding(MANIFEST, None, why)
    yield _check_shown(folder / "index.html", {name: noted[name] for name in PARTS if name != "files"})
    for finding in _check_what_follows(folder, noted, study, planned):
        yield Finding(finding.what, None, finding.detail) if other and not finding.agrees else finding
    digest = hash_file(folder / MANIFEST)
    yield Finding(MANIFEST, True, f"its sha256, to be compared with one kept elsewhere, is {digest}")


def _planned(study: Study, passed: Mapping[str, Collection[str]] | None = None) -> dict[str, Task]:
    """What a run measures, and all that this needs, by model and label; without what is passed over."""
    return {
        f"{name} {task.label}": task
        for name in study.profile.models
        for task in with_needs(
            [task for task in study.tasks(name) if task.label not in (passed or {}).get(name, ())]
        )
    }


def _check_what_follows(
    folder: Path, noted: Mapping[str, Any], study: Study, planned: Mapping[str, Task]
) -> Iterator[Finding]:
    """Makes tables of heads, claims in one, comparison and page again, of what they are made from."""
    with TemporaryDirectory() as scratch:
        again = Path(scratch) / folder.resolve().name  # the page is called as its folder
        pages = {name for name in noted["files"] if name.endswith(".html")}
        following = [*OF_THE_RUN, *sorted(pages - set(OF_THE_RUN))]
        for name in noted["files"].keys() - set(following):
            if (folder / name).is_file():
                (again / name).parent.mkdir(parents=True, exist_ok=True)
                (again / name).symlink_to((folder / name).resolve())
        content = {name: part for name, part in noted.items() if name != "files"}
        write_atomically(again / MANIFEST, json.dumps(content).encode())
        try:
            make_tables(study.profile, noted["notebooks"], again)
            write_notebook_pages(again)
            _write_head_tokens(folder, study, planned, again)
            write_page(again)
        except (UserError, ValueError, KeyError, TypeError) as error:
            yield Finding("index.html", False, f"cannot be made of the run's files ({error})")
        for name in following:
            same = _content(folder / name) == _content(again / name)
            follows = "follows from the run's other files"
            yield Finding(name, same, follows if same else f"is not what {follows}")
        yield from _check_heads(folder, study, planned, Path(scratch))
        yield from _check_shown_claims(folder, noted["notebooks"])


def _write_head_tokens(folder: Path, study: Study, planned: Mapping[str, Task], again: Path) -> None:
    """Made of the stores of heads again; where one of these is not whole, which is said already, as it is."""
    kind = study.profile.ablations[0]
    stores = [planned[f"{name} heads-{kind}"].path for name in study.profile.models]
    if None not in map(attributes_of, stores):
        write_head_tokens(study, again)
    elif (folder / TOKENS).is_file():
        (again / TOKENS).symlink_to((folder / TOKENS).resolve())


def _check_shown(page: Path, noted: Mapping[str, Any]) -> Finding:
    """The page shows every value of the manifest, whatever code made it."""
    text = NOT_SHOWN.sub("", page.read_text(encoding="utf-8", errors="replace")) if page.is_file() else ""
    hidden = [name for name, part in noted.items() if not all(value in text for value in _values(part))]
    said = f"does not show the manifest's {', '.join(hidden)}" if hidden else "shows what the manifest says"
    return Finding(page.name, not hidden, said)


def _values(part: object) -> Iterator[str]:
    """What a part of a manifest holds, as a page shows it."""
    if isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _values(inner)
    elif part is not None:
        yield str(escape(part))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _check_heads(folder: Path, study: Study, planned: Mapping[str, Task], scratch: Path) -> Iterator[Finding]:
    for kind in study.profile.ablations:
        kept = folder / f"heads_{kind}.csv"
        stores = {short_name(name): planned[f"{name} heads-{kind}"].path for name in study.profile.models}
        if not kept.is_file() or None in map(attributes_of, stores.values()):
            continue  # said already
        sweeps = {name: open_store(store) for name, store in stores.items()}
        write_heads(heads_of_models(sweeps, study.profile.fraction), kind, scratch)
        same = _are_alike(kept, scratch / kept.name)
        yield Finding(
            kept.name, same, "follows from the stores" if same else "is not what follows from the stores"
        )


def _are_alike(kept: Path, made: Path) -> bool:
    try:
        one, other = (pd.read_csv(path, dtype={"model": str}) for path in (kept, made))
        pd.testing.assert_frame_equal(one, other, rtol=TOLERANCE, atol=TOLERANCE * np.finfo(np.float32).eps)
    except (AssertionError, ValueError, KeyError):
        return False
    return True


def _check_shown_claims(folder: Path, notebooks: Mapping[str, Any]) -> Iterator[Finding]:
    """The executed notebook that made a table of claims shows it."""
    for stem in notebooks:
        table, notebook = folder / "claims" / f"{stem[:2]}.csv", folder / "notebooks" / f"{stem}.ipynb"
        if not (table.is_file() and notebook.is_file()):
            continue  # said already
        try:
            wanted = to_markdown(read_claims(table))
            cells = nbformat.read(notebook, as_version=4).cells
            shown = [
                output.get("data", {}).get("text/markdown", "")
                for cell in cells
                for output in cell.get("outputs", [])
            ]
        except Exception as error:  # nbformat raises many types for what is no notebook
            yield Finding(f"claims/{stem[:2]}.csv", False, f"it or its notebook cannot be read ({error})")
            continue
        same = any(wanted in text for text in shown)
        detail = "is shown in its notebook" if same else "is not what its notebook shows"
        yield Finding(f"claims/{stem[:2]}.csv", same, detail)
