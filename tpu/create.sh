#!/usr/bin/env bash
# Creates a TPU: a TPU VM at once, or a request that waits in a queue, for one slice or several.
#
#   tpu/create.sh NAME --zone ZONE --type TYPE [--spot] [--queued] [--slices N] [--wait TIME]
#                 [--version RUNTIME] [--service-account EMAIL] [--project PROJECT] [--dry-run]
#
#   --type     of a slice: v4-8, v5e-16 (v5litepod-16 to gcloud), v5p-8, v6e-8 and so on
#   --spot     cheaper, and may be taken away at any time; without it, on demand
#   --queued   waits in the queue until there is room, instead of failing at once where there is
#              none; give --queued to the other scripts too
#   --slices   several slices in one job, over the network of the data centre; always queued
#   --wait     with --queued: give the request up after so long, such as 6h
#   --version  runtime image; by default the one that fits the type
#   --service-account  what the TPU acts as; project.sh makes one
#   --dry-run  prints the command instead of running it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

type="" version="" slices=1 wait="" account="" options=()
set -- "${rest[@]+"${rest[@]}"}"
while [[ $# -gt 0 ]]; do
  case "$1" in
    --spot) options+=(--spot); shift ;;
    --type | --version | --slices | --wait | --service-account)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      option="${1#--}"
      printf -v "${option/service-account/account}" '%s' "$2"
      shift 2
      ;;
    *) unknown "$1" ;;
  esac
done
[[ -n "$type" ]] || fail "--type is missing"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices must be a number, not $slices"
if [[ "$slices" -gt 1 ]]; then queued=true; fi
[[ -z "$wait" || "$queued" == true ]] || fail "--wait needs --queued: without, nothing waits"
version="${version:-$(runtime "$type")}"
[[ -n "$version" ]] || fail "no runtime is known for --type $type: give --version"
if [[ -n "$account" ]]; then
  options+=("--service-account=$account" --scopes=cloud-platform)
fi
type="$(accelerator "$type")"

if [[ "$queued" == false ]]; then
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
    "--accelerator-type=$type" "--version=$version" "${options[@]+"${options[@]}"}"
  exit
fi
if [[ "$slices" -gt 1 ]]; then
  nodes=("--node-count=$slices" "--node-prefix=$name")
else
  nodes=("--node-id=$name")
fi
if [[ -n "$wait" ]]; then options+=("--valid-until-duration=$wait"); fi
run gcloud compute tpus queued-resources create "$name" "${where[@]}" \
  "--accelerator-type=$type" "--runtime-version=$version" "${nodes[@]}" \
  "${options[@]+"${options[@]}"}"
