#!/usr/bin/env bash
# Ends what start.sh started, and removes what it wrote.
set -euo pipefail

RUN=/run/selfrepair-slurm
CONF=/etc/slurm/slurm.conf

if [[ "$(readlink -- "$CONF" || true)" != "$RUN/slurm.conf" ]]; then exit 0; fi # not ours, or none
scancel --user=root 2>/dev/null || true # jobs outlive slurmd
for daemon in slurmctld slurmd munged; do
    if [[ -s "$RUN/$daemon.pid" ]]; then
        pid="$(<"$RUN/$daemon.pid")"
        kill "$pid" 2>/dev/null || continue
        for ((tenth = 0; tenth < 100; tenth++)); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
    fi
done
rm -- "$CONF"
rm -rf -- "$RUN"
