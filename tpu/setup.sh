#!/usr/bin/env bash
# Copies a commit of this repository to all workers of a TPU and installs it there, in ~/emor3_jax
# with a Python 3.11 environment in .venv, together with gcsfuse. Run it again after a commit.
#
#   tpu/setup.sh NAME --zone ZONE [--queued] [--commit COMMIT] [--project PROJECT] [--dry-run]
#
#   --queued   NAME was created with --queued or --slices
#   --commit   what is copied; HEAD by default. Changes that are not committed are not copied
#   --dry-run  prints the commands instead of running them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

commit=HEAD
if [[ ${#rest[@]} -ge 2 && "${rest[0]}" == --commit ]]; then
  commit="${rest[1]}"
  rest=("${rest[@]:2}")
fi
no_more

root="$(cd "$here/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
archive="$folder/emor3_jax.tar.gz"

run git -C "$root" archive --format=tar.gz "--output=$archive" "$commit"
copy_to_workers "$archive"
on_workers all 'mkdir -p emor3_jax && tar -xzf emor3_jax.tar.gz -C emor3_jax &&
emor3_jax/tpu/worker.sh install'
