#!/usr/bin/env bash
# What the other scripts run on each worker of a TPU, in ~/emor3_jax.
#
#   tpu/worker.sh install             packages, gcsfuse, the Python environment
#   tpu/worker.sh start [--replace] ARGUMENTS OF PYTHON
#                                     in the background; gs://BUCKET/… in an argument becomes
#                                     ~/gcs/BUCKET/…, where the bucket is mounted first.
#                                     A program that still runs is an error, or ended by --replace
#   tpu/worker.sh state               prints "run: " and none (never started), running, ended with
#                                     its exit status, or gone; " asked" follows after a stop
#   tpu/worker.sh stop                asks the program to end after its step, with a checkpoint
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p logs

alive() {
  [[ -s logs/run.pid && ! -e logs/run.status ]] && kill -0 "$(< logs/run.pid)" 2> /dev/null
}

# Retries what fails while a new machine still updates itself.
patiently() {
  local try
  for try in $(seq 30); do
    if "$@"; then return; fi
    echo "try $try of 30 failed: $*" >&2
    sleep 10
  done
  return 1
}

install() {
  local key=/usr/share/keyrings/cloud.google.asc source=https://packages.cloud.google.com/apt
  curl -fsSL "$source/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  patiently sudo apt-get update -qq
  patiently sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
    python3.11 python3.11-venv gcsfuse
  python3.11 -m venv .venv
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet --editable ".[tpu]"
  .venv/bin/python -c "import jax; print('jax', jax.__version__)"
}

# Mounts a bucket at ~/gcs/BUCKET. Nothing about files is remembered, so that each worker sees at
# once what another has written; a checkpoint's folder is renamed in one go.
mount_bucket() {
  local folder="$HOME/gcs/$1"
  mkdir -p "$folder"
  if mountpoint -q "$folder"; then return; fi
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --kernel-list-cache-ttl-secs=0 "$1" "$folder"
}

start() {
  local replace=false arguments=() argument rest
  if [[ "${1:-}" == --replace ]]; then replace=true; shift; fi
  if alive; then
    if [[ "$replace" == false ]]; then
      echo "error: a program still runs here: wait for its end, or tpu/stop.sh" >&2
      exit 3
    fi
    end
  fi
  for argument in "$@"; do
    rest="$argument"
    while [[ "$rest" =~ gs://([^/,]+) ]]; do
      mount_bucket "${BASH_REMATCH[1]}"
      rest="${rest#*gs://}"
    done
    arguments+=("${argument//gs:\/\//$HOME/gcs/}")
  done
  rm -f logs/run.pid logs/run.status logs/run.stop
  if [[ -e logs/run.log ]]; then mv logs/run.log logs/run.previous.log; fi
  # The inner shell outlives this one, and keeps the exit status of the program.
  # shellcheck disable=SC2016
  nohup bash -c '.venv/bin/python "$@" & echo $! > logs/run.pid; wait $!; echo $? > logs/run.status' \
    bash "${arguments[@]}" > logs/run.log 2>&1 < /dev/null &
  until [[ -s logs/run.pid ]]; do sleep 0.1; done
}

# Ends what runs here: after its step, or after two minutes without asking. Its status is waited
# for too: written later, it would be taken for the status of what is started next.
end() {
  local pid second
  pid="$(< logs/run.pid)"
  kill -TERM "$pid" 2> /dev/null || true
  for second in $(seq "${PATIENCE:-120}"); do
    alive || break
    sleep 1
  done
  if alive; then
    echo "ended without a checkpoint after $second seconds" >&2
    kill -KILL "$pid" 2> /dev/null || true
  fi
  # Of a program whose shell was killed as well, no status ever comes.
  for second in $(seq 100); do
    if [[ -e logs/run.status ]]; then return; fi
    sleep 0.1
  done
}

state() {
  local said=none
  if [[ -e logs/run.status ]]; then
    said="ended $(< logs/run.status)"
  elif alive; then
    said=running
  elif [[ -e logs/run.pid ]]; then
    said=gone
  fi
  if [[ -e logs/run.stop ]]; then said+=" asked"; fi
  echo "run: $said"
}

stop() {
  if ! alive; then
    echo "nothing runs here"
    return
  fi
  touch logs/run.stop
  kill -TERM "$(< logs/run.pid)"
}

task="${1:-}"
shift || true
case "$task" in
  install | start | state | stop) "$task" "$@" ;;
  *)
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
    if [[ "$task" == --help || "$task" == -h ]]; then exit 0; fi
    exit 2
    ;;
esac
