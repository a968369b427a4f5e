"""Public tensor collectives: all-reduce, broadcast of variables, clipping by the global norm.

All functions work eagerly and inside a `tf.function`, where an all-reduce starts as soon as its
tensor is ready and overlaps with the rest of the backward pass. All ranks of the group must make
the same calls, in functions that are traced identically. In a group of one rank nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from opensmp.api.comm.communication import index_of, members_of
from opensmp.base.types import Gradient, Tensor
from opensmp.compiler.trace.variables import is_keras
from opensmp.distributed.collectives import clipping
from opensmp.distributed.collectives.variable_moves import copy_variables
from opensmp.distributed.world import DP_GROUP, MP_GROUP, RDP_GROUP, CommGroup, current
from opensmp.errors import CommunicationError, StepError
from opensmp.execution.context import current_runner
from opensmp.execution.multi_process.gradient_reduction import reduce_gradients, reduce_tensors
from opensmp.execution.multi_process.remote_gradient import is_elsewhere
from opensmp.execution.multi_process.remote_values import is_kept_elsewhere, known, like

_OPS = ("mean", "sum")


def allreduce(tensor: Any, op: str = "mean", group: CommGroup = DP_GROUP) -> Any:
    """Computes the mean or sum of tensors over the ranks of a group; every rank gets the result.

    The default group is the replicas of the model, as needed for gradients before they are applied;
    losses and metrics can be averaged in the same way. Gradients whose variables are owned by other
    ranks of the replica are returned unchanged, without communication: their owners reduce them.

    Call it outside of `smp.step`. It is not differentiable.

    Args:
        tensor: A tensor or a nest of tensors of any numeric dtype. `None` stays `None`. Over the
            replicas, `tf.IndexedSlices` (gradients of embeddings) stay sparse: the slices of all
            replicas are concatenated, as for the whole batch, and their number may differ between
            ranks. Over other groups they become dense. All other tensors must have the same shape
            on all ranks; the shapes may be statically unknown.
        op: `"mean"` or `"sum"`. Means of integers are float64.
        group: The group to reduce over, such as `smp.DP_GROUP` or `smp.WORLD`.

    Returns:
        The reduced tensors, in the same nest.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        CommunicationError: `op` is unknown, or a tensor is not numeric.
        StepError: It was called inside an `smp.step` function.
        TypeError: `group` is not a `CommGroup`.

    Example:
        ```python
        @tf.function
        def train_step(images, labels):
            gradients, loss = forward_backward(images, labels)  # an smp.step
            gradients = [smp.allreduce(g.accumulate()) for g in gradients]
            optimizer.apply_gradients(zip(gradients, model.trainable_variables))
            return smp.allreduce(loss.reduce_mean())
        ```
    """
    members = _members("smp.allreduce", group)
    if op not in _OPS:
        accepted = " or ".join(map(repr, _OPS))
        raise CommunicationError(f"smp.allreduce: op={op!r} is unknown; accepted: {accepted}.")
    if group not in (DP_GROUP, RDP_GROUP):
        return reduce_tensors(tensor, op, members)
    reduced = reduce_gradients(tensor, op, members)
    return tf.nest.pack_sequence_as(tensor, known(tf.nest.flatten(reduced)))


def broadcast_variables(
    variables: Iterable[Any], root_rank: int = 0, group: CommGroup = DP_GROUP
) -> None:
    """Assigns the values that variables have on one rank of a group on all its ranks, bit for bit.

    The weights of a `DistributedModel` do not need this call: partitioning the model broadcasts
    those of the first replica. Variables owned by other ranks of the replica are skipped, since
    their owners broadcast them.

    Args:
        variables: Keras variables or `tf.Variable`s, in the same order on all ranks.
        root_rank: The rank to broadcast from, as its index in the group; in `smp.DP_GROUP` this is
            the index of a replica.
        group: The group to broadcast in.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        CommunicationError: The group has no such rank, or a variable is not numeric.
        StepError: It was called inside an `smp.step` function.
        TypeError: `group` is not a `CommGroup`.

    Example:
        ```python
        smp.broadcast_variables(optimizer.variables, root_rank=0)
        ```
    """
    members = _members("smp.broadcast_variables", group)
    root = index_of("smp.broadcast_variables", "root_rank", root_rank, members)
    copy_variables(_variables(variables), members, members[root], "smp.broadcast_variables")


def clip_by_global_norm(
    gradients: Sequence[Gradient | None], clip_norm: Any, use_norm: Any | None = None
) -> tuple[list[Gradient | None], Tensor]:
    """Scales gradients so that their global norm is at most `clip_norm`.

    Like `tf.clip_by_global_norm`, but the norm covers the gradients of the whole model in all
    processes: each rank of the replica contributes those it owns. All ranks of the replica must
    call it with the gradients of the same variables in the same order. All-reduce the gradients
    over the replicas first.

    Optimizers with `global_clipnorm` already do this.

    Args:
        gradients: Tensors or `tf.IndexedSlices`; `None` stays `None`, and gradients owned by other
            ranks are returned unchanged.
        clip_norm: The maximum norm, a positive number.
        use_norm: The global norm, if already computed.

    Returns:
        The clipped gradients, and the norm before clipping.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        StepError: It was called inside an `smp.step` function.

    Example:
        ```python
        gradients = smp.allreduce([g.accumulate() for g in gradients])
        gradients, norm = smp.clip_by_global_norm(gradients, 1.0)
        ```
    """
    members = _members("smp.clip_by_global_norm", MP_GROUP)
    gradients = list(gradients)
    if len(members) == 1:
        return tf.clip_by_global_norm(gradients, clip_norm, use_norm)  # type: ignore[no-any-return]
    own = _own(gradients)
    norm = (
        clipping.global_norm(own, members) if use_norm is None else tf.convert_to_tensor(use_norm)
    )
    clipped = dict(zip(own.positions, clipping.clip(own, clip_norm, norm), strict=True))
    present = [g for g in gradients if g is not None]
    others = {i: like(g) for i, g in enumerate(present) if is_kept_elsewhere(g)}
    rest = iter(known([clipped.get(i, others.get(i, g)) for i, g in enumerate(present)]))
    return [None if g is None else next(rest) for g in gradients], norm


def norm_of(what: str, gradients: Sequence[Gradient | None]) -> Tensor:
    """Global norm as used by `clip_by_global_norm`; `what` names the caller in error messages."""
    return clipping.global_norm(_own(gradients), _members(what, MP_GROUP))


# ---------------------------------------------------------------------------------- helpers


def _members(what: str, group: CommGroup) -> tuple[int, ...]:
    members = members_of(what, current(what), group)
    if current_runner() is not None:
        raise StepError(
            f"{what} was called in an smp.step function, which runs once per microbatch. Call it "
            "outside, with what the step returns:\n\n"
            "    @tf.function\n"
            "    def train_step(x, y):\n"
            "        gradients, loss = forward_backward(x, y)  # the smp.step function\n"
            "        gradients = [smp.allreduce(g.accumulate()) for g in gradients]\n"
        )
    return members


def _own(gradients: Sequence[Gradient | None]) -> clipping.Own:
    present = [g for g in gradients if g is not None]
    places = [i for i, g in enumerate(present) if not is_elsewhere(g) and not is_kept_elsewhere(g)]
    others = [g for i, g in enumerate(present) if i not in places]
    return clipping.Own(
        [_tensor(present[i]) for i in places],
        places,
        len(present),
        others_are_double=any(map(clipping.is_double, others)),
    )


def _variables(given: Any) -> list[Any]:
    """Checks the variables passed by the user, before any communication, and lists them."""
    if is_keras(given) or isinstance(given, tf.Variable):
        given = [given]
    hint = "Expected: Keras variables or tf.Variables, such as model.variables."
    if not isinstance(given, Iterable):
        raise CommunicationError(
            f"smp.broadcast_variables: received {type(given).__name__}, which is no list. {hint}"
        )
    variables = list(given)
    faults = []
    for index, variable in enumerate(variables):
        if not is_keras(variable) and not isinstance(variable, tf.Variable):
            faults.append(f"number {index} is of type {type(variable).__name__}")
        elif tf.as_dtype(variable.dtype) == tf.string:
            faults.append(f"number {index}, {variable.name}, holds texts")
    if faults:
        raise CommunicationError(f"smp.broadcast_variables: {'; '.join(faults)}. {hint}")
    return variables


def _tensor(value: Any) -> Any:
    return value if isinstance(value, tf.IndexedSlices) else tf.convert_to_tensor(value)
