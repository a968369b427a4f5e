"""Pipeline model parallelism for Keras models on TensorFlow.

Example:
    ```python
    import opensmp as smp

    smp.init({"partitions": 2, "microbatches": 4})
    ```
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from opensmp.base.requirements import require_installed
from opensmp.base.versions import OWN as _OWN

if TYPE_CHECKING:
    from opensmp.api.names import *

# The command line says itself what is missing: `opensmp doctor` is for that.
if os.path.basename((sys.argv or [""])[0]) not in ("opensmp", "-m"):
    require_installed()

__version__ = _OWN

__all__ = [
    "DP_GROUP",
    "MP_GROUP",
    "PP_GROUP",
    "RDP_GROUP",
    "TP_GROUP",
    "WORLD",
    "AlreadyInitializedError",
    "CheckFinite",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointOnPreemption",
    "Cluster",
    "CommGroup",
    "CommunicationError",
    "Config",
    "ConfigError",
    "DistributedModel",
    "LaunchError",
    "MemoryReport",
    "NonFiniteError",
    "NotInitializedError",
    "OnRankZero",
    "PartitionError",
    "Plan",
    "PlanError",
    "RankType",
    "RunReport",
    "SavedModelLayer",
    "SavingError",
    "ScheduleError",
    "SmpError",
    "StepError",
    "StepOutput",
    "Timeline",
    "TraceError",
    "Tuned",
    "allgather",
    "allreduce",
    "barrier",
    "broadcast",
    "broadcast_variables",
    "checkpoint_on_preemption",
    "clip_by_global_norm",
    "distributed_dataset",
    "dp_barrier",
    "dp_rank",
    "dp_size",
    "get_dp_group",
    "get_mp_group",
    "init",
    "is_initialized",
    "load_model",
    "local_rank",
    "local_size",
    "local_variables",
    "memory_report",
    "mp_barrier",
    "mp_rank",
    "mp_size",
    "partition",
    "pp_rank",
    "pp_size",
    "pretrained_weights",
    "rank",
    "rdp_rank",
    "rdp_size",
    "record_timeline",
    "recv_from",
    "register_post_partition_hook",
    "save_model",
    "scope",
    "send",
    "set_verbosity",
    "shard",
    "shutdown",
    "size",
    "step",
    "tp_rank",
    "tp_size",
    "tune",
]


if not TYPE_CHECKING:  # a module __getattr__ would make type checkers accept any name

    def __getattr__(name: str) -> Any:
        # Public names are imported on first use. Otherwise `opensmp run`, which only starts child
        # processes, would wait for TensorFlow and keep hundreds of megabytes resident while they
        # run.
        if name in __all__:
            names = importlib.import_module("opensmp.api.names")
            globals().update({each: getattr(names, each) for each in __all__})
            return globals()[name]
        module = f"{__name__}.{name}"
        try:
            if not name.startswith("_"):
                return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
