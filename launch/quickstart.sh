#!/usr/bin/env bash
# Installs l2e-ds and pretrains pythia-14m with L2E on two ranks (all GPUs, where there are any): 150 steps on the
# text of this machine's Python standard library, then 10 more from its own checkpoint, then an export.
#
# usage: launch/quickstart.sh [section.key=value ...]     e.g. inhibition.method=none training.run_directory=runs/none
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install_l2e_ds

RUN=runs/quickstart
for override in "$@"; do
    case "$override" in training.run_directory=*) RUN=${override#*=} ;; esac
done
if [ -e "$RUN" ]; then
    echo "$RUN is there already; remove it, or give training.run_directory=..." >&2
    exit 2
fi
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
RANKS=$((GPUS > 0 ? GPUS : 2))
BATCH=()  # the recipe's batch of 16 sequences divides over 1, 2 and 4 ranks; other numbers get 4 sequences a rank
if ((16 % (4 * RANKS) != 0)); then BATCH=("training.global_batch=$((4 * RANKS))"); fi
# one thread a rank and core: two ranks that each take all cores slow each other down
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / RANKS > 0 ? $(nproc) / RANKS : 1))}
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

COUNT=()  # given a number, the launcher would forget CUDA_VISIBLE_DEVICES; without one it takes all visible GPUs
((GPUS)) || { COUNT=(--num_accelerators "$RANKS"); export DS_ACCELERATOR=cpu; }

train() {
    deepspeed ${COUNT[@]+"${COUNT[@]}"} --master_port "$PORT" --log_level critical \
        --module l2e_ds.train launch/recipes/quickstart.yaml ${BATCH[@]+"${BATCH[@]}"} "$@"
}

echo "pretraining pythia-14m with L2E on $RANKS ranks -> $RUN"
train "$@"
echo "continuing from its checkpoint for 10 steps"
train "$@" training.steps=160
l2e-ds export "$RUN" --output "$RUN/export"
l2e-ds report "$RUN" --output "$RUN/report.html"
echo
l2e-ds summary "$RUN" --baseline launch/quickstart-none  # a stored run
echo "report                     $RUN/report.html   (opens in a browser)"
echo "exported model             $RUN/export   (transformers: AutoModelForCausalLM.from_pretrained)"
