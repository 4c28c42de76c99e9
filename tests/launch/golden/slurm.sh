mkdir -p '/mnt/it is 50%/tiny/slurm' '/mnt/it is 50%/tiny/logs'
cat >'/mnt/it is 50%/tiny/slurm/tiny-e0f232c009c1.sh' <<'end-of-tiny-e0f232c009c1'
#!/usr/bin/env bash
#SBATCH --job-name=tiny-e0f232c009c1
#SBATCH --output="/mnt/it is 50%%/tiny/logs/tiny-e0f232c009c1_%a.log"
#SBATCH --open-mode=append
#SBATCH --array=0-0
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1

export PATH='/opt/slm jax/bin':$PATH PYTHONUNBUFFERED=1
case $SLURM_ARRAY_TASK_ID in
0)
  locks=('/mnt/it is 50%/tiny/arms/0123456789ab/lock')
  worker=(python tiny '--config.name=a b' '--workdir=/mnt/it is 50%/tiny' --arm=0123456789ab)
  ;;
esac
trap : TERM # the worker is told as well, saves and leaves; this script stays for what comes then
for lock in "${locks[@]}"; do
  flock --timeout=600 "$lock" true # after a requeue, the process before may still be on its way out elsewhere
done
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
echo "$(date --iso-8601=seconds) $(hostname), job $task, restart ${SLURM_RESTART_COUNT:-0}: ${worker[*]@Q}"
srun --cpus-per-task=1 "${worker[@]}"
code=$?
echo "$(date --iso-8601=seconds) the worker ended with $code"
if ((code == 42 || code > 127)); then # preempted or killed; 0 is done, all else would end like that again
  for _ in {1..720}; do # the controller may be down for a while
    state=$(squeue --noheader --array --jobs="$task" --format='%T %r') && break
    sleep 5
  done
  # Another state: it was cancelled, and scontrol would bring it back; or Slurm itself is queueing it again.
  if [[ $state == 'RUNNING '* || $state == *' TimeLimit' ]]; then
    if ((${SLURM_RESTART_COUNT:-0} >= 20)); then
      echo 'not queued again: --slurm_restarts=20'
    else
      scontrol requeue "$task"
    fi
  fi
fi
exit $code
end-of-tiny-e0f232c009c1
job1=$(sbatch --parsable '/mnt/it is 50%/tiny/slurm/tiny-e0f232c009c1.sh')
cat >'/mnt/it is 50%/tiny/slurm/tiny-790c1cac38f5.sh' <<'end-of-tiny-790c1cac38f5'
#!/usr/bin/env bash
#SBATCH --job-name=tiny-790c1cac38f5
#SBATCH --output="/mnt/it is 50%%/tiny/logs/tiny-790c1cac38f5_%a.log"
#SBATCH --open-mode=append
#SBATCH --array=0-0
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1

export PATH='/opt/slm jax/bin':$PATH PYTHONUNBUFFERED=1
case $SLURM_ARRAY_TASK_ID in
0)
  locks=('/mnt/it is 50%/tiny/arms/ba9876543210/lock')
  worker=(python tiny '--config.name=a b' '--workdir=/mnt/it is 50%/tiny' --arm=ba9876543210)
  ;;
esac
trap : TERM # the worker is told as well, saves and leaves; this script stays for what comes then
for lock in "${locks[@]}"; do
  flock --timeout=600 "$lock" true # after a requeue, the process before may still be on its way out elsewhere
done
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
echo "$(date --iso-8601=seconds) $(hostname), job $task, restart ${SLURM_RESTART_COUNT:-0}: ${worker[*]@Q}"
srun --cpus-per-task=1 "${worker[@]}"
code=$?
echo "$(date --iso-8601=seconds) the worker ended with $code"
if ((code == 42 || code > 127)); then # preempted or killed; 0 is done, all else would end like that again
  for _ in {1..720}; do # the controller may be down for a while
    state=$(squeue --noheader --array --jobs="$task" --format='%T %r') && break
    sleep 5
  done
  # Another state: it was cancelled, and scontrol would bring it back; or Slurm itself is queueing it again.
  if [[ $state == 'RUNNING '* || $state == *' TimeLimit' ]]; then
    if ((${SLURM_RESTART_COUNT:-0} >= 20)); then
      echo 'not queued again: --slurm_restarts=20'
    else
      scontrol requeue "$task"
    fi
  fi
fi
exit $code
end-of-tiny-790c1cac38f5
job2=$(sbatch --parsable "--dependency=afterok:${job1}_0" '/mnt/it is 50%/tiny/slurm/tiny-790c1cac38f5.sh')
cat >'/mnt/it is 50%/tiny/slurm/tiny-f5bca12226b7.sh' <<'end-of-tiny-f5bca12226b7'
#!/usr/bin/env bash
#SBATCH --job-name=tiny-f5bca12226b7
#SBATCH --output="/mnt/it is 50%%/tiny/logs/tiny-f5bca12226b7_report.log"
#SBATCH --open-mode=append

export PATH='/opt/slm jax/bin':$PATH PYTHONUNBUFFERED=1
python -m launch.report '/mnt/it is 50%/tiny'
end-of-tiny-f5bca12226b7
job3=$(sbatch --parsable "--dependency=afterany:${job1}:${job2}" '/mnt/it is 50%/tiny/slurm/tiny-f5bca12226b7.sh')
