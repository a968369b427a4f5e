"""TensorFlow's runtime of several processes."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.core.protobuf import cluster_pb2, tensorflow_server_pb2
from tensorflow.python.eager import context


def is_tensorflow_started() -> bool:
    """Whether TensorFlow has made its devices, after which no cluster can be joined."""
    return bool(context.context()._context_handle is not None)


def join_cluster(
    rank: int,
    addresses: Sequence[str],
    *,
    nccl: bool,
    heartbeat_seconds: float,
    join_seconds: float,
) -> None:
    """Starts TensorFlow's server and its multi-client collective runtime in this process.

    Returns when all processes are there. The only public way in, `MultiWorkerMirroredStrategy`,
    boots the same runtime but brings a strategy along, and leaves time limits and message
    sizes to chance.
    """
    leader = "/job:worker/replica:0/task:0"
    state = context.context()
    state.configure_collective_ops(
        collective_leader=leader,
        use_nccl_communication=nccl,
        device_filters=(f"/job:worker/task:{rank}",),
    )
    state.configure_coordination_service(
        service_type="standalone",
        service_leader=leader,
        heartbeat_timeout_in_ms=int(heartbeat_seconds * 1000),
        cluster_register_timeout_in_ms=int(join_seconds * 1000),
        coordinated_jobs=[
            coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=len(addresses))
        ],
    )
    state.coordination_service.cluster_register_with_barrier = True
    cluster = cluster_pb2.ClusterDef()
    cluster.job.add(name="worker", tasks=dict(enumerate(addresses)))
    server = tensorflow_server_pb2.ServerDef(
        cluster=cluster,
        default_session_config=state.config,
        job_name="worker",
        task_index=rank,
        protocol="grpc",
        port=int(addresses[rank].rsplit(":", 1)[1]),
    )
    # Without a limit large tensors travel in one piece, which was measured to be fastest.
    server.default_session_config.experimental.recv_buf_max_chunk = -1
    state.enable_collective_ops(server)
    state.ensure_initialized()


def answers(rank: int, seconds: float) -> bool:
    """Whether the TensorFlow server of another process answers.

    Its C++ threads answer also while its Python is busy, but not when the process is frozen.
    Python stands still in this process until the answer comes or the time is over.
    """
    try:
        context.context().check_collective_ops_peer_health(
            f"/job:worker/replica:0/task:{rank}", int(seconds * 1000)
        )
    except tf.errors.OpError:
        return False
    return True


def post(key: str, text: str) -> None:
    """Leaves a text for another process of the cluster, which gets it with `fetch`.

    The coordination service keeps it. Unlike a collective operation it may be used on any
    thread, whatever the others do.
    """
    context.context().set_config_key_value(key, text)


def fetch(key: str) -> str:
    """Waits for the text that another process posts, and forgets it; other threads run on."""
    text = str(context.context().get_config_key_value(key, 0))
    context.context().delete_config_key_value(key)
    return text
