#!/usr/bin/env bash
# Starts a run with the deepspeed launcher, on this machine or on the hosts of a hostfile (pdsh over ssh), and starts
# it again after a failure. Stop it with SIGTERM, SIGUSR1 or Ctrl-C: it saves first. See docs/clusters.md.
#
# usage: launch/deepspeed.sh [--restarts N] [launcher options] RUN.yaml [section.key=value ...]
#   launch/deepspeed.sh RUN.yaml                         all accelerators of this machine
#   launch/deepspeed.sh --num_accelerators 2 RUN.yaml    two of them (on a machine without any: two processes)
#   launch/deepspeed.sh --hostfile HOSTS RUN.yaml        several hosts; HOSTS has lines like `node1 slots=8`
# launcher options: --hostfile FILE, --include/--exclude SPEC, --num_nodes N, --num_accelerators N, --master_addr A,
#   --master_port P (also: MASTER_PORT), --ssh_port P, --no_ssh_check, --enable_each_rank_log DIR, --log_level LEVEL
# --restarts N (also: L2E_DS_RESTARTS): how often it is started again after a failure; default 3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

fail() { echo "launch/deepspeed.sh: $1" >&2; exit 2; }

SUPERVISE=() OPTIONS=() HOSTFILE='' PORT=${MASTER_PORT:-}
while (($#)); do
    [[ $1 == -?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"  # --option=value
    case $1 in
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --no_ssh_check) OPTIONS+=("$1"); shift; continue ;;
        --restarts | -H | --hostfile | -i | --include | -e | --exclude | --num_nodes | --num_accelerators | --num_gpus | \
            --master_addr | --master_port | --ssh_port | --enable_each_rank_log | --log_level)
            (($# > 1)) || fail "$1 needs a value" ;;
        -*) fail "unknown option $1; see launch/deepspeed.sh --help" ;;
        *) break ;;
    esac
    case $1 in
        --restarts) SUPERVISE=(--restarts "$2") ;;
        -H | --hostfile) HOSTFILE=$2 ;;
        --master_port) PORT=$2 ;;
        *) OPTIONS+=("$1" "$2") ;;
    esac
    shift 2
done
(($#)) || fail "which run? usage: launch/deepspeed.sh [--restarts N] [launcher options] RUN.yaml [section.key=value ...]"
need_l2e_ds deepspeed || exit 2

TRAIN=(--module l2e_ds.train)
if [[ -z $HOSTFILE && -e /job/hostfile ]]; then HOSTFILE=/job/hostfile; fi  # where the deepspeed launcher looks
if [[ -n $HOSTFILE ]]; then
    [[ -f $HOSTFILE ]] || fail "--hostfile: no such file: $HOSTFILE"
    command -v pdsh >/dev/null || fail "several hosts need pdsh: apt-get install pdsh"
    # a host that is dead or unreachable for a minute ends the launch instead of keeping it waiting
    export PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND--o ServerAliveInterval=15 -o ServerAliveCountMax=4}
    # always by pdsh, even to a single host: l2e_ds.supervise quotes the run's words for the remote shell then
    OPTIONS+=(--hostfile "$HOSTFILE" --force_multi --no_local_rank)
    PORT=${PORT:-29500}
    # ssh brings no environment along; anything else that the hosts need goes into .deepspeed_env (docs/clusters.md)
    TRAIN=(--no_python env)
    for NAME in PATH LD_LIBRARY_PATH OMP_NUM_THREADS DS_ACCELERATOR GLOO_SOCKET_IFNAME HF_HOME HF_HUB_OFFLINE \
        HF_DATASETS_OFFLINE HF_DATASETS_CACHE TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR; do
        [[ -n ${!NAME:-} ]] || continue
        [[ ${!NAME} =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] || fail "$NAME=${!NAME} cannot be passed to other hosts by ssh"
        TRAIN+=("$NAME=${!NAME}")
    done
    TRAIN+=("$(command -v python)" -u -m l2e_ds.train)
else
    PORT=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
fi
# exec: the supervisor gets this script's process id, and with it the signals sent to the script
exec python -m l2e_ds.supervise ${SUPERVISE[@]+"${SUPERVISE[@]}"} "$@" -- \
    deepspeed --master_port "$PORT" --log_level critical ${OPTIONS[@]+"${OPTIONS[@]}"} "${TRAIN[@]}"
