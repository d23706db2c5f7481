"""A batch script for Slurm: one Ray cluster over the nodes of a job, started by ``ray symmetric-run``.

Before the time limit Slurm sends a signal to the script alone, which passes it on to the driver; the driver writes a
checkpoint and ends, and the script puts the job back into the queue, where it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.deployment.jobs import STOP_WAIT_S
from orchestrator.deployment.node_groups import NodeGroup

HOURS = 24
PORT = 6379

_SCRIPT = """\
#!/bin/bash
# Made by euphonium render --to slurm. Submit it with sbatch in the folder of the checkout, whose environment has `ray`
# and `python` on the path; the folder and the runs are on storage that all nodes share.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --cpus-per-task={cpus}
#SBATCH --mem={memory}
#SBATCH --exclusive
#SBATCH --time={hours}:00:00
#SBATCH --signal=B:TERM@{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Who reaches the cluster's ports needs this token.
state=$(mktemp -d "$PWD/.{name}-$SLURM_JOB_ID-XXXXXX")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/token" STATE="$state"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH")
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# The head is the node of this script, so that the driver can be signalled from here.
address=$(hostname -I | awk '{{print $1}}')
export ADDRESS="$address:{port}" NODES={nodes}

asked_to_stop=
# shellcheck disable=SC2317  # the trap calls it
stop() {{
  asked_to_stop=yes
  if [[ -s $state/driver ]]; then
    kill -TERM "$(cat "$state/driver")" || true
  fi
}}
trap stop TERM

start=$(cat <<'NODE'
set -eu
case $SLURM_NODEID in
{cases}
esac
exec ray symmetric-run --address "$ADDRESS" --min-nodes "$NODES" --num-cpus={ray_cpus}{gpu_flag} \\
  --object-store-memory={store} --labels "$labels" --resources "$resources" -- \\
  bash -c 'echo $$ > "$STATE/driver"; export RAY_ADDRESS="$ADDRESS"; exec {command}'
NODE
)
srun bash -c "$start" &
step=$!

# A signal ends the wait, not what is waited for.
while :; do
  if wait "$step"; then status=0; else status=$?; fi
  kill -0 "$step" 2> /dev/null || break
done
rm -rf "$state"

if [[ $asked_to_stop && $status -eq 0 ]]; then
  echo "stopped with a checkpoint before the time limit; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def sbatch(name: str, command: str, groups: Sequence[NodeGroup]) -> str:
    """The script's text.

    Args:
        name: name of the job.
        command: the driver's command.
        groups: nodes, the driver's and learner's first.
    """
    nodes = sum(group.nodes for group in groups)
    gpus = max(group.gpus for group in groups)
    cpus = max(group.cpus for group in groups)
    return _SCRIPT.format(
        name=name,
        nodes=nodes,
        gpus=f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
        cpus=cpus,
        ray_cpus=cpus,
        gpu_flag=f" --num-gpus={gpus}" if gpus else "",
        memory=f"{max(group.host_gib for group in groups)}G",
        hours=HOURS,
        grace=STOP_WAIT_S,
        port=PORT,
        store=max(group.store_gib for group in groups) << 30,
        cases="\n".join(_cases(groups)),
        command=command.replace("'", "'\\''"),
    )


def _cases(groups: Sequence[NodeGroup]) -> list[str]:
    """A branch a group of nodes, by the nodes' numbers within the job."""
    lines, first = [], 0
    for group in groups:
        numbers = "|".join(str(number) for number in range(first, first + group.nodes))
        labels = ",".join(f"{name}={value}" for name, value in group.labels.items())
        resources = ", ".join(f'"{name}": {amount}' for name, amount in group.resources.items())
        lines.append(f"  {numbers}) labels='{labels}' resources='{{{resources}}}' ;;")
        first += group.nodes
    return lines
