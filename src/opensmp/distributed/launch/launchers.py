"""Detects the launcher that started this process.

Every launcher sets variables of its own; a module of `conventions/` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping

from opensmp.config import LAUNCHER_PREFIX as PREFIX
from opensmp.distributed.launch.conventions import (
    mpich,
    open_mpi,
    own,
    slurm,
    tf_config,
    torchrun,
)
from opensmp.distributed.launch.environment import Variables
from opensmp.distributed.launch.launch import Launch, Launcher
from opensmp.errors import LaunchError

_CLAIM = f"{PREFIX}CLAIMED_BY"

LAUNCHERS: tuple[Launcher, ...] = (
    own.LAUNCHER,
    tf_config.LAUNCHER,
    open_mpi.LAUNCHER,
    torchrun.LAUNCHER,
    mpich.LAUNCHER,
    slurm.LAUNCHER,
)
"""All launchers; of those that have set variables, the first one counts."""

ALONE = Launch("no launcher", local_rank=0, local_size=1)
"""A process without a launcher."""


def detect(environ: Mapping[str, str]) -> Launch:
    """Reads the variables of all known launchers; `ALONE` if there is none.

    Of nested launchers, such as `mpirun` in a Slurm job, the inner one started the process, so that
    the more specific variables take precedence. A size of 1 is the same as no launcher.
    """
    if f"{PREFIX}RANK" not in environ:
        _check_agreement(environ)
    for launcher in LAUNCHERS:
        launch = launcher.read(Variables(environ))
        if launch is not None:
            return launch if launch.size > 1 else ALONE
    return ALONE


def claim(launch: Launch, environ: MutableMapping[str, str], process: int) -> None:
    """Records in the environment, which child processes inherit, that this process is its rank."""
    place = json.dumps([launch.source, launch.rank, launch.size, launch.meeting, launch.token])
    owner, _, claimed = environ.get(_CLAIM, "").partition(" ")
    if claimed == place and owner != str(process):
        raise LaunchError(
            f"smp.init: process {owner} is rank {launch.rank} of this run already; process "
            f"{process}, which it has started, cannot be the same rank. Expected: smp.init in the "
            "rank itself only. If multiprocessing runs the script anew in its workers, call "
            'smp.init under `if __name__ == "__main__":`. A program of its own must be started '
            f"without the variables of the launcher, such as `env -u {_rank_variable(launch)} "
            "python other.py`."
        )
    environ[_CLAIM] = f"{process} {place}"


def _rank_variable(launch: Launch) -> str:
    return next(each.rank_variable for each in LAUNCHERS if each.name == launch.source)


def _check_agreement(environ: Mapping[str, str]) -> None:
    """Raises if the variables of several launchers describe different processes."""
    said: dict[str, tuple[int, int]] = {}
    for launcher in sorted(LAUNCHERS, key=lambda each: each.rank_variable):
        place = launcher.place(Variables(environ)) if launcher.place is not None else None
        if place is not None and place[1] > 1:
            said[launcher.name] = place
    if len(set(said.values())) > 1:
        text = ", ".join(f"{name} rank {rank} of {size}" for name, (rank, size) in said.items())
        raise LaunchError(
            f"The variables of several launchers contradict each other: {text}. Expected: those of "
            "the one that started this process. Remove the others, which an earlier run or the "
            "shell may have left, from the environment."
        )
