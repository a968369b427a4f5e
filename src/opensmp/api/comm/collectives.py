"""Tensors of several ranks put together: gradients of replicas, weights, norms.

All functions work eagerly and inside a `tf.function`, where a reduce runs as soon as its own
tensor is there, beside what is left of the backward pass. All ranks of the group must make the
same calls, in functions that are traced alike. With one rank in the group nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from opensmp.api.comm.communication import index_of, members_of
from opensmp.compiler.trace.variables import is_keras
from opensmp.distributed.collectives import clipping
from opensmp.distributed.collectives.variable_moves import copy_variables
from opensmp.distributed.world import DP_GROUP, MP_GROUP, RDP_GROUP, CommGroup, current
from opensmp.errors import CommunicationError, StepError
from opensmp.execution.context import current_runner
from opensmp.execution.multi_process.gradient_reduction import reduce_gradients, reduce_tensors
from opensmp.execution.multi_process.remote_gradient import is_elsewhere
from opensmp.execution.multi_process.remote_values import is_kept_elsewhere, known, like

Tensor = Any
Gradient = Any

_OPS = ("mean", "sum")


def allreduce(tensor: Any, op: str = "mean", group: CommGroup = DP_GROUP) -> Any:
    """The mean or sum of tensors over the ranks of a group, on all of them.

    Between replicas of the model, which is the default, it is what gradients need before they
    are applied; a loss or a metric may be averaged as well. Gradients whose variables live on
    other ranks of the replica are given back as they are, and nothing is sent for them: their
    own ranks reduce them.

    Call it outside of `smp.step`. It has no gradient itself.

    Args:
        tensor: A tensor or a nest of them, of any type of numbers. `None` stays `None`.
            `tf.IndexedSlices`, the gradients of embeddings, stay such between replicas: the
            slices of all of them come below each other, as from the whole batch, and may be
            more on one rank than on another. Elsewhere they become dense. Other shapes must be
            the same on all ranks; they need not be known beforehand.
        op: `"mean"` or `"sum"`. Means of integers are float64.
        group: Whose tensors, such as `smp.DP_GROUP` or `smp.WORLD`.

    Returns:
        The same nest.

    Raises:
        NotInitializedError: Before `smp.init`.
        CommunicationError: `op` is unknown, or a tensor is not of numbers.
        StepError: It was called in an `smp.step` function.
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
    """Gives variables the values that they have on one rank of a group, bit by bit.

    The weights of a `DistributedModel` need no call: when the model is partitioned they become
    those of the first replica. Variables that live on other ranks of the replica are left out,
    since their own ranks take care of them.

    Args:
        variables: Keras variables or `tf.Variable`s, in the same order on all ranks.
        root_rank: The rank whose values are taken, counted in the group: in `smp.DP_GROUP` it
            is the number of a replica.
        group: Whose variables.

    Raises:
        NotInitializedError: Before `smp.init`.
        CommunicationError: The group has no such rank, or a variable is not of numbers.
        StepError: It was called in an `smp.step` function.
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
    """Scales gradients so that their common norm is at most `clip_norm`.

    As `tf.clip_by_global_norm`, except that the norm is that of the gradients of the whole
    model, wherever they are: each rank of the replica contributes its own. All of them must
    call it with the gradients of the same variables in the same order. Reduce the gradients
    over the replicas before.

    Optimizers with `global_clipnorm` do the same by themselves.

    Args:
        gradients: Tensors or `tf.IndexedSlices`; `None` stays `None`, and gradients of other
            ranks are given back as they are.
        clip_norm: The largest norm, a positive number.
        use_norm: The norm, if it is known already.

    Returns:
        The clipped gradients, and the norm that they had.

    Raises:
        NotInitializedError: Before `smp.init`.
        StepError: It was called in an `smp.step` function.

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
    """The norm by which `clip_by_global_norm` clips.

    Args:
        what: Name of the function that asks for it, for errors.
        gradients: As there.
    """
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
    """What was given as variables, checked before anything is sent."""
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
