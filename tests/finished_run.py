"""A finished run of a small model, made without kernels: every measurement, one notebook, tables, page, marks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from selfrepair.analysis import claims
from selfrepair.analysis.head_means import HeadMeans, head_statistics
from selfrepair.analysis.head_table import heads_of_models, write_heads
from selfrepair.measure import pairs
from selfrepair.paths import MODELS
from selfrepair.run import notebooks
from selfrepair.run.marks import mark, say_done
from selfrepair.run.record import summarise
from selfrepair.run.study import Study
from selfrepair.run.workflow import measure, plan

NAME = "pocket-pythia-small"
#: What a run measures of this model, with three kinds of ablation.
MEASURED = (
    *("tokens", "facts", "constants-mean", "heads-resample", "heads-mean", "probabilities", "cosines"),
    *("unseen_tokens", "constants-optimal", "heads-optimal"),
    *("neurons-resample", "self_feeding-resample", "earlier_input-resample", "alignment", "donor_draws"),
    *("layers-resample", "layers_on_prose-resample", "layers_over_training-resample"),
    *("head_growth-resample", "joint_ablation-resample", "attention_cosines"),
)
#: What the run asks for, beside its model.
AMOUNT = {"n_prompts": 8, "prompt_len": 12, "fraction": 0.2}
PROFILE = {"ablations": ["resample", "mean", "optimal"], "donor_draws": 1, **AMOUNT}
#: Of the one notebook, what is read of it without running it.
CODE = 'study.measured("heads")\nwrite_heads(table, kind, out)\nstyle.save(figure, out, "01_one")'


@contextmanager
def one_notebook(folder: Path) -> Iterator[None]:
    """Inside, ``folder`` holds the repository's only notebook, and shards are small."""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)]), folder / "01_one.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "SHARD_PAIRS", 2)
        patch.setattr(notebooks, "NOTEBOOKS", folder)
        yield


def finish(folder: Path) -> Study:
    """A run of a model that lies in ``folder`` with a checkpoint of its training, in its folder ``results``."""
    model = str(shutil.copytree(MODELS / NAME, folder / NAME))
    shutil.copytree(MODELS / NAME, folder / NAME / "checkpoints" / "step-1")
    profile = folder / "small.yaml"
    profile.write_text(json.dumps({"models": [model], **PROFILE}))
    study = Study.of(str(profile), device="cpu", out_dir=folder / "results")
    measure(study, model)
    planned = plan(study)
    leave_what_the_notebook_would(study, planned["notebooks"]["01_one"])
    summarise(study, planned["notebooks"], planned["page"])
    return study


def leave_what_the_notebook_would(study: Study, key: str) -> None:
    out = study.out_dir
    for kind in study.profile.ablations:
        sweeps = study.measured("heads", kind)
        write_heads(heads_of_models(sweeps, study.profile.fraction), kind, out)
    of_models = {name: head_statistics(HeadMeans.of_sweep(found, 0.2)) for name, found in sweeps.items()}
    table = claims.claims_table("01", of_models)
    claims.write_claims(table, out)
    Image.new("RGB", (4, 4)).save(out / "figures" / "01_one.png")
    shown = nbformat.v4.new_output("display_data", {"text/markdown": claims.to_markdown(table)})
    (out / "notebooks").mkdir()
    cell = nbformat.v4.new_code_cell(CODE, outputs=[shown])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), out / "notebooks" / "01_one.ipynb")
    say_done(mark(out, "notebooks", "01"), notebooks.all_notebooks()[0].left(study), out, key=key)
