"""The suite as a Snakemake workflow: tokens -> shards -> sweeps -> notebooks -> summary.

    ./run_all.sh                                    # this machine
    snakemake --cores 2 --config profile=pocket     # the same; profiles/default/ holds the options
    snakemake --workflow-profile profiles/slurm     # a SLURM cluster: profiles/slurm/ says what it asks for
    snakemake --cores 2 sweeps                      # the measurements without the notebooks

--config takes profile (a name or a .yaml file), out (the results folder), shards_per_job and gpus.

Each job is one `selfrepair` command. The commands keep what they compute under checksums and locks of their own;
what Snakemake sees of the sweeps are small `.done` files, so that a failed or killed job never loses a shard.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout

ROOT = Path(workflow.basedir)
PROFILE = str(config.get("profile", "pocket"))
OUT = Path(str(config.get("out", ROOT / "results" / Path(PROFILE).stem)))
SHARDS_PER_JOB = int(config.get("shards_per_job", 8))  # 256 prompts: a job's start, some seconds, is little beside that
GPUS = int(config.get("gpus", 0))  # that a job asks for; on one machine 1 with --resources gpu=1, as a job uses all that it sees

planned = subprocess.run(["selfrepair", "plan", "--profile", PROFILE], stdout=subprocess.PIPE)
if planned.returncode:
    sys.exit(planned.returncode)  # the command has said why
PLAN = json.loads(planned.stdout)
MODELS = {name.strip("/").replace("/", "--"): name for name in PLAN["models"]}
NOTEBOOKS = {stem[:2]: stem for stem in PLAN["notebooks"]}

if workflow.is_main_process and not workflow.dryrun:
    running = FileLock(OUT / ".run.lock")  # until this process ends, however it does; jobs neither take nor inherit it
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        running.acquire(timeout=0)
    except Timeout:
        print(f"another run is at work on {OUT}: waiting until it ends", file=sys.stderr)
        running.acquire()


def of_model(wildcards):
    return PLAN["models"][MODELS[wildcards.model]]


def jobs_of(model):
    """The first pairs of each job's shards. A sweep that one job can do needs no shard jobs: merging computes what is missing."""
    first = PLAN["models"][model]["first_pairs"]
    return [first[i : i + SHARDS_PER_JOB] for i in range(0, len(first), SHARDS_PER_JOB)]


def parts_of_sweep(wildcards):
    jobs = jobs_of(MODELS[wildcards.model])
    if len(jobs) == 1:
        return OUT / "tokens" / f"{wildcards.model}.npz"
    return [OUT / "shards" / wildcards.model / wildcards.ablation / f"{job[-1]}.done" for job in jobs]


def shards_of_job(wildcards):
    (job,) = [job for job in jobs_of(MODELS[wildcards.model]) if job[-1] == int(wildcards.last)]
    return job


wildcard_constraints:
    model="|".join(map(re.escape, MODELS)),
    ablation="|".join(PLAN["ablations"]),
    last="[0-9]+",
    number="|".join(NOTEBOOKS),


localrules:
    all,
    sweeps,
    tokens,
    summary,


rule all:
    input:
        OUT / "index.html",


rule sweeps:
    input:
        expand(OUT / "sweeps" / "{model}-{ablation}.done", model=MODELS, ablation=PLAN["ablations"]),


# The plan is a parameter wherever it matters, because an edited module or profile would not run anything again by itself.
# Here, on the machine that Snakemake runs on, is what needs the network: a cluster's nodes often have none.
rule tokens:
    output:
        OUT / "tokens" / "{model}.npz",
    log:
        OUT / "logs" / "tokens" / "{model}.log",
    params:
        model=lambda wildcards: MODELS[wildcards.model],
        plan=lambda wildcards: json.dumps(of_model(wildcards)),
    shell:
        "selfrepair tokens --profile {PROFILE:q} --out {OUT:q} --model {params.model:q} > {log:q} 2>&1"


rule shards:
    input:
        OUT / "tokens" / "{model}.npz",
    output:
        OUT / "shards" / "{model}" / "{ablation}" / "{last}.done",
    log:
        OUT / "logs" / "shards" / "{model}-{ablation}-{last}.log",
    params:
        model=lambda wildcards: MODELS[wildcards.model],
        first=shards_of_job,
        plan=lambda wildcards: json.dumps(of_model(wildcards)),
    resources:
        mem_mb=lambda wildcards: of_model(wildcards)["mem_mb"],
        gpu=GPUS,
    shell:
        "selfrepair shard --profile {PROFILE:q} --out {OUT:q} --model {params.model:q} --ablation {wildcards.ablation}"
        " --first {params.first} > {log:q} 2>&1"


rule merge:
    input:
        parts_of_sweep,
    output:
        OUT / "sweeps" / "{model}-{ablation}.done",
    log:
        OUT / "logs" / "sweeps" / "{model}-{ablation}.log",
    params:
        model=lambda wildcards: MODELS[wildcards.model],
        plan=lambda wildcards: json.dumps(of_model(wildcards)),
    resources:
        mem_mb=lambda wildcards: of_model(wildcards)["mem_mb"],
        gpu=GPUS,
    shell:
        "selfrepair merge --profile {PROFILE:q} --out {OUT:q} --model {params.model:q} --ablation {wildcards.ablation} > {log:q} 2>&1"


# The executed notebook is no output, because Snakemake deletes those of a failed job: the failed cell is to be seen in it.
# Nor are its claims, which a notebook that a reader runs by hand writes too.
rule notebooks:
    input:
        rules.sweeps.input,
        lambda wildcards: ROOT / "notebooks" / f"{NOTEBOOKS[wildcards.number]}.ipynb",
    output:
        touch(OUT / "notebooks" / "{number}.done"),
    log:
        OUT / "logs" / "notebooks" / "{number}.log",
    params:
        plan=json.dumps(PLAN),
    resources:
        mem_mb=PLAN["notebook_mem_mb"],
        gpu=GPUS,
    shell:
        "selfrepair notebooks --only {wildcards.number} --profile {PROFILE:q} --out {OUT:q} > {log:q} 2>&1"


rule summary:
    input:
        expand(OUT / "notebooks" / "{number}.done", number=NOTEBOOKS),
    output:
        OUT / "index.html",
    log:
        OUT / "logs" / "summary" / "summary.log",
    params:
        plan=json.dumps(PLAN),
    shell:
        "selfrepair summary --profile {PROFILE:q} --out {OUT:q} > {log:q} 2>&1"
