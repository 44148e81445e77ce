#!/usr/bin/env bash
# Deletes a TPU and everything on its disks. gcloud asks first, unless --yes is given.
#
#   tpu/delete.sh NAME --zone ZONE [--queued] [--yes] [--project PROJECT] [--dry-run]
#
#   --queued   NAME was created with --queued or --slices: the request and all its slices
#   --dry-run  prints the command instead of running it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

quiet=()
if [[ ${#rest[@]} -gt 0 && "${rest[0]}" == --yes ]]; then
  quiet=(--quiet)
  rest=("${rest[@]:1}")
fi
no_more

if [[ "$queued" == true ]]; then
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force \
    "${quiet[@]+"${quiet[@]}"}"
else
  run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" "${quiet[@]+"${quiet[@]}"}"
fi
