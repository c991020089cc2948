"""The suite as a Snakemake workflow: measurements -> notebooks -> summary.

    ./run_all.sh                                                            # this machine
    snakemake --workflow-profile workflow/default --cores 2 --config profile=pocket   # the same
    snakemake --workflow-profile workflow/slurm     # a SLURM cluster: workflow/slurm/ says what it asks for
    snakemake --workflow-profile workflow/default --cores 2 measured        # the measurements without the notebooks

--config takes profile (a name or a .yaml file), out (the results folder), units_per_job and gpus.

Each job is one `selfrepair` command. The commands keep what they compute under checksums and locks of their own;
what Snakemake sees are small `.done` files, so that a failed or killed job never loses a shard. Where there are at
least as many models as cores, everything that is measured of a model is one job, because loading the libraries
takes seconds; else, and on a cluster, each stage of a model is divided into jobs of some shards.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout

ROOT = Path(workflow.basedir)
# Jobs are commands of the environment on the PATH, else of the one that Snakemake runs in, with the library of this repository.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "shared"), *filter(None, [os.environ.get("PYTHONPATH")])])
if shutil.which("selfrepair") is None:
    sys.exit("error: no command selfrepair: install this repository into Snakemake's environment, as ./run_all.sh does")

PROFILE = config.get("profile", "pocket")
if not isinstance(PROFILE, str):
    sys.exit(f"error: Snakemake takes the name of the profile for {PROFILE!r}; give its file: --config profile=profiles/NAME.yaml")
OUT = Path(str(config.get("out", ROOT / "results" / Path(PROFILE).stem)))
DONE = OUT / "done"
GPUS = int(config.get("gpus", 0))  # that a job asks for; on one machine 1 with --resources gpu=1, as a job uses all that it sees
KEPT_PLAN = DONE / "plan.json"


def make_plan():
    """The plan, with how many shards a job computes; 0: a model is one job."""
    planned = subprocess.run(["selfrepair", "plan", "--profile", PROFILE, "--out", OUT], stdout=subprocess.PIPE)
    if planned.returncode:
        if OUT.is_dir() and {file.name for file in OUT.iterdir()} <= {".run.lock"}:
            shutil.rmtree(OUT)  # made for nothing
        sys.exit(planned.returncode)  # the command has said why
    plan = json.loads(planned.stdout)
    cores = workflow.resource_settings.cores
    is_one_machine = workflow.resource_settings.nodes is None and cores is not None
    default = 0 if is_one_machine and len(plan["models"]) >= cores else 8
    return plan | {"units_per_job": int(config.get("units_per_job", default))}


if workflow.is_main_process:
    if not workflow.dryrun:
        running = FileLock(OUT / ".run.lock")  # until this process ends, however it does; jobs neither take nor inherit it
        OUT.mkdir(parents=True, exist_ok=True)
        try:
            running.acquire(timeout=0)
        except Timeout:
            print(f"another run is at work on {OUT}: waiting until it ends", file=sys.stderr)
            running.acquire()
    PLAN = make_plan()
    if not workflow.dryrun:
        DONE.mkdir(exist_ok=True)
        KEPT_PLAN.write_text(json.dumps(PLAN, indent=1), encoding="utf-8")
else:  # a job on a cluster, which reads this file again
    PLAN = json.loads(KEPT_PLAN.read_text(encoding="utf-8"))

MODELS = {of_model["slug"]: name for name, of_model in PLAN["models"].items()}
NOTEBOOKS = {stem[:2]: stem for stem in PLAN["notebooks"]}
UNITS_PER_JOB = PLAN["units_per_job"]


def of_model(wildcards):
    return PLAN["models"][MODELS[wildcards.model]]


def jobs_of(model, stage):
    """The shards of each job. A stage that one job can do needs no shard jobs: merging computes what is missing."""
    units = of_model(model)["stages"][int(stage)]
    return [units[i : i + UNITS_PER_JOB] for i in range(0, len(units), UNITS_PER_JOB)]


def before(wildcards):
    """The mark of the stage before."""
    return DONE / "measured" / f"{wildcards.model}-{int(wildcards.stage) - 1}.done"


def parts_of_stage(wildcards):
    if wildcards.stage == "all":
        return []
    jobs = jobs_of(wildcards, wildcards.stage)
    if len(jobs) == 1:
        return before(wildcards)
    return [DONE / "shards" / wildcards.model / f"{wildcards.stage}-{job}.done" for job in range(len(jobs))]


def measured_unless(done):
    """None where this is done: Snakemake would run it again after a lost store, though that comes out as it was."""
    return [] if done.exists() else MEASURED


LAST_STAGE = {model: "all" if UNITS_PER_JOB == 0 else len(PLAN["models"][name]["stages"]) - 1 for model, name in MODELS.items()}
MEASURED = [DONE / "measured" / f"{model}-{stage}.done" for model, stage in LAST_STAGE.items()]
RUN_NOTEBOOKS = expand(DONE / "notebooks" / "{number}.done", number=NOTEBOOKS)


wildcard_constraints:
    model="|".join(map(re.escape, MODELS)),
    stage="all|[0-9]+",
    job="[0-9]+",
    number="|".join(NOTEBOOKS),


localrules:
    all,
    measured,
    network,
    summary,


# What is run again is said by keys in the plan, not by times. A model's key is a parameter of its jobs; they keep what is
# still good. Marks of notebooks and page with another key are removed by the plan, so that they are missing here, where
# everything is asked for by name: that a model was measured again is in itself no reason to run a notebook.
rule all:
    input:
        DONE / "page.done",
        RUN_NOTEBOOKS,
        MEASURED,


rule measured:
    input:
        MEASURED,


# Here, on the machine that Snakemake runs on, is what needs the network: a cluster's nodes often have none.
rule network:
    output:
        DONE / "measured" / "{model}-0.done",
    log:
        OUT / "logs" / "measured" / "{model}-0.log",
    params:
        model=lambda wildcards: MODELS[wildcards.model],
        key=lambda wildcards: of_model(wildcards)["key"],
    shell:
        "selfrepair measure --profile {PROFILE:q} --out {OUT:q} --model {params.model:q} --stage 0 > {log:q} 2>&1"


rule shards:
    input:
        before,
    output:
        DONE / "shards" / "{model}" / "{stage}-{job}.done",
    log:
        OUT / "logs" / "shards" / "{model}-{stage}-{job}.log",
    params:
        model=lambda wildcards: MODELS[wildcards.model],
        units=lambda wildcards: jobs_of(wildcards, wildcards.stage)[int(wildcards.job)],
        key=lambda wildcards: of_model(wildcards)["key"],
    resources:
        mem_mb=lambda wildcards: of_model(wildcards)["mem_mb"],
        gpu=GPUS,
    shell:
        "selfrepair measure --profile {PROFILE:q} --out {OUT:q} --model {params.model:q} --units {params.units:q}"
        " --job {wildcards.stage}-{wildcards.job} > {log:q} 2>&1"


rule measure:
    input:
        parts_of_stage,
    output:
        DONE / "measured" / "{model}-{stage}.done",
    log:
        OUT / "logs" / "measured" / "{model}-{stage}.log",
    params:
        model=lambda wildcards: MODELS[wildcards.model],
        key=lambda wildcards: of_model(wildcards)["key"],
    resources:
        mem_mb=lambda wildcards: of_model(wildcards)["mem_mb"],
        gpu=GPUS,
    shell:
        "selfrepair measure --profile {PROFILE:q} --out {OUT:q} --model {params.model:q} --stage {wildcards.stage} > {log:q} 2>&1"


ruleorder: network > measure


# The executed notebook is no output, because Snakemake deletes those of a failed job: the failed cell is to be seen in it.
rule notebooks:
    input:
        lambda wildcards: measured_unless(DONE / "notebooks" / f"{wildcards.number}.done"),
    output:
        DONE / "notebooks" / "{number}.done",
    log:
        OUT / "logs" / "notebooks" / "{number}.log",
    params:
        key=lambda wildcards: PLAN["notebooks"][NOTEBOOKS[wildcards.number]],
    resources:
        mem_mb=PLAN["notebook_mem_mb"],
        gpu=GPUS,
    shell:
        "selfrepair notebook --number {wildcards.number} --profile {PROFILE:q} --out {OUT:q} --key {params.key} > {log:q} 2>&1"


rule summary:
    input:
        RUN_NOTEBOOKS,
        measured_unless(DONE / "page.done"),
    output:
        DONE / "page.done",
    log:
        OUT / "logs" / "summary" / "summary.log",
    params:
        key=PLAN["page"],
    shell:
        "selfrepair summary --profile {PROFILE:q} --out {OUT:q} --key {params.key} > {log:q} 2>&1"
