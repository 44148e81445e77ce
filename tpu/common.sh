# Shared by the scripts of this folder: options, and running or printing a command.

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

# Reads the options that all scripts share into name, zone, project and dry_run. The rest stays in
# `rest`, what follows `--` in `command`.
parse() {
  name="" zone="" project="" dry_run=false rest=() command=()
  while [[ $# -gt 0 ]]; do
    case "$1" in
      --help | -h) usage; exit 0 ;;
      --dry-run) dry_run=true; shift ;;
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
  [[ -n "$name" ]] || fail "the name of the TPU VM is missing"
  [[ -n "$zone" ]] || fail "--zone is missing"
  where=("--zone=$zone")
  if [[ -n "$project" ]]; then where+=("--project=$project"); fi
}

# Fails on options that a script does not know.
no_more() {
  [[ ${#rest[@]} -eq 0 ]] || fail "unknown argument: ${rest[0]}"
}
