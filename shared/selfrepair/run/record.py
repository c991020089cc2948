"""The record of a finished run: its manifest, its page, and what it says at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from selfrepair.analysis.comparison import report
from selfrepair.errors import UserError
from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.run.marks import RESULTS, mark, say_done
from selfrepair.run.notebook_page import write_notebook_pages
from selfrepair.run.page import write_page
from selfrepair.run.study import Study
from selfrepair.store.files import hash_files
from selfrepair.store.manifest import manifest_of, read_manifest, write_manifest
from selfrepair.text.corpora import hash_documents, read_documents

#: What a run's manifest repeats of each store's own.
OF_A_STORE = ("model", "measurement", "ablation", "dtype", "weights_sha256", "code", "seconds", "finished")


def summarise(study: Study, notebooks: Mapping[str, str], key: str = "") -> str:
    """Writes the manifest of a finished run, its pages and their mark, under the plan's ``key``.

    The pages are ``index.html`` and, of each notebook, ``notebooks/NN_….html``.

    ``notebooks`` are the keys of what the notebooks show, which the manifest names.

    Returns what to print: the comparison and the page's path.

    Raises:
        UserError: the run left nothing to show, or is of other models than the released numbers of their
        names.
    """
    out = study.out_dir
    if not any((out / "figures").glob("*.png")):
        raise UserError(f"{out}: holds no figures; run 'selfrepair notebooks' into it first")
    profile = study.profile
    said = report(
        out,
        ablations=profile.ablations,
        fraction=profile.fraction,
        amount=profile.amount,
        dataset=profile.dataset,
    )
    stores = _stores_of(study)
    made_from = {
        "profile": profile.name,
        "settings": dataclasses.asdict(profile),
        "seed": study.seed,
        "held_out_text_sha256": hash_documents(read_documents(HELD_OUT_TEXT)),
        "notebooks": dict(notebooks),
        "stores": stores,
    }
    manifest = out / "manifest.json"
    seconds = sum(float(note["seconds"]) for note in stores.values())
    write_manifest(manifest, seconds, **made_from)  # the page shows it
    notebook_pages = write_notebook_pages(out)
    page = write_page(out)
    write_manifest(manifest, seconds, **made_from, files=hash_files(out, RESULTS))
    say_done(mark(study.out_dir, "page"), [page, *notebook_pages, manifest], out, key=key)
    return f"{said}\n{page}"


def _stores_of(study: Study) -> dict[str, dict[str, object]]:
    """Of each store that the run's plan names, by model and label: its name, and what its manifest says."""
    found: dict[str, dict[str, object]] = {}
    for model_name in study.profile.models:
        for task in study.tasks(model_name):
            if task.path.is_dir():
                note = read_manifest(manifest_of(task.path))
                if not {"seconds", "finished", "model"} <= note.keys():
                    raise UserError(
                        f"{manifest_of(task.path)}: not a store's manifest; delete it and the store, "
                        f"and run again"
                    )
                repeated = {key: note[key] for key in OF_A_STORE if key in note}
                found[f"{model_name} {task.label}"] = {"store": task.path.name, **repeated}
    return found
