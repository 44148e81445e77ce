#!/usr/bin/env bash
# Starts a program on all workers of all slices, in the background, so that it outlives the session.
# Output goes to ~/emor3_jax/logs/run.log of each worker.
#
#   tpu/launch.sh NAME --zone ZONE [--queued] [--replace] [--project PROJECT] [--dry-run]
#                 -- ARGUMENTS OF PYTHON
#
#   tpu/launch.sh NAME --zone ZONE -- -m emor3_jax.train --config=configs/tpu_v4.py \
#       --workdir=gs://BUCKET/runs/emoset --config.policy.path=gs://BUCKET/Qwen2.5-VL-3B-Instruct …
#
#   --queued   NAME was created with --queued or --slices
#   --replace  end what still runs there first
#   --dry-run  prints the command instead of running it
#
# gs://BUCKET/… in an argument is reached through a mount of the bucket, ~/gcs/BUCKET.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

task=start
if [[ ${#rest[@]} -gt 0 && "${rest[0]}" == --replace ]]; then
  task="start --replace"
  rest=("${rest[@]:1}")
fi
no_more
check_program

on_workers all "emor3_jax/tpu/worker.sh $task $(printf '%q ' "${command[@]}")"
