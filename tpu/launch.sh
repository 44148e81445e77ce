#!/usr/bin/env bash
# Starts a program on all workers of a TPU VM, in the background, so that it outlives the session.
# Output goes to ~/emor3_jax/logs/run.log of each worker, the process id to logs/run.pid.
#
#   tpu/launch.sh NAME --zone ZONE [--project PROJECT] [--dry-run] -- ARGUMENTS OF PYTHON
#
#   tpu/launch.sh NAME --zone ZONE -- -m emor3_jax.train --config=configs/tpu_v4.py \
#       --workdir=runs/emoset --config.policy.path=/data/Qwen2.5-VL-3B-Instruct …
#
#   --dry-run  prints the command instead of running it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_more
[[ ${#command[@]} -gt 0 ]] || fail "the program is missing: -- -m emor3_jax.train …"

program="$(printf '%q ' .venv/bin/python "${command[@]}")"
start="set -e
cd emor3_jax
mkdir -p logs
nohup ${program}> logs/run.log 2>&1 < /dev/null &
echo \$! > logs/run.pid"

run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$start"
