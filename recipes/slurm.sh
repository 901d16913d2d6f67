#!/usr/bin/env bash
# One stage on several nodes of a SLURM cluster, with one process per GPU. Two minutes before its time is over, the job
# saves a checkpoint and queues itself again; it goes on from there until all steps are made.
#
#   sbatch --nodes 4 --gpus-per-node 8 --time 24:00:00 recipes/slurm.sh \
#       pretrain_image_vae.py --config ldm --run_name big --cached_dataset /shared/cached_datasets/image_vae
#   sbatch --nodes 2 --gpus-per-node 0 --ntasks-per-node 1 recipes/slurm.sh ...     # CPUs, to try it
#
# It is started in the repository, which lies in a folder that all nodes see, as caches and runs do. docs/cluster.md
# says more.
#SBATCH --job-name=megatransformer
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

# Variables that a launcher would set; the others are those of each process. MASTER is the address of the first node
# where its name is not known to the others.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=${MASTER:-$MASTER_ADDR} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS
LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1} # may be "8(x2)"
export LOCAL_WORLD_SIZE=${LOCAL_WORLD_SIZE%%(*}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# The signal comes to this script alone, which sends the processes a SIGTERM: they save and end. A job that `scancel`
# ends gets SIGTERM itself, and is not queued again.
# Since SLURM 22.05 srun does not take the CPUs of a process from the job.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python "$@"' bash \
    "$@" --resume_from_checkpoint latest &
processes=$!
is_stopped=
trap 'is_stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
wait "$processes"
status=$?
if [ -n "$is_stopped" ]; then # The signal ended `wait`; the processes are still saving.
    trap "" USR1
    wait "$processes"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
