#!/usr/bin/env bash
# Prepares a Google Cloud project, once: APIs, a bucket, and a service account that may use it.
# What is there already stays as it is.
#
#   tpu/project.sh BUCKET --zone ZONE --project PROJECT [--dry-run]
#
#   BUCKET     name of the bucket for data and runs; it is made in the region of ZONE, with a
#              hierarchical namespace, in which a folder is renamed in one go (checkpoints need it)
#   --dry-run  prints the commands instead of running them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_more
[[ -n "$project" ]] || fail "--project is missing"

bucket="gs://$name"
account="emor3-tpu@$project.iam.gserviceaccount.com"

# Whether something is there; with --dry-run, nothing is.
there() {
  [[ "$dry_run" == false ]] && "$@" > /dev/null 2>&1
}

run gcloud services enable tpu.googleapis.com compute.googleapis.com storage.googleapis.com \
  iam.googleapis.com "--project=$project"
if ! there gcloud storage buckets describe "$bucket" "--project=$project"; then
  run gcloud storage buckets create "$bucket" "--project=$project" "--location=${zone%-*}" \
    --uniform-bucket-level-access --enable-hierarchical-namespace
fi
if ! there gcloud iam service-accounts describe "$account" "--project=$project"; then
  run gcloud iam service-accounts create emor3-tpu "--project=$project" \
    "--display-name=TPU VMs of emor3_jax"
fi
run gcloud storage buckets add-iam-policy-binding "$bucket" "--project=$project" \
  "--member=serviceAccount:$account" --role=roles/storage.objectUser
if [[ "$dry_run" == false ]]; then
  echo "ready: create.sh with --service-account $account; programs with --workdir=$bucket/…"
fi
