"""The calls of `horovod.tensorflow` that hybrid scripts make, by means of this library.

Horovod knows nothing of partitions: here its ranks count replicas of the model, and its
tensors are added up over `smp.DP_GROUP`. In a run without model parallelism these are all
processes, as in Horovod.

| name | what it is |
| --- | --- |
| `init()` | nothing: `smp.init` does it |
| `rank()`, `size()` | `smp.dp_rank()`, `smp.dp_size()` |
| `local_rank()`, `local_size()` | those of `smp`: the processes of this machine |
| `allreduce(tensor)` | `smp.allreduce`; `op=Average` (default) or `op=Sum`, or `average=` |
| `broadcast_variables(variables, root_rank)` | `smp.broadcast_variables` |

`import horovod.tensorflow as hvd` gives these where Horovod is not installed, in scripts that
`opensmp run` starts, and after `import smdistributed.modelparallel.tensorflow` or
`smp.init({"horovod": True})` in others. Where Horovod is installed, it is what is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from opensmp.api.comm import collectives
from opensmp.compiler.lowering.sparse_gradients import with_values
from opensmp.distributed import world
from opensmp.distributed.collectives.scalars import scalar
from opensmp.errors import CommunicationError

__all__ = [
    "Average",
    "Sum",
    "allreduce",
    "broadcast_variables",
    "init",
    "local_rank",
    "local_size",
    "rank",
    "size",
]

Average = "mean"
"""Value of `op`: divide the sum by the number of replicas."""

Sum = "sum"
"""Value of `op`: sum over the replicas."""


def init(*args: Any, **kwargs: Any) -> None:
    """Does nothing; `smp.init` does the initialization."""


def rank() -> int:
    """Index of this replica of the model."""
    return world.current("hvd.rank").rank_in(world.DP_GROUP)


def size() -> int:
    """Number of replicas of the model."""
    return len(world.current("hvd.size").group(world.DP_GROUP))


def local_rank() -> int:
    """Rank of this process on its machine."""
    return world.current("hvd.local_rank").local_rank


def local_size() -> int:
    """Number of processes on this machine."""
    return world.current("hvd.local_size").local_size


def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: None = None,
    ignore_name_scope: bool = False,
) -> Any:
    """Computes the mean or sum of a tensor over all replicas of the model.

    Args:
        tensor: A tensor, `tf.IndexedSlices`, or a nest of them.
        average: Deprecated form of `op`: True for `Average`, False for `Sum`.
        device_dense: Ignored.
        device_sparse: Ignored.
        compression: Must be None.
        op: `Average` or `Sum`.
        prescale_factor: Factor applied before the reduction; integers are then rounded
            towards zero.
        postscale_factor: Factor applied to the result, likewise.
        name: Ignored.
        process_set: Must be None.
        ignore_name_scope: Ignored.

    Raises:
        CommunicationError: Both `average` and `op` are given, `op` is unknown, or compression or a
            process set is requested.

    Example:
        ```python
        gradients = [hvd.allreduce(g.accumulate()) for g in gradients]
        ```
    """
    faults = []
    if average is not None and op is not None:
        faults.append("average and op were given both; give op alone")
    if compression is not None:
        faults.append(f"compression={compression!r} is not possible; leave it out")
    if process_set is not None:
        faults.append("process_set is not possible; leave it out")
    if op not in (None, Average, Sum):
        faults.append(f"op={op!r} is unknown; accepted: hvd.Average or hvd.Sum")
    if faults:
        raise CommunicationError(f"horovod.tensorflow.allreduce: {'; '.join(faults)}.")
    method = op or (Sum if average is False else Average)
    scaled = _times(tensor, prescale_factor)
    return _times(collectives.allreduce(scaled, op=method), postscale_factor)


def broadcast_variables(
    variables: Iterable[Any],
    root_rank: int = 0,
    process_set: None = None,
    inplace: bool = False,
) -> None:
    """Broadcasts variables from one replica to all replicas.

    Args:
        variables: Keras variables or `tf.Variable`s.
        root_rank: Index of the source replica.
        process_set: Must be None.
        inplace: Ignored.

    Raises:
        CommunicationError: There is no such replica, or a process set was given.
    """
    if process_set is not None:
        raise CommunicationError(
            "horovod.tensorflow.broadcast_variables: process_set is not possible; leave it out."
        )
    collectives.broadcast_variables(variables, root_rank=root_rank)


def __getattr__(name: str) -> Any:
    raise AttributeError(absent(f"horovod.tensorflow.{name}"))


def absent(name: str) -> str:
    """Error message for a Horovod name that this module does not provide."""
    return (
        f"{name} does not exist here: Horovod is not installed, and opensmp stands in for these "
        f"names of horovod.tensorflow: {', '.join(__all__)}. Use them, or the functions of "
        "opensmp, such as smp.allreduce, smp.allgather or smp.broadcast."
    )


def _times(tensor: Any, factor: float) -> Any:
    if factor == 1.0:
        return tensor
    return tf.nest.map_structure(lambda leaf: _one_times(leaf, factor), tensor)


def _one_times(tensor: Any, factor: float) -> Any:
    if tensor is None:
        return None
    if isinstance(tensor, tf.IndexedSlices):
        values = _one_times(tensor.values, factor)
        return with_values(tensor, values)
    tensor = tf.convert_to_tensor(tensor)
    if tensor.dtype.is_integer:
        return tf.cast(tf.cast(tensor, tf.float64) * scalar(factor, tf.float64), tensor.dtype)
    return tensor * scalar(factor, tensor.dtype)
