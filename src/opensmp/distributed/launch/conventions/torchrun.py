"""torchrun and its like, recognised by `RANK` and `WORLD_SIZE`."""

from __future__ import annotations

from opensmp.base.message_text import plain
from opensmp.distributed.launch.environment import Variables
from opensmp.distributed.launch.launch import Launch, Launcher, launch_of, master, numbers

NAME = "RANK and WORLD_SIZE"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""The variables of rank, size, local rank and local size."""


def _read(variables: Variables) -> Launch | None:
    if "RANK" not in variables or "WORLD_SIZE" not in variables:
        return None
    run = variables.text("TORCHELASTIC_RUN_ID")
    meeting = master(variables)
    if meeting is None and not variables.faults and variables.text("WORLD_SIZE") != "1":
        variables.faults.append(
            f"RANK={plain(variables.text('RANK'))} and "
            f"WORLD_SIZE={plain(variables.text('WORLD_SIZE'))} say that there are other "
            "processes, but not where. Expected: MASTER_ADDR and MASTER_PORT as well, the host "
            "of rank 0 and a free port on it"
        )
    return launch_of(
        NAME,
        variables,
        **numbers(variables, *VARIABLES),
        meeting=meeting,
        job="" if run in ("", "none") else f"torchrun {run}",
    )


LAUNCHER = Launcher(NAME, VARIABLES[0], _read, lambda variables: variables.pair(*VARIABLES[:2]))
