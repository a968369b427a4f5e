"""Gathers the variables of a replica, which several processes own, in the process that writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Variable
from opensmp.compiler.trace.variables import is_keras, tf_dtype, tf_variable
from opensmp.distributed import world
from opensmp.distributed.collectives import objects
from opensmp.errors import SavingError
from opensmp.saving.collective_errors import RankResult, first_error, result_of_error
from opensmp.saving.collective_errors import gathered as outcomes_of_all

WRITER = 0


def state_of(model: Any) -> list[Variable]:
    """All variables of a model, of its optimizers, and Keras' global seed, without duplicates.

    Models with their own `train_step` may hold several optimizers as attributes.
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
    """Context in which rank 0 can read all variables of its replica; yields whether this is it.

    Variables that other ranks own, such as the slots of an optimizer that only another replica has,
    and those whose copy on rank 0 is not kept up to date by training, are sent to its host memory
    one at a time, and are freed on exit. Collective over all ranks; with one process it does
    nothing.
    """
    here = world.current("gathering a model") if world.is_initialized() else None
    if here is None or here.size == 1:
        yield True
        return
    members = here.mp_group
    if any(map(_private.is_shard, variables)):
        members = tuple(range(here.size))
    lent: list[Variable] = []
    try:
        if WRITER in members and len(members) > 1:
            _collect(variables, members, here, lent)
        yield here.rank == WRITER
    finally:
        for variable in lent:
            _private.take_back(variable)


def _collect(
    variables: Sequence[Variable], members: Sequence[int], here: world.World, lent: list[Variable]
) -> None:
    """Sends variables that rank 0 lacks to it; appends those it receives to `lent`.

    The values are those of its replica, except of variables that only another replica has.
    """
    rank = here.rank
    own = (here.mp_group, [(_layout(v), _is_here(v)) for v in variables])
    found = objects.allgather_objects(own, members, "gathering a model")
    first, tables = found[0][0], [table for _, table in found]
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
        owners.sort(key=lambda member: member not in first)
        if rank == owners[0]:
            objects.send_object(np.asarray(tf_variable(variable)), [WRITER])
        elif rank == WRITER:
            value = objects.recv_object(owners[0])
            try:  # keep receiving after an error, since the senders do not know of it
                if failure is None:
                    _private.lend(variable, value)
                    lent.append(variable)
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure


def together(what: str, work: Callable[[], Any]) -> Any:
    """Runs `work` on this rank and raises on all ranks if it failed on any."""
    here = world.current(what) if world.is_initialized() else None
    if here is None or here.size == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    outcome = RankResult() if failure is None else result_of_error(failure)
    text = first_error(outcomes_of_all(outcome, range(here.size), what))
    if failure is not None:
        raise failure
    if text is not None:
        raise SavingError(f"{what} failed: {text}")
    return result


def _is_here(variable: Variable) -> bool:
    if not _private.is_kept_here(variable):
        return False
    return not is_keras(variable) or _private.is_initialized(variable)


def _layout(variable: Variable) -> str:
    return f"{tuple(variable.shape)} {tf_dtype(variable).name}"
