#!/usr/bin/env bash
# Copies the committed state of this repository to all workers of a TPU VM and installs it there,
# in ~/emor3_jax with a Python 3.11 environment in .venv. Run it again after a commit.
#
#   tpu/setup.sh NAME --zone ZONE [--project PROJECT] [--dry-run]
#
#   --dry-run  prints the commands instead of running them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_more

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
archive="$folder/emor3_jax.tar.gz"
install='set -e
sudo apt-get update -qq
sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3.11 python3.11-venv
mkdir -p emor3_jax
tar -xzf emor3_jax.tar.gz -C emor3_jax
cd emor3_jax
python3.11 -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --editable ".[tpu]"
.venv/bin/python -c "import jax; print(jax.__version__)"'

run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:emor3_jax.tar.gz" "${where[@]}" --worker=all
run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$install"
