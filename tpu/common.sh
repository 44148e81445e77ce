#!/usr/bin/env bash
# Shared by the scripts of this folder: options, running or printing a command, reaching workers.
#
# Variables are set here and used by the scripts that read this file:
# shellcheck disable=SC2034

here="$(dirname "${BASH_SOURCE[0]}")"

# Prints the header comment of the script as its usage text.
usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
}

fail() {
  echo "error: $1" >&2
  echo "try: $(basename "$0") --help" >&2
  exit 2
}

# Runs a command, or prints it, quoted for a shell, with --dry-run.
run() {
  if [[ "$dry_run" == true ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Reads the options that all scripts share into name, zone, project, queued and dry_run. The rest
# stays in `rest`, what follows `--` in `command`. `shared` is what hands them on to another script.
# --name=value is --name value.
parse() {
  name="" zone="" project="" queued=false dry_run=false rest=() command=()
  while [[ $# -gt 0 ]]; do
    if [[ "$1" == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case "$1" in
      --help | -h) usage; exit 0 ;;
      --dry-run) dry_run=true; shift ;;
      --queued) queued=true; shift ;;
      --zone | --project)
        [[ $# -ge 2 ]] || fail "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift 2
        ;;
      --) shift; command=("$@"); break ;;
      -*) rest+=("$1"); shift ;;
      *)
        if [[ -z "$name" && ${#rest[@]} -eq 0 ]]; then name="$1"; else rest+=("$1"); fi
        shift
        ;;
    esac
  done
  [[ -n "$name" ]] || fail "the name of the TPU is missing"
  [[ -n "$zone" ]] || fail "--zone is missing"
  where=("--zone=$zone")
  shared=("$name" --zone "$zone")
  if [[ -n "$project" ]]; then
    where+=("--project=$project")
    shared+=(--project "$project")
  fi
}

# Fails on an argument that a script does not know.
unknown() {
  case "$1" in
    -m | emor3_jax.* | *.py | python*) fail "unknown argument: $1; put -- before the program" ;;
    *) fail "unknown argument: $1" ;;
  esac
}

# Fails on options that a script does not know.
no_more() {
  [[ ${#rest[@]} -eq 0 ]] || unknown "${rest[0]}"
}

# Fails where no program follows `--`, or one that the Python of the workers cannot run.
check_program() {
  local wanted="-- -m emor3_jax.train …"
  [[ ${#command[@]} -gt 0 ]] || fail "the program is missing: $wanted"
  case "${command[0]##*/}" in
    python | python[0-9]* | emor3)
      fail "${command[0]}: give the arguments of Python alone, without its name: $wanted"
      ;;
  esac
}

# Prints the accelerator type as gcloud writes it: v5e is called v5litepod there.
accelerator() {
  echo "${1/#v5e-/v5litepod-}"
}

# Prints the runtime image of an accelerator type, nothing where none is known.
runtime() {
  case "$(accelerator "$1")" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

# Runs a command on workers.
#   on_workers WORKER COMMAND [NODE]    a number or "all"; NODE is that of a slice
on_workers() {
  if [[ "$queued" == true ]]; then
    run gcloud compute tpus queued-resources ssh "$name" "${where[@]}" \
      "--node=${3:-$1}" "--worker=$1" "--command=$2"
  else
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
  fi
}

# Copies a file to the home folder of all workers of all slices.
copy_to_workers() {
  if [[ "$queued" == true ]]; then
    run gcloud compute tpus queued-resources scp "$1" "$name:" "${where[@]}" \
      --node=all --worker=all
  else
    run gcloud compute tpus tpu-vm scp "$1" "$name:" "${where[@]}" --worker=all
  fi
}

# Prints the state of the TPU in gcloud's words (READY or ACTIVE: usable), ABSENT where there is
# none of this name, or UNKNOWN with the reason where gcloud cannot say.
tpu_state() {
  local kind=tpu-vm field=state state errors
  if [[ "$queued" == true ]]; then kind=queued-resources field=state.state; fi
  errors="$(mktemp)"
  if state="$(gcloud compute tpus "$kind" describe "$name" "${where[@]}" \
    "--format=value($field)" 2> "$errors")"; then
    echo "$state"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    echo "UNKNOWN: $(tail -n 1 "$errors")"
  fi
  rm -f "$errors"
}

# Prints what worker.sh says of the run on the first worker, or "unreachable".
run_state() {
  local out
  out="$(on_workers 0 "if [ -x emor3_jax/tpu/worker.sh ]; then emor3_jax/tpu/worker.sh state; \
else echo 'run: none'; fi" 2> /dev/null)" || out=""
  out="$(sed -n 's/^run: //p' <<< "$out")"
  echo "${out:-unreachable}"
}
