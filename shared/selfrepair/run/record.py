"""The record of a finished run: its manifest, its page, and what it says at its end."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfrepair.analysis.claims import read_claims, verdicts
from selfrepair.analysis.rules import VERDICTS
from selfrepair.errors import UserError
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.run.head_tokens import write_head_tokens
from selfrepair.run.marks import OF_A_STORE, OF_THE_RUN, RESULTS, mark, passed_over, said_of, say_done
from selfrepair.run.notebook_page import write_notebook_pages
from selfrepair.run.notebooks import all_notebooks
from selfrepair.run.page import make_tables, write_page
from selfrepair.run.study import Study, model_slug, with_needs
from selfrepair.store.files import hash_file, hash_files
from selfrepair.store.manifest import add_to_manifest, manifest_of, read_manifest, write_manifest
from selfrepair.text.corpora import hash_documents, read_documents


def summarise(study: Study, notebooks: Mapping[str, str], key: str = "") -> str:
    """Writes the manifest of a finished run, its pages and their mark, under the plan's ``key``.

    The pages are ``index.html`` and, of each notebook, ``notebooks/NN_….html``.

    ``notebooks`` are the keys of what the notebooks show, which the manifest names. So it does what lies in
    the folder but is not in the run's plan, from an earlier run of other settings for instance: page and
    ``verify`` leave that out.

    Returns what to print: the comparison, what was found, the page's path, and what to do next.

    Raises:
        UserError: the folder does not hold all of this very run, the run left nothing to show, or is of other
        models than the released numbers of their names.
    """
    out = study.out_dir
    _refuse_another_run(study, notebooks)
    if not any((out / "figures").glob("*.png")):
        raise UserError(f"{out}: holds no figures; run its profile again")
    profile = study.profile
    said = make_tables(profile, notebooks, out)
    write_notebook_pages(out)
    write_head_tokens(study, out)
    stores = _stores_of(study)
    files = set(_files_of(study))
    own = {f"measured/{note['store']}" for note in stores.values()}
    found = {f"measured/{store.name}" for store in (out / "measured").glob("*.zarr")}
    outside = [*sorted(hash_files(out, RESULTS).keys() - files), *sorted(found - own)]
    made_from = {
        "profile": profile.name,
        "settings": dataclasses.asdict(profile),
        "seed": study.seed,
        "held_out_text_sha256": hash_documents(read_documents(HELD_OUT_TEXT)),
        "notebooks": dict(notebooks),
        "stores": stores,
        "outside_the_plan": outside,
    }
    manifest = out / "manifest.json"
    seconds = sum(float(note["seconds"]) for note in stores.values())
    write_manifest(manifest, seconds, **made_from)  # the page shows it
    page = write_page(out)
    left = {name: digest for name, digest in hash_files(out, RESULTS).items() if name in files}
    add_to_manifest(manifest, files=left)
    measured = [out / "measured" / str(note["store"]) for note in stores.values()]
    all_left: list[Path] = [manifest, *(out / name for name in left), *measured, *map(manifest_of, measured)]
    say_done(mark(out, "page"), all_left, out, key=key)
    return f"{said}\n{_found(out)}page: {page}\nnext: {NEXT}"


#: What a reader may do after a run.
NEXT = "open the page; ./run_all.sh --lab to change a parameter; README.md says how to measure another model"


def _found(out: Path) -> str:
    """How often each verdict was given, as a line; nothing if no notebook judged a claim."""
    claims = out / "figures" / "claims.csv"
    if not claims.is_file():
        return ""
    given = Counter(verdicts(read_claims(claims)).values())
    counts = ", ".join(f"{given[name]} {name}" for name in VERDICTS if given[name])
    return f"found: of {given.total()} claims, {counts}\n"


def _refuse_another_run(study: Study, notebooks: Mapping[str, str]) -> None:
    """Refuses a folder that holds another run, or not all of this one."""
    out = study.out_dir
    for stem, key in notebooks.items():
        if (said_of(mark(out, "notebooks", stem[:2]), out) or {}).get("key") != key:
            raise UserError(
                f"{out}: holds no finished run of {study.profile.name} as it is now ({stem} is missing, "
                f"or of other settings, code or data); run it first"
            )
    for model_name in study.profile.models:
        passed = set(passed_over(out, model_slug(model_name)))
        for task in study.tasks(model_name):
            if not task.path.is_dir() and task.label not in passed:
                raise UserError(f"{task.path}: is missing; measure {model_name} again first")


def _files_of(study: Study) -> list[str]:
    """Every file that the run's plan may leave, by its path in the folder."""
    books = all_notebooks()
    of_books = [file for book in books for file in book.files(study)]
    return [*OF_THE_RUN, *of_books, *(f"notebooks/{book.stem}.html" for book in books)]


def _stores_of(study: Study) -> dict[str, dict[str, Any]]:
    """Of each store that the run's plan names, by model and label: its name, and what its manifest says."""
    found: dict[str, dict[str, Any]] = {}
    for model_name in study.profile.models:
        for task in with_needs(list(study.tasks(model_name))):
            if task.path.is_dir():
                note = read_manifest(manifest_of(task.path))
                if not {"seconds", "finished", "model", "sha256"} <= note.keys():
                    raise UserError(
                        f"{manifest_of(task.path)}: not a store's manifest; delete it and the store, "
                        f"and run again"
                    )
                repeated = {key: note[key] for key in OF_A_STORE if key in note}
                found[f"{model_name} {task.label}"] = {
                    "store": task.path.name,
                    **repeated,
                    "manifest_sha256": hash_file(manifest_of(task.path)),
                }
    return found
