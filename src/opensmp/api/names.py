"""All public names, which `opensmp` re-exports lazily; importing this module imports TensorFlow."""

from __future__ import annotations

from opensmp.base.requirements import require_tensorflow

require_tensorflow()

from opensmp.api.comm import gradient_norms as _gradient_norms  # noqa: E402 - registers on import
from opensmp.api.comm.collectives import allreduce, broadcast_variables, clip_by_global_norm  # noqa: E402
from opensmp.api.comm.communication import (  # noqa: E402
    allgather,
    barrier,
    broadcast,
    dp_barrier,
    mp_barrier,
    recv_from,
    send,
)
from opensmp.api.decorators.dataset import distributed_dataset  # noqa: E402
from opensmp.api.decorators.pretrained import pretrained_weights  # noqa: E402
from opensmp.api.decorators.scope import scope  # noqa: E402
from opensmp.api.init import init, shutdown  # noqa: E402
from opensmp.api.io import load_model, save_model  # noqa: E402
from opensmp.api.measurement.memory_report import MemoryReport, memory_report  # noqa: E402
from opensmp.api.measurement.tune import Tuned, tune  # noqa: E402
from opensmp.api.model.local_variables import local_variables  # noqa: E402
from opensmp.api.model.model import DistributedModel  # noqa: E402
from opensmp.api.model.model_parts import as_part as _as_part  # noqa: E402
from opensmp.api.partition import partition  # noqa: E402
from opensmp.api.sharding import shard  # noqa: E402
from opensmp.api.step.step import step  # noqa: E402
from opensmp.api.step.step_output import StepOutput  # noqa: E402
from opensmp.api.timeline.record import record_timeline  # noqa: E402
from opensmp.api.timeline.run_report import RunReport  # noqa: E402
from opensmp.api.timeline.timeline import Timeline  # noqa: E402
from opensmp.base.progress import set_verbosity  # noqa: E402
from opensmp.compiler.cluster.cluster import Cluster  # noqa: E402
from opensmp.compiler.plan.plan import Plan  # noqa: E402
from opensmp.config import Config  # noqa: E402
from opensmp.distributed.world import (  # noqa: E402
    DP_GROUP,
    MP_GROUP,
    PP_GROUP,
    RDP_GROUP,
    TP_GROUP,
    WORLD,
    CommGroup,
    RankType,
    dp_rank,
    dp_size,
    get_dp_group,
    get_mp_group,
    is_initialized,
    local_rank,
    local_size,
    mp_rank,
    mp_size,
    pp_rank,
    pp_size,
    rank,
    rdp_rank,
    rdp_size,
    size,
    tp_rank,
    tp_size,
)
from opensmp.errors import (  # noqa: E402
    AlreadyInitializedError,
    CheckpointError,
    CommunicationError,
    ConfigError,
    LaunchError,
    NonFiniteError,
    NotInitializedError,
    PartitionError,
    PlanError,
    SavingError,
    ScheduleError,
    SmpError,
    StepError,
    TraceError,
)
from opensmp.execution.models.hooks import register_post_partition_hook  # noqa: E402
from opensmp.saving.checkpoint.manager import CheckpointManager  # noqa: E402
from opensmp.saving.models.saved_model_layer import SavedModelLayer  # noqa: E402
from opensmp.training.callbacks.callbacks import OnRankZero  # noqa: E402
from opensmp.training.callbacks.check_finite import CheckFinite  # noqa: E402
from opensmp.training.resume.preemption import CheckpointOnPreemption, checkpoint_on_preemption  # noqa: E402

# As `opensmp.__all__`, which cannot be read from here without a circle: type checkers take for
# public what is listed where it is imported.
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
