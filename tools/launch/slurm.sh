#!/usr/bin/env bash
# A run on a SLURM cluster, one process a GPU; needs sbatch on this machine.
#
#   export NAME=xl NODES=4 GPUS=8 PARTITION=gpu     # PARTITION may be unset
#   tools/launch/slurm.sh install   # a virtual environment in VENV, on a disk
#                                   # that all nodes see
#   tools/launch/slurm.sh run --gin_file=recipes/glue.gin --gin.MODEL_DIR=...
#   tools/launch/slurm.sh logs      # of host 0; HOST=3 for another
#   tools/launch/slurm.sh stop      # SIGTERM: all save and stop
#   tools/launch/slurm.sh delete    # cancels at once
#
# tools/launch/slurm.sh --print ACTION prints the commands instead. There is
# nothing to create: run asks for the nodes. HOURS is the limit (24); five
# minutes before it the run saves and stops, and the same command goes on. COMMAND
# is train, eval or infer; PYTHON (3.11 or later) makes the environment.

set -euo pipefail
source "$(dirname "$0")/common.sh"
NAME=${NAME:-fat5_jax}
VENV=${VENV:-$ROOT/.venv-slurm}
COMMAND=${COMMAND:-train}

case $ACTION in
  create) echo "nothing to create: run asks for the nodes" ;;
  install)
    run "${PYTHON:-python3}" -m venv "$VENV"
    run "$VENV/bin/python" -m pip install --quiet -e "$ROOT[${EXTRA:-gpu}]"
    ;;
  run)
    # The command finds the hosts by SLURM's variables.
    write "$NAME.sbatch" << END
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=${NODES:-1}
#SBATCH --ntasks-per-node=${GPUS:-8}
#SBATCH --gpus-per-node=${GPUS:-8}
#SBATCH --time=${HOURS:-24}:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=$NAME.%j.out
${PARTITION:+#SBATCH --partition=$PARTITION}
srun --output=$NAME.%j.%t.log $VENV/bin/python -m fat5_jax.$COMMAND $(quoted "$@")
END
    run sbatch "$NAME.sbatch"
    ;;
  logs) run bash -c "tail -n 100 -F $NAME.*.${HOST:-0}.log" ;;
  stop) run scancel --signal=TERM --name="$NAME" ;;
  delete) run scancel --name="$NAME" ;;
  *) die "no action $ACTION; --help tells them" ;;
esac
