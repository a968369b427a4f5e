"""`opensmp run`, recognised by `OPENSMP_RUN_RANK`."""

from __future__ import annotations

from opensmp.config import LAUNCHER_PREFIX as PREFIX
from opensmp.distributed.launch.environment import Variables
from opensmp.distributed.launch.launch import Launch, Launcher, launch_of, numbers

NAME = "opensmp run"
VARIABLES = tuple(f"{PREFIX}{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
"""The variables of rank, size, local rank and local size."""


def _read(variables: Variables) -> Launch | None:
    if f"{PREFIX}RANK" not in variables:
        return None
    return launch_of(
        NAME,
        variables,
        **numbers(variables, *VARIABLES),
        meeting=variables.address(f"{PREFIX}MEETING"),
    )


LAUNCHER = Launcher(NAME, VARIABLES[0], _read)
