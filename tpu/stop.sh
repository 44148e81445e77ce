#!/usr/bin/env bash
# Asks the program on all workers to end: it finishes its step and writes a checkpoint. watch.sh
# ends too, and the same launch.sh goes on from there. The TPU goes on costing: see delete.sh.
#
#   tpu/stop.sh NAME --zone ZONE [--queued] [--project PROJECT] [--dry-run]
#
#   --queued   NAME was created with --queued or --slices
#   --dry-run  prints the command instead of running it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_more

on_workers all "emor3_jax/tpu/worker.sh stop"
