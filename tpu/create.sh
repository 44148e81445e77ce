#!/usr/bin/env bash
# Creates a TPU VM.
#
#   tpu/create.sh NAME --zone ZONE --type TYPE [--spot] [--version RUNTIME] [--project PROJECT]
#                 [--dry-run]
#
#   --type     accelerator type, such as v4-8, v5litepod-8, v5p-8 or v6e-8
#   --spot     cheaper, and may be taken away at any time; without it, on demand
#   --version  runtime image; by default the one that fits the type
#   --dry-run  prints the command instead of running it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

type="" version="" spot=()
set -- "${rest[@]+"${rest[@]}"}"
while [[ $# -gt 0 ]]; do
  case "$1" in
    --spot) spot=(--spot); shift ;;
    --type | --version)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    *) fail "unknown argument: $1" ;;
  esac
done
[[ -n "$type" ]] || fail "--type is missing"
if [[ -z "$version" ]]; then
  case "$type" in
    v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) fail "no runtime is known for --type $type: give --version" ;;
  esac
fi

run gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
  "--accelerator-type=$type" "--version=$version" "${spot[@]+"${spot[@]}"}"
