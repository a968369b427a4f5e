"""MPICH and its relatives, recognised by `PMI_RANK`."""

from __future__ import annotations

from opensmp.distributed.launch.conventions import slurm
from opensmp.distributed.launch.environment import Variables
from opensmp.distributed.launch.launch import (
    Launch,
    Launcher,
    common_ancestor,
    launch_of,
    master,
    numbers,
    service_host,
)

NAME = "MPICH"
VARIABLES = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
"""The variables of rank, size, local rank and local size."""


def _read(variables: Variables) -> Launch | None:
    if "PMI_RANK" not in variables or "PMI_SIZE" not in variables:
        return None
    place = variables.pair(*VARIABLES[:2])
    if place is not None and place == variables.pair(*slurm.VARIABLES[:2]):
        return None  # srun may set MPICH's variables for all tasks
    host = service_host(variables)
    hosts = variables.text("SM_HOSTS")
    return launch_of(
        NAME,
        variables,
        **numbers(variables, *VARIABLES),
        meeting=master(variables),
        # MPICH has no run id; on one machine its proxy is an ancestor of all ranks.
        job=f"service {hosts}" if host else common_ancestor("hydra", "mpiexec"),
        host=host,
    )


LAUNCHER = Launcher(NAME, VARIABLES[0], _read, lambda variables: variables.pair(*VARIABLES[:2]))
