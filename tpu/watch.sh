#!/usr/bin/env bash
# Keeps a program running to its end on a TPU that may be taken away: creates the TPU, sets it up
# and launches the program; whenever the TPU is gone or the program ended early, does so again.
# The program goes on from its last checkpoint, so --workdir must be on a bucket.
#
#   tpu/watch.sh NAME --zone ZONE --type TYPE [--spot] [--queued] [--slices N] [--wait TIME]
#                [--version RUNTIME] [--service-account EMAIL] [--project PROJECT]
#                [--tries N] [--every SECONDS] [--dry-run] -- ARGUMENTS OF PYTHON
#
#   --tries    at most so many creations, and as many starts; 20 by default
#   --every    seconds between two checks; 60 by default
#   --dry-run  prints the commands of a first start instead of running them
#   the others are those of create.sh; a TPU that is there already is taken as it is
#
# Exit status: 0 the program ended well, or was ended by stop.sh; 2 it refused its config; 1 the
# tries are used up. The TPU is left as it is: delete.sh ends its costs.
# What is launched is the commit that is checked out here when this script starts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

tries=20 every=60 creating=()
set -- "${rest[@]+"${rest[@]}"}"
while [[ $# -gt 0 ]]; do
  case "$1" in
    --tries | --every)
      [[ $# -ge 2 && "$2" =~ ^[0-9]+$ ]] || fail "$1 needs a number"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot) creating+=("$1"); shift ;;
    --type | --version | --slices | --wait | --service-account)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      if [[ "$1" == --slices && "$2" != 1 ]]; then queued=true; fi
      creating+=("$1" "$2")
      shift 2
      ;;
    *) unknown "$1" ;;
  esac
done
check_program
# What lies on the disk of a TPU is gone with it.
for at in "${!command[@]}"; do
  case "${command[at]}" in
    --workdir=*) workdir="${command[at]#*=}" ;;
    --workdir) workdir="${command[at + 1]:-}" ;;
    *) continue ;;
  esac
  [[ "$workdir" == gs://* || "$workdir" == */gcs/* ]] ||
    fail "--workdir=$workdir would be lost with the TPU: name a folder of a bucket, gs://BUCKET/…"
done
if [[ "$queued" == true ]]; then shared+=(--queued); fi
if [[ "$dry_run" == true ]]; then shared+=(--dry-run); fi
commit="$(git -C "$here" rev-parse HEAD)"

say() {
  echo "[watch $(date +%H:%M:%S)] $*"
}

create() {
  "$here/create.sh" "${shared[@]}" "${creating[@]+"${creating[@]}"}"
}

start() {
  "$here/setup.sh" "${shared[@]}" --commit "$commit" &&
    "$here/launch.sh" "${shared[@]}" --replace -- "${command[@]}"
}

# What create.sh would refuse is refused before anything else is done.
"$here/create.sh" "${shared[@]}" --dry-run "${creating[@]+"${creating[@]}"}" > /dev/null
if [[ "$dry_run" == true ]]; then
  create
  start
  exit
fi

created=0 started=0 seen=""
while true; do
  tpu="$(tpu_state)" run=""
  case "$tpu" in
    READY | ACTIVE) run="$(run_state)" ;;
  esac
  if [[ "$tpu, $run" != "$seen" ]]; then
    seen="$tpu, $run"
    say "$name: $tpu${run:+, run: $run}"
  fi
  case "$tpu" in
    READY | ACTIVE)
      case "$run" in
        "ended 0")
          say "the program ended well; tpu/delete.sh ends the costs of $name"
          exit 0
          ;;
        *" asked")
          if [[ "$run" != running* ]]; then
            say "the program was stopped as asked; tpu/delete.sh ends the costs of $name"
            exit 0
          fi
          ;;
        "ended 2")
          say "the program refused its config; the end of its log:"
          "$here/logs.sh" "${shared[@]}"
          exit 2
          ;;
        running | unreachable) ;;
        *)
          if [[ "$started" -ge "$tries" ]]; then
            say "not started again after $tries starts; see tpu/logs.sh"
            exit 1
          fi
          started=$((started + 1))
          say "start $started of at most $tries"
          start || say "the start failed"
          ;;
      esac
      ;;
    ABSENT | PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
      if [[ "$created" -ge "$tries" ]]; then
        say "not created again after $tries creations"
        exit 1
      fi
      created=$((created + 1))
      if [[ "$tpu" != ABSENT ]]; then
        say "deleting what is left of $name"
        "$here/delete.sh" "${shared[@]}" --yes || say "the deletion failed"
      fi
      say "creation $created of at most $tries"
      create || say "the creation failed"
      ;;
  esac
  sleep "$every"
done
