"""Slurm's `srun`, recognised by `SLURM_PROCID` and `SLURM_STEP_NUM_TASKS`."""

from __future__ import annotations

from opensmp.base.message_text import shown
from opensmp.distributed.launch.environment import Variables, first_host
from opensmp.distributed.launch.launch import Launch, Launcher, launch_of, master, numbers

NAME = "Slurm"
VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")
"""The variables of rank, size and local rank; there is none of local size."""


def _read(variables: Variables) -> Launch | None:
    # A batch script has SLURM_PROCID as well, but is one process: only srun creates steps.
    if "SLURM_PROCID" not in variables or "SLURM_STEP_NUM_TASKS" not in variables:
        return None
    job = f"{variables.text('SLURM_JOB_ID') or 0}.{variables.text('SLURM_STEP_ID') or 0}"
    return launch_of(
        NAME,
        variables,
        **numbers(variables, *VARIABLES),
        meeting=master(variables),
        job=f"slurm {job}",
        host=_first_node(variables),
    )


def _first_node(variables: Variables) -> str | None:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        nodes = variables.text(name)
        if nodes:
            try:
                return first_host(nodes)
            except ValueError as error:
                variables.faults.append(
                    f"{name} is {shown(nodes)}; expected a list of nodes as Slurm writes it, such "
                    f"as node[07-09,12]; {error}"
                )
                return None
    return None


LAUNCHER = Launcher(NAME, VARIABLES[0], _read)
