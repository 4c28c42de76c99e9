#!/usr/bin/env bash
# A Slurm cluster of two nodes on this host, for tests. Needs no systemd, no cgroups and no database; runs in a container.
#
#   setup.sh install              installs slurm-wlm and munge (Debian, root); nothing is started and no service is changed
#   setup.sh start FOLDER [PID]   starts munged, slurmctld and two slurmd, all of whose files are in FOLDER (a short
#                                 path); they end when process PID does, however it ends
#   setup.sh stop FOLDER          cancels what runs and ends the daemons
#
# After start: export SLURM_CONF=FOLDER/slurm.conf, and sbatch, srun, squeue and scancel work.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # where the daemons are; not every user looks there

install() {
  command -v sbatch slurmctld slurmd munged >/dev/null && return
  export DEBIAN_FRONTEND=noninteractive
  local packages=(slurm-wlm munge)
  local get=(apt-get -qq -o DPkg::Lock::Timeout=60)
  # No service of the packages is to start: invoke-rc.d asks this file.
  local policy=/usr/sbin/policy-rc.d made=
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    made=$policy
  fi
  local code=0
  "${get[@]}" install -y --no-install-recommends "${packages[@]}" ||
    { "${get[@]}" update && "${get[@]}" install -y --no-install-recommends "${packages[@]}"; } || code=$?
  rm -f ${made:+"$made"}
  return $code
}

free_ports() {
  python3 -c '
import socket
held = [socket.socket() for _ in range(3)]
for s in held: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in held))'
}

start() {
  local folder=$1 host ports
  mkdir -p "$folder/state"
  folder=$(cd "$folder" && pwd)
  host=$(hostname -s)
  read -ra ports < <(free_ports)
  head -c 1024 /dev/urandom >"$folder/munge.key"
  chmod 600 "$folder/munge.key"
  # A node's name must be known, since JAX connects to the first one of a job: 127.1 is a way to write 127.0.0.1.
  # cred_expire is also how long a requeued job waits before it starts again: 120 s by default, 5 s at least.
  cat >"$folder/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=0
KillWait=60
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdSpoolDir=$folder/%n
SlurmdPidFile=$folder/%n.pid
SlurmdLogFile=$folder/%n.log
NodeName=127.1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=2 State=UNKNOWN
NodeName=127.2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=127.1,127.2 Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF=$folder/slurm.conf
  # --force: a folder that only its owner may enter is a warning then, not an error.
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
    --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" 2>>"$folder/munge.log"
  slurmctld
  slurmd -N 127.1
  slurmd -N 127.2
  if [[ ${2:-} ]]; then
    setsid bash -c 'while kill -0 "$1"; do sleep 1; done; [[ -e $3/slurm.conf ]] && exec "$2" stop "$3"' - "$2" "$0" "$folder" &>/dev/null </dev/null &
  fi
  for _ in {1..100}; do
    [[ $(sinfo --noheader --format=%T --Node 2>/dev/null | sort -u) == idle ]] && return
    sleep 0.1
  done
  echo "setup.sh: the nodes do not get idle; see $folder/*.log" >&2
  tail -v -n 5 "$folder"/*.log >&2
  return 1
}

stop() {
  local folder=$1 pid file
  export SLURM_CONF=$folder/slurm.conf
  scancel --user="$(id -un)" --signal=KILL --full 2>/dev/null || true
  scancel --user="$(id -un)" 2>/dev/null || true
  for _ in {1..100}; do
    [[ -z $(squeue --noheader 2>/dev/null) ]] && break
    sleep 0.1
  done
  for file in "$folder"/{127.1,127.2,slurmctld,munge}.pid; do
    pid=$(cat "$file" 2>/dev/null) && kill "$pid" 2>/dev/null || continue
    for _ in {1..50}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  done
}

"${1:?usage: setup.sh install | start FOLDER [PID] | stop FOLDER}" "${@:2}"
