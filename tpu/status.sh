#!/usr/bin/env bash
# Says how the TPU is, and the program that launch.sh started on its first worker.
#
#   tpu/status.sh NAME --zone ZONE [--queued] [--project PROJECT] [--dry-run]
#
#   --queued   NAME was created with --queued or --slices
#   --dry-run  only checks the arguments
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_more
if [[ "$dry_run" == true ]]; then exit; fi

state="$(tpu_state)"
echo "tpu: $state"
case "$state" in
  READY | ACTIVE) echo "run: $(run_state)" ;;
esac
