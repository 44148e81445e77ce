#!/usr/bin/env bash
# Shows the end of the log of a program that launch.sh started.
#
#   tpu/logs.sh NAME --zone ZONE [--queued] [--slice N] [--worker N] [--follow]
#               [--project PROJECT] [--dry-run]
#
#   --queued   NAME was created with --queued or --slices
#   --slice    with --queued: number of the slice, or "all"; 0 by default
#   --worker   number of the worker, or "all"; 0 by default
#   --follow   goes on showing new lines until interrupted
#   --dry-run  prints the command instead of running it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

worker=0 slice=0 follow=""
set -- "${rest[@]+"${rest[@]}"}"
while [[ $# -gt 0 ]]; do
  case "$1" in
    --follow) follow=" --follow"; shift ;;
    --worker | --slice)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    *) unknown "$1" ;;
  esac
done

on_workers "$worker" "tail --lines=50$follow emor3_jax/logs/run.log" "$slice"
