#!/bin/bash
# Run the three jobs of `o2cap reproduce check` through a real Slurm, with this
# machine as controller and only node, and print what happened.
#
#   tests/slurm/trial.sh [--install]
#
# Needs root and Debian's slurmctld, slurmd, slurm-client, munge; --install fetches
# them. Configuration, keys, daemons' logs and results live in a temporary folder, with
# a link to it from /etc/slurm/slurm.conf, where a job looks; all are gone at the end.
# PYTHON names the interpreter. Exit code 77: a trial cannot be had here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
checkout=$PWD
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
packages="slurmctld slurmd slurm-client munge"

if [[ ${1:-} == --install ]]; then
  apt-get install -y --no-install-recommends $packages >/dev/null
fi
for tool in slurmctld slurmd sbatch munged; do
  if [[ $EUID != 0 ]] || ! command -v "$tool" >/dev/null; then
    echo "needs root and Debian's $packages ($tool is missing, or this is not root)"
    exit 77
  fi
done

if [[ -e /etc/slurm/slurm.conf ]]; then
  echo "this machine belongs to a Slurm cluster (/etc/slurm/slurm.conf); left alone"
  exit 77
fi

trial=$(mktemp -d /tmp/o2cap-slurm-XXXXXX)
node=$(hostname -s)
daemons=()
finish() {
  for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$trial" /etc/slurm/slurm.conf
}
trap finish EXIT
# What is printed names no folder and no machine.
say() {
  sed -u -e "s#$trial#TRIAL#g; s#$python#PYTHON#g; s#$checkout#CHECKOUT#g" \
    -e "s#\b$node\b#NODE#g; s#${python%/bin/*}#ENVIRONMENT#g"
}

# munge, which signs what Slurm's daemons tell each other
mkdir -m 700 "$trial/munge"
mkdir "$trial/state" "$trial/spool"
chmod 755 "$trial"
dd if=/dev/urandom of="$trial/munge/key" bs=128 count=1 status=none
chmod 400 "$trial/munge/key"
chmod 711 "$trial/munge"
munged --foreground --force --key-file="$trial/munge/key" \
  --socket="$trial/munge/socket" --pid-file="$trial/munge/pid" \
  --log-file="$trial/munge/log" --seed-file="$trial/munge/seed" \
  2>"$trial/munge.err" &
daemons+=($!)

cat >"$trial/slurm.conf" <<CONF
ClusterName=trial
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$((20000 + RANDOM % 5000))
SlurmdPort=$((25000 + RANDOM % 5000))
AuthType=auth/munge
AuthInfo=socket=$trial/munge/socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation=$trial/state
SlurmdSpoolDir=$trial/spool
SlurmctldPidFile=$trial/slurmctld.pid
SlurmdPidFile=$trial/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$(free -m | awk '/^Mem/ {print $2}')
PartitionName=trial Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p /etc/slurm
ln -sfn "$trial/slurm.conf" /etc/slurm/slurm.conf
slurmctld -D >"$trial/slurmctld.log" 2>&1 &
daemons+=($!)
slurmd -D >"$trial/slurmd.log" 2>&1 &
daemons+=($!)
for _ in {1..60}; do
  [[ $(sinfo -h -o %t 2>/dev/null) == idle ]] && break
  sleep 1
done
{
  slurmctld -V
  sinfo
} 2>&1 | say
if [[ $(sinfo -h -o %t) != idle ]]; then
  tail -n 20 "$trial"/*.log "$trial"/munge.err | say
  exit 1
fi

code=0
"$python" -m o2cap reproduce check --profile reproduce/profiles/slurm \
  --output "$trial/out" 2>&1 | say || code=$?
echo "--- what Slurm says of the jobs"
scontrol show jobs | grep -oE 'JobId=[0-9]+|JobState=\w+|RunTime=\S+' | paste - - - | say
echo "--- records: $(ls "$trial"/out/jobs/*/record.json 2>/dev/null | wc -l) of 3"
if [[ $code != 0 ]]; then
  find "$trial" -name "*.log" -o -name log.txt | xargs tail -n 20 | say
fi
exit $code
