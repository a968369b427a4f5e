"""All public names, which `opensmp` hands out; importing them brings TensorFlow."""

from __future__ import annotations

from opensmp._require import require_tensorflow

require_tensorflow()

from opensmp import gradient_norms as _gradient_norms  # noqa: E402 - registers itself
from opensmp.collectives import (  # noqa: E402
    allreduce,
    broadcast_variables,
    clip_by_global_norm,
)
from opensmp.communication import (  # noqa: E402
    allgather,
    barrier,
    broadcast,
    dp_barrier,
    mp_barrier,
    recv_from,
    send,
)
from opensmp.config import Config  # noqa: E402
from opensmp.decorators import (  # noqa: E402
    distributed_dataset,
    pretrained_weights,
    scope,
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
from opensmp.hooks import register_post_partition_hook  # noqa: E402
from opensmp.model import DistributedModel  # noqa: E402
from opensmp.own_variables import local_variables  # noqa: E402
from opensmp.partition_scope import partition  # noqa: E402
from opensmp.parts import as_part as _as_part  # noqa: E402
from opensmp.plan import Plan  # noqa: E402
from opensmp.report import Timeline, record_timeline  # noqa: E402
from opensmp.runtime.bootstrap import init, shutdown  # noqa: E402
from opensmp.runtime.world import (  # noqa: E402
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
from opensmp.saving.checkpoint_manager import CheckpointManager  # noqa: E402
from opensmp.saving.load import load_model, save_model  # noqa: E402
from opensmp.saving.saved_model import SavedModelLayer  # noqa: E402
from opensmp.sharding import shard  # noqa: E402
from opensmp.step_function import step  # noqa: E402
from opensmp.step_output import StepOutput  # noqa: E402
from opensmp.training.callbacks import OnRankZero  # noqa: E402
from opensmp.training.check_finite import CheckFinite  # noqa: E402
from opensmp.training.preemption import (  # noqa: E402
    CheckpointOnPreemption,
    checkpoint_on_preemption,
)
