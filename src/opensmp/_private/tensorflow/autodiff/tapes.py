"""Gradient tapes: their state, and custom gradients that do not outlive their graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import record, tape

from opensmp._private.tensorflow.function_graphs import copy_handle_data
from opensmp.base.types import Op, Tensor


def tape_is_active() -> bool:
    """Whether any `tf.GradientTape` is recording; there is no public test."""
    return bool(record.could_possibly_record())


def is_watched(tensor: Tensor) -> bool:
    """Whether an active tape would differentiate through `tensor`."""
    return bool(record.should_record_backprop([tensor]))


def watches_variable(variable: Any) -> bool:
    """Whether an active tape differentiates with respect to a `tf.Variable` when it is read."""
    with recording():
        tape.variable_accessed(variable)
        return bool(record.should_record_backprop([variable.handle]))


def stop_recording() -> Any:
    """Context that pauses all tapes; the public `tape.stop_recording` needs the tape object."""
    return record.stop_recording()


_BRIDGE = "OpensmpBridge"


_GRADIENTS = "_smp_gradients"


_REFUSE = "_smp_refuse"


def with_gradient(
    results: Sequence[Tensor], args: Sequence[Tensor], gradient: Callable[..., Sequence[Any]]
) -> list[Tensor]:
    """Makes `gradient` that of the returned `results` with respect to `args`, in a graph.

    Like `tf.custom_gradient`, which however registers each function for the life of the process and
    so never frees what the trace holds. Here the graph owns the functions.
    """
    graph = tf.compat.v1.get_default_graph()
    tensors = [*results, *args]

    def of_all(*upstream: Any) -> list[Any]:
        return [None] * len(results) + list(gradient(*upstream[: len(results)]))

    passed = _bridge(graph, tensors).outputs
    for source, target in zip(tensors, passed, strict=True):
        copy_handle_data(source, target)
    if not hasattr(graph, _GRADIENTS):
        setattr(graph, _GRADIENTS, {})
    getattr(graph, _GRADIENTS)[passed[0].op.name] = len(results), of_all
    # Records only the results as outputs: for each argument that `passed` has as well, the tape
    # would create zeros, in each microbatch.
    record.record_operation(_BRIDGE, passed[: len(results)], tensors, of_all)
    return list(passed[: len(results)])


def _bridge(graph: Any, tensors: Sequence[Tensor]) -> Op:
    """An `IdentityN` whose gradient is that of a bridge; no tape records it.

    It is created without `tf.raw_ops`, whose checks of each tensor take most of its time.
    """
    types = tf.compat.v1.AttrValue.ListValue(type=[t.dtype.as_datatype_enum for t in tensors])
    attributes = {
        "T": tf.compat.v1.AttrValue(list=types),
        "_gradient_op_type": tf.compat.v1.AttrValue(s=_BRIDGE.encode()),
    }
    op: Op = graph._create_op_internal("IdentityN", tensors, name="smp_bridge", attrs=attributes)
    return op


@tf.RegisterGradient(_BRIDGE)
@tf.autograph.experimental.do_not_convert
def _bridge_gradient(op: Op, *upstream: Any) -> Any:
    if op is None:  # tf.saved_model.save stores the gradients of all operations
        return None
    count, gradient = getattr(op.graph, _GRADIENTS)[op.name]
    if gradient is None:
        refuse = getattr(op.graph, _REFUSE)
        return [None] * count + list(refuse(list(op.inputs[count:]), upstream[:count]))
    return gradient(*upstream)


def release_gradients(graph: Any, refuse: Callable[..., Sequence[Any]]) -> None:
    """Frees the functions given to `with_gradient` in a graph, with all that they hold.

    A gradient that is taken through one of its bridges from now on is what `refuse` returns for the
    arguments and the upstream gradients.
    """
    gradients = getattr(graph, _GRADIENTS, {})
    for name, (count, _) in gradients.items():
        gradients[name] = count, None
    setattr(graph, _REFUSE, refuse)


def is_bridge(op: Op) -> bool:
    """Whether `with_gradient` created an operation; its output i is its input i."""
    return op.name in getattr(op.graph, _GRADIENTS, ())


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Leaves all graphs under construction, as `tf.init_scope` does, but lets new tapes record.

    A model's own code, and custom gradients such as that of `tf.recompute_grad`, may open a tape;
    under `tf.init_scope` it would record nothing and return zeros.
    """
    with tf.init_scope(), recording():
        yield


def record_call(
    results: Sequence[Tensor],
    variables: Sequence[Any],
    inputs: Sequence[Tensor],
    backward: Callable[..., Sequence[Any]],
) -> None:
    """Records on all tapes how to differentiate results that were computed outside them.

    Like `tf.custom_gradient`, but with the variables themselves as arguments. They need not be
    read, which a variable of another process does not allow.
    """
    for variable in variables:
        tape.variable_accessed(variable)
    arguments = [*(variable.handle for variable in variables), *inputs]
    record.record_operation("OpensmpCall", list(results), arguments, backward)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Lets tapes record inside `stop_recording`, as code of a function traced there may need."""
    stopped = pywrap_tfe.TFE_Py_TapeSetIsStopped()
    if stopped:
        pywrap_tfe.TFE_Py_TapeSetRestartOnThread()
    try:
        yield
    finally:
        if stopped:
            pywrap_tfe.TFE_Py_TapeSetStopOnThread()
