#!/bin/bash
#
# Train on SLURM, from a folder that all nodes share:
#
#   sbatch clusters/slurm.sh imagenet.so_vit_14 --name first \
#     --data.train /shared/train --data.val /shared/val --storage /shared/runs \
#     --scale.num-workers 16
#
# Some minutes before its time is over, or when it is preempted, the job writes a
# checkpoint, goes back into the queue and resumes there, as often as it takes. So does
# one that a node failed under. sbatch options given on the command line win over these.
#
#SBATCH --job-name=sovit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
# Ray takes the whole node: two Rays on one would take each other's ports.
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# To this script alone, that it reaches the training and not Ray beneath it. Preemption
# asks the same way with PreemptParameters=send_user_signal in slurm.conf.
#SBATCH --signal=B:TERM@300

# Statuses of sovit-train: ended after a checkpoint, and by SIGTERM before the first.
CHECKPOINTED=75 TERMINATED=143

bin=${SOVIT_BIN:-$PWD/.venv/bin}
export PATH=$bin:$PATH
name=slurm-$SLURM_JOB_ID options=()
while (($#)); do # the job's id stays when it is queued again, and so does its name
  case $1 in
    --name) name=$2; shift 2 ;;
    --name=*) name=${1#*=}; shift ;;
    *) options+=("$1"); shift ;;
  esac
done

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }'):${SOVIT_PORT:-6379}
# Ray listens on the cluster's network: a secret of this job keeps others' tasks out.
RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE RAY_AUTH_TOKEN

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Of the training's own process, which runs on this node, the job's first.
trap 'test -s "$scratch/pid" && kill -TERM "$(cat "$scratch/pid")"' TERM

srun --kill-on-bad-exit=0 ray symmetric-run --address "$address" \
  --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "${SLURM_CPUS_PER_TASK:-1}" \
  --disable-usage-stats -- \
  bash -c 'echo $$ > "$0" && export RAY_ADDRESS=$1 && shift && exec sovit-train "$@"' \
  "$scratch/pid" "$address" "${options[@]}" --resume "$name" &
step=$!
wait $step
status=$?
while kill -0 $step 2> /dev/null; do # a signal ended the wait, not the step
  wait $step
  status=$?
done
if [[ ! -s $scratch/pid ]]; then # symmetric-run ends with 0 all the same
  echo "job $SLURM_JOB_ID: Ray did not start, see above" >&2
  exit 1
fi
if [[ $status == "$CHECKPOINTED" || $status == "$TERMINATED" ]]; then
  echo "job $SLURM_JOB_ID goes back into the queue, run $name"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
