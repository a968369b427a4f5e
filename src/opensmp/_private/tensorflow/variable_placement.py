"""Variables of split models: which process owns each, and hooks on reads and assignments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import tensorflow as tf
from tensorflow.python.checkpoint import tensor_callable
from tensorflow.python.eager import record, tape
from tensorflow.python.ops import gen_resource_variable_ops, handle_data_util
from tensorflow.python.trackable import base as tf_trackable

from opensmp._private.keras.shards import is_shard
from opensmp.base.thread_values import ThreadValue
from opensmp.base.types import Tensor, Variable
from opensmp.errors import ElsewhereError

ELSEWHERE = "_smp_elsewhere"
_HOME = "_smp_home"
_HANDLE = "_smp_handle"
_KIND = "_smp_kind"

_KINDS = ("add", "sub", "max", "min", "mul", "div", "update")
_ASSIGNMENTS = (
    "assign",
    "assign_add",
    "assign_sub",
    "batch_scatter_update",
    *(f"scatter_{kind}" for kind in _KINDS),
    *(f"scatter_nd_{kind}" for kind in _KINDS),
    "_strided_slice_assign",
)


class Home(NamedTuple):
    """The process that owns a variable of a model split over processes.

    Attributes:
        process: Position of the process in its replica.
        number: Identifies the variable; the same in all processes.
        name: Path of the variable and its rank, for messages.
    """

    process: int
    number: tuple[int, ...]
    name: str


class Follower(Protocol):
    """Handles reads of and assignments to split variables in the function being traced."""

    def is_plain(self) -> bool:
        """Whether to leave them to TensorFlow: a step over several processes is being traced."""

    def read(self, variable: Variable) -> Tensor:
        """The value of a variable that another process owns."""

    def has_read(self, variable: Variable, value: Tensor) -> None:
        """Records a read of a variable that this process owns."""

    def assigns(self, variable: Variable) -> None:
        """Records an assignment to a variable, whichever process owns it."""


_follower: Follower | None = None


def follow_reads(follower: Follower | None) -> None:
    """Sets the handler for reads of and assignments to variables with a home; None removes it."""
    global _follower
    _follower = follower


def set_home(variable: Variable, home: Home) -> None:
    """Records the owner of a Keras variable or `tf.Variable`, and hooks its reads.

    Must be called again after the variable has got new memory.
    """
    stored = getattr(variable, "_value", variable)
    setattr(stored, _HOME, home)
    setattr(_handle_of(stored), _HOME, home)
    if not hasattr(stored, ELSEWHERE) and not hasattr(type(stored), _KIND):
        kind: Any = type(stored)
        stored.__class__ = _followed(kind)


def home_of(variable: Variable) -> Home | None:
    """The owner of a variable; None if it does not belong to a split model."""
    return getattr(getattr(variable, "_value", variable), _HOME, None)


def home_of_handle(handle: Tensor) -> Home | None:
    """The owner of a variable, given its handle: the eager tensor that functions capture."""
    return getattr(handle, _HOME, None)


def _handle_of(stored: Variable) -> Tensor:
    """The handle of a `tf.Variable`, including one that was given up."""
    return getattr(stored, _HANDLE) if hasattr(stored, ELSEWHERE) else stored.handle


# -------------------------------------------------------------------- variables of this process


@functools.cache
def _followed(kind: Any) -> Any:
    """Subclass for variables of this process that reports reads and assignments."""

    def _read_variable_op(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = kind._read_variable_op(self, *args, **kwargs)
        follower = _follower_now()
        if follower is not None:
            follower.has_read(self, value)
        return value

    body: dict[str, Any] = {
        "_read_variable_op": _read_variable_op,
        # From the whole value, as in processes that do not own the variable.
        **_gathers(kind, lambda: _follower_now() is None),
        _KIND: kind,
        "__module__": kind.__module__,
    }
    for name in _ASSIGNMENTS:
        if hasattr(kind, name):
            body[name] = _followed_assignment(kind, name)
    return type(kind.__name__, (kind,), body)


def _gathers(kind: Any, is_plain: Callable[[], bool]) -> dict[str, Any]:
    """Methods that read rows of a variable from its whole value, unless `is_plain`."""

    def gathering(method: str, gather: Any) -> Any:
        def read(self: Any, indices: Any, name: Any = None) -> Any:
            if is_plain():
                return getattr(kind, method)(self, indices, name)
            return gather(self._read_variable_op(), indices)

        return read

    return {
        "sparse_read": gathering("sparse_read", tf.gather),
        "gather_nd": gathering("gather_nd", tf.gather_nd),
    }


def _followed_assignment(kind: Any, name: str) -> Any:
    original = getattr(kind, name)

    def assign(self: Any, *args: Any, **kwargs: Any) -> Any:
        follower = _follower_now()
        if follower is None:
            return getattr(kind, name)(self, *args, **kwargs)
        follower.assigns(self)
        getattr(kind, name)(self, *args, **kwargs)
        return self  # TensorFlow returns another object, whose reads would not be followed

    return functools.wraps(original)(assign)


# ------------------------------------------------------------------- variables of other processes


class _NoMemory:
    """Replaces a handle, because TensorFlow's fast path would read it and bypass these hooks."""

    def __init__(self, name: str) -> None:
        self._of = name

    def __getattr__(self, attribute: str) -> Any:
        raise ElsewhereError(
            f"Variable {self._of} was given to a tf.function, or used in place, in a process that "
            "does not own it. Expected: its value, read in a train_step or in a tf.function with "
            "an smp.step in it, `value = tf.convert_to_tensor(variable)`."
        )


def make_unreadable(stored: Variable, name: str) -> None:
    """Turns a `tf.Variable` into one of another process, with a handle that cannot be read."""
    setattr(stored, ELSEWHERE, name)
    handle = _handle_without_memory(stored, name)
    stored._handle_name = handle._name
    setattr(stored, _HANDLE, handle)
    stored._handle = _NoMemory(name)
    kind: Any = type(stored)
    stored.__class__ = _unreadable(getattr(kind, _KIND, kind))
    home = getattr(stored, _HOME, None)
    if home is not None:
        setattr(handle, _HOME, home)


def _handle_without_memory(stored: Variable, name: str) -> Tensor:
    """A handle without a resource: reading it fails with an error that shows the name.

    The handle of a variable that is only uninitialized would be that of an empty tensor.
    """
    with tf.init_scope(), tf.device("CPU:0"):
        shape, dtype = stored.shape, stored.dtype
        text = f"{name}, which was read in a process that does not own it, #{id(stored)}"
        handle = gen_resource_variable_ops.var_handle_op(shape=shape, dtype=dtype, shared_name=text)
        data = handle_data_util.create_handle_data(shape, dtype)
        handle_data_util.set_handle_data(handle, data)
    handle._name = f"{stored.name}"
    return handle


@functools.cache
def _unreadable(kind: Any) -> Any:
    """Subclass for variables of other processes: all reads go through the `Follower`."""

    def _read_variable_op(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_shard(self):
            raise ElsewhereError(_of_another_replica(getattr(self, ELSEWHERE)))
        if _is_left_to_tensorflow():
            return kind._read_variable_op(self, *args, **kwargs)
        return _value_of(self)

    def _serialize_to_tensors(self: Any) -> Any:
        def read() -> Any:
            raise ElsewhereError(
                f"Variable {getattr(self, ELSEWHERE)} cannot be saved in a process that does not "
                "own it: tf.train.Checkpoint would leave it out. Save with smp.CheckpointManager, "
                "which all processes call."
            )

        value = tensor_callable.Callable(read, dtype=self.dtype, device=self.device)
        return {tf_trackable.VARIABLE_VALUE_KEY: value}

    body: dict[str, Any] = {
        "_read_variable_op": _read_variable_op,
        **_gathers(kind, _is_left_to_tensorflow),
        "_serialize_to_tensors": _serialize_to_tensors,
        "handle": property(lambda self: getattr(self, _HANDLE)),
        _KIND: kind,
        "__module__": kind.__module__,
    }
    for name in _ASSIGNMENTS:
        if hasattr(kind, name):
            body[name] = _dropped_assignment(kind, name)
    return type(kind.__name__, (kind,), body)


def readable_kind(stored: Variable) -> Any:
    """The class that a variable of another process had before it was given up."""
    return getattr(type(stored), _KIND)


def _dropped_assignment(kind: Any, name: str) -> Any:
    def assign(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_shard(self):
            return self
        if _is_left_to_tensorflow():
            return getattr(kind, name)(self, *args, **kwargs)
        if _follower is not None and not tf.executing_eagerly():
            _follower.assigns(self)
        return self  # the owner performs the same assignment

    return functools.wraps(getattr(kind, name))(assign)


def _of_another_replica(name: str) -> str:
    return (
        f"Variable {name} was read in a process that does not have it. With shard_optimizer_state "
        "each replica has the optimizer's state of the variables that it updates only. Expected: "
        "reads of what lies here, such as `for v in smp.local_variables(optimizer.variables)`; or "
        "a checkpoint of smp.CheckpointManager, which has all values."
    )


def _value_of(stored: Variable) -> Tensor:
    if tf.executing_eagerly():
        raise ElsewhereError(
            f"Variable {getattr(stored, ELSEWHERE)} was read in a process that does not own it. "
            "Each process holds the variables of its own partitions only. Expected in code that "
            "runs eagerly: reads of the variables that lie here, such as `for v in "
            "smp.local_variables(model)`. `model.get_weights()`, called in all processes, gives "
            "all values; inside of a train_step, or of a tf.function with an smp.step in it, any "
            "variable can be read. A model made of layers of a split model is split as well if you "
            "wrap it: smp.DistributedModel.from_keras(sub_model)."
        )
    assert _follower is not None
    return _follower.read(stored)


def _is_left_to_tensorflow() -> bool:
    """Whether a step is being traced, or `variable_access` is active: no hooks apply."""
    if _redirected.get():
        return True
    if tf.executing_eagerly():
        return False
    return _follower is None or _follower.is_plain()


def _follower_now() -> Follower | None:
    if tf.executing_eagerly() or not is_followed() or _is_left_to_tensorflow():
        return None
    return _follower


_redirected, _alone = ThreadValue(False), ThreadValue(False)


def redirected() -> AbstractContextManager[None]:
    """Context of `variable_access`, which handles reads itself."""
    return _redirected.set_to(True)


def note_assigned(variable: Variable) -> None:
    """Reports that another process assigns to a variable it owns at this point of the program."""
    if _follower is not None and not tf.executing_eagerly() and not _is_left_to_tensorflow():
        _follower.assigns(getattr(variable, "_value", variable))


def not_followed() -> AbstractContextManager[None]:
    """Context in which this process reads its variables without the others doing the same."""
    return _alone.set_to(True)


def is_followed() -> bool:
    """Whether reads come from the user's program, which is the same in all processes."""
    return not _alone.get()


def record_read(variable: Variable, value: Tensor) -> None:
    """Records on tapes that a tensor is the value of a variable, as TensorFlow's read does."""
    if variable.trainable:  # tapes watch others only if told to
        tape.variable_accessed(variable)
    record.record_operation(
        "ReadVariableOp",
        [value],
        [variable.handle],
        backward_function=lambda upstream: [upstream],
        forward_function=lambda tangent: [tangent],
    )
