"""Variables that lie in several processes, brought to one that writes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.variables import is_keras, tf_dtype, tf_variable
from opensmp.distributed import world
from opensmp.distributed.collectives import objects
from opensmp.errors import SavingError
from opensmp.saving import collective_errors

Variable = Any

WRITER = 0


def state_of(model: Any) -> list[Variable]:
    """All variables of a model and of its optimizers, and Keras' own seed.

    Models with a `train_step` of their own may have several optimizers, as attributes.
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(getattr(optimizer, "variables", None) or ())]
    for held in tf.train.TrackableView(model).descendants():
        if isinstance(held, keras.optimizers.Optimizer):
            variables += held.variables
    seed = _private.global_seed_state()
    variables += [] if seed is None else [seed]
    return list({id(variable): variable for variable in variables}.values())


@contextlib.contextmanager
def gathered(variables: Sequence[Variable]) -> Iterator[bool]:
    """Context in which rank 0 can read all variables.

    Those that other ranks of its replica own come one by one, to its host's memory, and leave
    at the end; also those of which rank 0 has a copy that training does not change. All ranks must
    enter it; with one process nothing happens.

    Args:
        variables: The variables of a model, in the same order on all ranks.

    Yields:
        Whether this process is the one that has all of them.
    """
    here = world.current("gathering a model") if world.is_initialized() else None
    if here is None or here.size == 1:
        yield True
        return
    members = here.mp_group
    lent: list[Variable] = []
    try:
        if WRITER in members and len(members) > 1:
            _collect(variables, members, here.rank, lent)
        yield here.rank == WRITER
    finally:
        for variable in lent:
            _private.take_back(variable)


def _collect(
    variables: Sequence[Variable], members: Sequence[int], rank: int, lent: list[Variable]
) -> None:
    own = [(_layout(v), _is_here(v)) for v in variables]
    tables = objects.allgather_objects(own, members, "gathering a model")
    layouts = [[layout for layout, _ in table] for table in tables]
    for member, layout in zip(members, layouts, strict=True):
        if layout != layouts[0]:
            raise SavingError(
                f"Rank {member} has other variables than rank {members[0]}: {len(layout)} and "
                f"{len(layouts[0])}, or of other shapes. Make the same model, and compile it in "
                "the same way, in all processes."
            )
    failure: Exception | None = None
    for index, variable in enumerate(variables):
        owners = [m for m, table in zip(members, tables, strict=True) if table[index][1]]
        if WRITER in owners or not owners:
            continue
        if rank == owners[0]:
            objects.send_object(np.asarray(tf_variable(variable)), [WRITER])
        elif rank == WRITER:
            value = objects.recv_object(owners[0])
            try:  # the others go on sending, whatever happens here
                if failure is None:
                    _private.lend(variable, value)
                    lent.append(variable)
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure


def together(what: str, work: Callable[[], Any]) -> Any:
    """Does something on this rank and tells all ranks if it went wrong on any.

    Args:
        what: What is done, for messages; the same on all ranks.
        work: Is called once.

    Returns:
        The result of `work` here.

    Raises:
        Exception: What `work` raised here.
        SavingError: Another rank failed.
    """
    here = world.current(what) if world.is_initialized() else None
    if here is None or here.size == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    outcome = (
        collective_errors.Outcome() if failure is None else collective_errors.outcome_of(failure)
    )
    text = collective_errors.first_error(
        collective_errors.gathered(outcome, range(here.size), what)
    )
    if failure is not None:
        raise failure
    if text is not None:
        raise SavingError(f"{what} failed: {text}")
    return result


@contextlib.contextmanager
def assigning_own() -> Iterator[None]:
    """Context in which assignments to variables of other processes do nothing."""
    with _private.assignments_elsewhere_ignored():
        yield


def _is_here(variable: Variable) -> bool:
    if not _private.is_kept_here(variable):
        return False
    return not is_keras(variable) or _private.is_initialized(variable)


def _layout(variable: Variable) -> str:
    return f"{tuple(variable.shape)} {tf_dtype(variable).name}"
