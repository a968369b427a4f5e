"""`smp.init` and `smp.shutdown`: the only way into and out of a world."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from opensmp import _private, hooks
from opensmp.config import Config
from opensmp.errors import AlreadyInitializedError
from opensmp.plan import Plan
from opensmp.plan.fit import check_partitions
from opensmp.runtime import devices, world

_logger = logging.getLogger("opensmp")

# Set for every process by Open MPI, by MPICH and its relatives, by torchrun and by Slurm's
# job steps, in this order.
_LAUNCHER_SIZES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)


def init(config: Mapping[str, Any] | None = None) -> None:
    """Reads the configuration and sets up the devices of this process.

    Call it once, right after the imports and before the first TensorFlow operation, variable
    or layer: the logical CPU devices on which partitions run cannot be made later.

    Each partition gets a GPU when there are any, else a logical CPU device (`devices="cpu"`
    asks for the latter). Without a value for `partitions` there is one per GPU, or one in
    all. Keys that are not in `config` come from the environment: `OPENSMP_<KEY>`, then the
    JSON object in `SM_HP_MP_PARAMETERS`.

    Running on GPUs has not been tested yet.

    Args:
        config: Keys and values as listed in `opensmp.config.Config`; everything is optional.

    Raises:
        ConfigError: The configuration has faults; all of them are listed, and nothing was
            changed.
        PlanError: A file that `plan` names cannot be read, is broken, or is for another
            number of partitions.
        AlreadyInitializedError: `init` was called before, or TensorFlow was used before and
            has too few devices.

    Example:
        ```python
        import opensmp as smp

        smp.init({"partitions": 2, "microbatches": 4})
        ```
    """
    if world.is_initialized():
        first = world.current("smp.init").config
        raise AlreadyInitializedError(
            "smp.init was called a second time. Expected: one call per process. Received first: "
            f"{first}. Remove one of the two calls, or call smp.shutdown() before the second one."
        )
    num_gpus = devices.count_gpus()
    resolved = Config.resolve(config, environ=os.environ, default_partitions=num_gpus or 1)
    _check_plans(resolved)
    assigned = devices.assign(resolved, num_gpus)
    devices.prepare(assigned)
    _private.place_updates_with_variables()
    world.set_current(world.World(config=resolved, devices=assigned))
    _logger.info("initialised: %s; partitions on %s", resolved, ", ".join(assigned))
    _warn_of_launcher(os.environ)


def shutdown() -> None:
    """Forgets the configuration, so that `smp.init` can be called again.

    Devices stay: TensorFlow cannot remove them, nor make more once it has run an operation.
    The next `smp.init` can therefore have at most as many partitions as there are devices.
    Models made before are partitioned again when they are called next; post-partition hooks
    that have not run are forgotten. Without a configuration nothing happens.

    Example:
        ```python
        smp.init({"partitions": 4})
        smp.shutdown()
        smp.init({"partitions": 2, "microbatches": 8})
        ```
    """
    world.clear()
    hooks.clear()


def _check_plans(config: Config) -> None:
    """Reads the plans that the configuration names, so that a fault shows at once."""
    named = dict(config.plan) if isinstance(config.plan, tuple) else {"": config.plan}
    for path in named.values():
        if path is not None:
            check_partitions(Plan.load(path), config.partitions)


def _warn_of_launcher(environ: Mapping[str, str]) -> None:
    """Says that processes started together do not form one world."""
    for variable in _LAUNCHER_SIZES:
        size = environ.get(variable, "")
        if size.isdecimal() and int(size) > 1:
            _logger.warning(
                "%s=%s: this looks like one of %s processes of a launcher, but each process "
                "runs the whole pipeline on its own, as rank 0 of 1. Start the script once, "
                "without the launcher.",
                variable,
                size,
                size,
            )
            return
