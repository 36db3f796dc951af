#!/usr/bin/env bash
# A PistoSeg job on SLURM: a Ray cluster on the job's nodes for as long as the command runs.
#
#   sbatch cluster/slurm.sh segment --model s3://BUCKET/models/bundle --slides s3://BUCKET/slides \
#       --out s3://BUCKET/results
#   sbatch --nodes=4 --gres=gpu:2 cluster/slurm.sh train --preset wsss4luad --data /project/wsss4luad \
#       --workspace /project/runs --set compute.train_workers=8 \
#       --set classifier.weights=/project/resnet38d.pth --set refiner.weights=/project/resnet38d.pth
#
# No hub has ResNet38d's ImageNet weights: put the published .pth file there, or take the light networks of
# --profile cpu.
#
# Everything after the script is a verb of pistoseg and its arguments. Data and workspace lie where all nodes see them:
# a shared file system or object storage. Keys come from the environment of `sbatch` (AWS_PROFILE, or a file that only
# you can read); nothing here writes them anywhere. PISTOSEG_VENV names the virtual environment, on a shared disk.
# A job that hit its time limit goes on when it is submitted again; --requeue does so after a node failure.
#SBATCH --job-name=pistoseg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=pistoseg-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch cluster/slurm.sh VERB [ARGUMENTS]; verbs: pistoseg --help" >&2
    exit 2
fi
source "${PISTOSEG_VENV:-.venv}/bin/activate"

# The token of this job's cluster: in the environment of its own processes, in no file and on no command line.
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
# One heap for all threads, so that what a network on a CPU frees is used again (pistoseg/memory.py).
export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-1}"

# `--exclusive` matters: at the end Ray is stopped on every node, whoever started it there.
# awk reads all names: with many of them `head` would end scontrol with SIGPIPE, and that this script.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
# Where Ray does not start, `ray symmetric-run` says so and exits with 0: the command itself notes that it succeeded.
# On the head: this script runs on the first node, where the TMPDIR of the shell of `sbatch` may not be.
notes=$(TMPDIR=/tmp mktemp --directory)
trap 'rm -rf "$notes"' EXIT
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 \
    ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    bash -c '"$@" && touch "$0"' "$notes/done" env RAY_ADDRESS="$address:6379" python -m pistoseg "$@"
if [ ! -e "$notes/done" ]; then
    echo "pistoseg did not run to its end: it was interrupted, or Ray did not start; see above" >&2
    exit 1
fi
