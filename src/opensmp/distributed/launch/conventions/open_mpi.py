"""Open MPI, also inside the vendor's service, recognised by `OMPI_COMM_WORLD_RANK`."""

from __future__ import annotations

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

NAME = "Open MPI"
VARIABLES = tuple(
    f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
)
"""The variables of rank, size, local rank and local size."""


def _read(variables: Variables) -> Launch | None:
    if "OMPI_COMM_WORLD_RANK" not in variables:
        return None
    return launch_of(
        NAME,
        variables,
        **numbers(variables, *VARIABLES),
        meeting=master(variables),
        job=variables.text("PMIX_NAMESPACE") or common_ancestor("orted", "prted", "mpirun"),
        host=service_host(variables),
    )


LAUNCHER = Launcher(NAME, VARIABLES[0], _read, lambda variables: variables.pair(*VARIABLES[:2]))
