#!/usr/bin/env bash
# A Cloud TPU slice from creation to deletion; needs gcloud.
#
#   export NAME=xxl ZONE=us-west4-a TYPE=v5litepod-256 BUCKET=my-bucket
#   tools/launch/tpu.sh create      # SPOT=1 for a preemptible one
#   tools/launch/tpu.sh install     # this checkout on every host, BUCKET at /data
#   tools/launch/tpu.sh run --gin_file=recipes/xxl_v5e.gin \
#     --gin.MODEL_DIR=/data/runs/xxl ...
#   tools/launch/tpu.sh logs        # of host 0; HOST=3 for another
#   tools/launch/tpu.sh stop        # SIGTERM to one host: all save and stop
#   tools/launch/tpu.sh delete
#
# tools/launch/tpu.sh --print ACTION prints the commands instead. VERSION is the
# TPU VM's software (v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, tpu-ubuntu2204-base);
# COMMAND is train, eval or infer. After a preemption: create, install, run
# again; the run goes on from its last checkpoint.

set -euo pipefail
source "$(dirname "$0")/common.sh"
: "${NAME:?set NAME}" "${ZONE:?set ZONE}"
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
COMMAND=${COMMAND:-train}
VM=(gcloud compute tpus tpu-vm)

on() { # HOSTS COMMAND
  run "${VM[@]}" ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

case $ACTION in
  create)
    run "${VM[@]}" create "$NAME" --zone="$ZONE" \
      --accelerator-type="${TYPE:?set TYPE, as v5litepod-256}" \
      --version="$VERSION" ${SPOT:+--spot}
    ;;
  install)
    run git -C "$ROOT" archive --format=tar.gz -o /tmp/fat5_jax.tgz HEAD
    run "${VM[@]}" scp /tmp/fat5_jax.tgz "$NAME:" --zone="$ZONE" --worker=all
    # The VM's Python is older than ours; uv brings one.
    on all "mkdir -p fat5_jax && tar xzf fat5_jax.tgz -C fat5_jax &&
      python3 -m pip install --quiet --user uv &&
      ~/.local/bin/uv venv --quiet --clear --python 3.12 venv &&
      ~/.local/bin/uv pip install --quiet --python venv -e 'fat5_jax[tpu]'"
    # MODEL_DIR must be a folder that all hosts see.
    if [[ -n ${BUCKET:-} ]]; then
      on all "sudo mkdir -p /data && sudo chown \$USER /data &&
        (mountpoint -q /data || gcsfuse --implicit-dirs \
        --rename-dir-limit=100000 $BUCKET /data)"
    fi
    ;;
  run)
    on all "nohup venv/bin/python -m fat5_jax.$COMMAND $(quoted "$@") \
      > fat5_jax.log 2>&1 < /dev/null &"
    ;;
  logs) on "${HOST:-0}" "tail -n 100 -F fat5_jax.log" ;;
  stop) on "${HOST:-0}" "pkill -TERM -f '[f]at5_jax.$COMMAND'" ;;
  delete) run "${VM[@]}" delete "$NAME" --zone="$ZONE" --quiet ;;
  *) die "no action $ACTION; --help tells them" ;;
esac
