#!/usr/bin/env bash
# A SLURM of one node on this machine, for the tests: tests/slurm/start.sh, tests/slurm/stop.sh. Needs root, no systemd.
# Started already, it only waits until the node is idle. On failure the last line says why; the status is 2 if SLURM cannot be
# had here at all, 1 if it is here and does not start.
set -euo pipefail

RUN=/run/selfrepair-slurm # keys, logs, state
CONF=/etc/slurm/slurm.conf # the only place outside RUN: job steps find no other
PROGRAMS=(munged slurmctld slurmd sbatch srun squeue sinfo)
HOST="$(hostname -s)"
PATH="$PATH:/usr/sbin:/sbin"

# fail STATUS MESSAGE [LOG]
fail() {
    local message=$2
    if [[ -s "${3:-}" ]]; then message+=": $(tail -n 1 -- "$3")"; fi
    printf 'SLURM not started: %s\n' "$message" >&2
    exit "$1"
}

installed() {
    local program
    for program in "${PROGRAMS[@]}"; do
        command -v "$program" >/dev/null || return 1
    done
}

install_packages() {
    command -v apt-get >/dev/null || fail 2 "it is not installed, and there is no apt-get to install it with"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update && apt-get install -y --no-install-recommends munge slurmctld slurmd slurm-client; } >"$RUN/apt.log" 2>&1 ||
        fail 2 "apt-get could not install munge, slurmctld, slurmd and slurm-client" "$RUN/apt.log"
}

write_configuration() {
    cat >"$RUN/slurm.conf" <<CONF
ClusterName=selfrepair-test
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=300
StateSaveLocation=$RUN/state
SlurmdSpoolDir=$RUN/spool
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.pid
SlurmctldLogFile=$RUN/slurmctld.log
SlurmdLogFile=$RUN/slurmd.log
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=2 RealMemory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo) State=UNKNOWN
PartitionName=main Nodes=$HOST Default=YES MaxTime=INFINITE State=UP
CONF
    mkdir -p -- "${CONF%/*}"
    ln -sfn -- "$RUN/slurm.conf" "$CONF"
}

# runs NAME: whether the daemon of that pid file lives.
runs() {
    [[ -s "$RUN/$1.pid" ]] && kill -0 "$(<"$RUN/$1.pid")" 2>/dev/null
}

idle() {
    [[ "$(sinfo --noheader --format=%t 2>"$RUN/sinfo.log")" =~ ^(idle|mix|alloc)$ ]]
}

((EUID == 0)) || fail 2 "root is needed"
if [[ -e "$CONF" && "$(readlink -- "$CONF")" != "$RUN/slurm.conf" ]]; then
    fail 2 "this machine has a SLURM of its own ($CONF), which is left alone"
fi
mkdir -p -- "$RUN/state" "$RUN/spool"
chmod 755 -- "$RUN"
installed || install_packages

if ! runs munged; then
    (umask 077 && head -c 1024 /dev/urandom >"$RUN/munge.key")
    munged --key-file="$RUN/munge.key" --socket="$RUN/munge.socket" --pid-file="$RUN/munged.pid" --log-file="$RUN/munged.log" \
        --seed-file="$RUN/munged.seed" >"$RUN/munged.out" 2>&1 || fail 1 "munged" "$RUN/munged.out"
fi
if ! runs slurmctld || ! runs slurmd; then
    write_configuration
    runs slurmctld || slurmctld >"$RUN/slurmctld.out" 2>&1 || fail 1 "slurmctld" "$RUN/slurmctld.log"
    runs slurmd || slurmd >"$RUN/slurmd.out" 2>&1 || fail 1 "slurmd" "$RUN/slurmd.log"
fi
for ((second = 0; second < 60; second++)); do
    if idle; then exit 0; fi
    sleep 1
done
fail 1 "the node is not ready after a minute" "$RUN/slurmctld.log"
