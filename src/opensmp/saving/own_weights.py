"""`get_weights` for a model whose weights are distributed over processes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from opensmp import _private
from opensmp.base.thread_values import ThreadValue
from opensmp.compiler.trace.variables import tf_dtype, tf_variable
from opensmp.distributed import world
from opensmp.distributed.collectives import objects

_own = ThreadValue(False)


def own_weights() -> AbstractContextManager[None]:
    """Context in which `get_weights` returns only this process's weights, without communication.

    Zeros that take no memory stand for the other weights.
    """
    return _own.set_to(True)


def values_of(model: Any) -> list[Any]:
    """Values of all weights, as returned by `keras.Model.get_weights`.

    Collective over the replica, unless in `own_weights`: every process gets the whole model in host
    memory.
    """
    variables = list(model.weights)
    here = [not _private.is_elsewhere(variable) for variable in variables]
    members = world.current("model.get_weights").mp_group if world.is_initialized() else (0,)
    alone = _own.get() or len(members) == 1
    if alone:
        return [
            tf_variable(v).numpy() if is_here else _nothing_like(v)
            for v, is_here in zip(variables, here, strict=True)
        ]
    tables = objects.allgather_objects(here, members, "model.get_weights")
    values = []
    for index, variable in enumerate(variables):
        owners = [m for m, table in zip(members, tables, strict=True) if table[index]]
        value = tf_variable(variable).numpy() if here[index] else None
        root = owners[0]
        values.append(objects.broadcast_object(value, members, root, "model.get_weights"))
    return values


def _nothing_like(variable: Any) -> Any:
    dtype = tf_dtype(variable).as_numpy_dtype
    return np.broadcast_to(np.zeros([], dtype), tuple(variable.shape))
