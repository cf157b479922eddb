#!/bin/bash
# A run on the nodes of one Slurm job: a Ray cluster of its own, closed by a token, and `preceptor train` on it.
#
#   sbatch --nodes=3 examples/cluster/slurm.sh /shared/run.toml NAME [section.field=value ...]
#
# The same command again goes on with run NAME from its last checkpoint. Overrides may be added; RUNS is where runs are
# written, on storage that all nodes share. `ray`, `python` and `preceptor` must be on PATH on every node.
#SBATCH --job-name=preceptor
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@900
# The last line: SIGTERM to this script 15 minutes before the time is up, enough for a step and a checkpoint.
set -euo pipefail

run_file=${1:?usage: sbatch slurm.sh RUN.toml NAME [section.field=value ...]}
name=${2:?usage: sbatch slurm.sh RUN.toml NAME [section.field=value ...]}
shift 2
runs=${RUNS:-/shared/runs}
nodes=${SLURM_JOB_NUM_NODES}
port=6379
head=$(hostname)
address=$(hostname --ip-address | awk '{print $1}')

# In a file of this user's own, since environments are shown by ps and scontrol.
umask 077
token_folder=$(mktemp -d "${runs}/token-${SLURM_JOB_ID}-XXXXXX")
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "${token_folder}/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${token_folder}/token
steps=()
end_cluster() {
    kill "${steps[@]}" 2> /dev/null || true
    rm -rf "${token_folder}"
}
trap end_cluster EXIT

srun --nodes=1 --ntasks=1 --nodelist="${head}" --cpus-per-task="${SLURM_CPUS_ON_NODE}" \
    ray start --head --node-ip-address="${address}" --port="${port}" --block &
steps+=($!)
if ((nodes > 1)); then
    srun --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="${head}" --cpus-per-task="${SLURM_CPUS_ON_NODE}" \
        ray start --address="${address}:${port}" --block &
    steps+=($!)
fi

export RAY_ADDRESS=${address}:${port}
for attempt in {1..60}; do
    if python -c 'import ray, sys
ray.init("auto", log_to_driver=False, logging_level="ERROR")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))' "${nodes}" 2> /dev/null; then
        break
    fi
    if ((attempt == 60)); then
        echo "not all of the ${nodes} nodes have joined the Ray cluster" >&2
        exit 1
    fi
    sleep 5
done

if [[ -e ${runs}/${name}/config.json ]]; then
    preceptor train --resume "${runs}/${name}" "$@" &
else
    preceptor train "${run_file}" "run.directory=${runs}" "run.name=${name}" "$@" &
fi
run=$!
trap 'kill -TERM "${run}"' TERM
code=0
wait "${run}" || code=$?
# A trap ends the first wait; the run's own end is what counts.
while kill -0 "${run}" 2> /dev/null; do
    code=0
    wait "${run}" || code=$?
done
exit "${code}"
