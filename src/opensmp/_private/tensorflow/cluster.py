"""TensorFlow's multi-process runtime: joining the cluster, collectives, key-value messages."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.core.protobuf import cluster_pb2, tensorflow_server_pb2
from tensorflow.python.eager import context
from tensorflow.python.framework import errors

from opensmp._private.patching import replaced


def is_tensorflow_started() -> bool:
    """Whether TensorFlow has initialized its devices, after which it cannot join a cluster."""
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

    Returns when all processes have joined; other threads keep running. The public
    `MultiWorkerMirroredStrategy` starts the same runtime, but also installs a strategy and does not
    let time limits and message sizes be set.
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
    # Transfers large tensors in one piece, which was measured to be fastest.
    server.default_session_config.experimental.recv_buf_max_chunk = -1
    state.enable_collective_ops(server)
    with replaced(context.pywrap_tfe, "TFE_EnableCollectiveOps", _without_interpreter_lock):
        state.ensure_initialized()


def _without_interpreter_lock(enable_collective_ops: Callable[..., None]) -> Callable[..., None]:
    """Variant of TensorFlow's function that releases the interpreter lock while it waits.

    TensorFlow's Python binding holds the lock for the whole time, so that this process could not
    notice the failure of another. Falls back to the binding if the C function is not found.
    """
    try:
        folder = Path(tf.sysconfig.get_lib())
        wait = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2")).TFE_EnableCollectiveOps
        library = ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"))
        make, code_of = library.TF_NewStatus, library.TF_GetCode
        text_of, delete = library.TF_Message, library.TF_DeleteStatus
    except (OSError, AttributeError):
        return enable_collective_ops
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    capsule_to_pointer = ctypes.PYFUNCTYPE(pointer, ctypes.py_object, ctypes.c_char_p)
    pointer_of = capsule_to_pointer(("PyCapsule_GetPointer", ctypes.pythonapi))
    wait.argtypes, wait.restype = [pointer, ctypes.c_char_p, size, pointer], None
    make.argtypes, make.restype = [], pointer
    code_of.argtypes, code_of.restype = [pointer], ctypes.c_int
    text_of.argtypes, text_of.restype = [pointer], ctypes.c_char_p
    delete.argtypes, delete.restype = [pointer], None

    def enable(handle: Any, server: bytes) -> None:
        status = make()
        try:
            wait(pointer_of(handle, None), server, len(server), status)
            code, text = code_of(status), text_of(status).decode(errors="replace")
        finally:
            delete(status)
        if code:
            raise tf.compat.v1.errors.exception_type_from_error_code(code)(None, None, text)

    return enable


def answers(rank: int, seconds: float) -> bool:
    """Whether the TensorFlow server of another process answers within a time limit.

    Its C++ threads answer while its Python is busy, but not when the process is stopped. The call
    holds this process's interpreter lock until the answer arrives or the time is over.
    """
    try:
        context.context().check_collective_ops_peer_health(
            f"/job:worker/replica:0/task:{rank}", int(seconds * 1000)
        )
    except tf.errors.OpError:
        return False
    return True


def interrupt_collectives(text: str) -> None:
    """Makes all collectives of this process fail, until `renew_collectives`.

    No public API ends an operation that waits for another process. Callable from any thread.
    """
    state = context.context()
    if state._context_handle is not None and state._collective_ops_server_def is not None:
        state.abort_collective_ops(errors.ABORTED, text)


def renew_collectives() -> None:
    """Makes interrupted collectives usable again.

    All processes must call it while no collective runs or waits in any of them; afterwards all keys
    count as unused. TensorFlow recreates its collective state whenever the cluster is set, even to
    the same one; servers and connections stay.
    """
    state = context.context()
    server = state._collective_ops_server_def.SerializeToString()
    context.pywrap_tfe.TFE_EnableCollectiveOps(state._handle, server)


def post(key: str, text: str) -> None:
    """Stores a text in the coordination service for another process, which reads it with `fetch`.

    Unlike collectives it may be called from any thread, in any order.
    """
    context.context().set_config_key_value(key, text)


def fetch(key: str) -> str:
    """Waits for a text that another process posts, and deletes it; other threads keep running."""
    text = str(context.context().get_config_key_value(key, 0))
    context.context().delete_config_key_value(key)
    return text
