"""Makes all variable values available in all processes, for eager Keras computations on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from opensmp import _private
from opensmp.base.types import Variable
from opensmp.compiler.trace.variables import tf_variable, variable_name
from opensmp.distributed import world
from opensmp.distributed.collectives import objects
from opensmp.errors import ElsewhereError


@contextlib.contextmanager
def readable_everywhere(variables: Sequence[Variable], what: str) -> Iterator[None]:
    """Context in which each process of a replica can read all variables, in host memory.

    Values are broadcast one at a time and freed on exit; meanwhile each process needs memory for
    the whole model. Collective over the replica; with one process it does nothing.
    """
    here = world.current(what)
    members = here.mp_group
    if len(members) == 1:
        yield
        return
    own = [not _private.is_elsewhere(variable) for variable in variables]
    tables = objects.allgather_objects(own, members, what)
    lent: list[Variable] = []
    try:
        for index, variable in enumerate(variables):
            have = [m for m, table in zip(members, tables, strict=True) if table[index]]
            if len(have) == len(members):
                continue
            if not have:
                raise ElsewhereError(
                    f"{what}: variable {variable_name(variable)} has a value in no process."
                )
            is_root = here.rank == have[0]
            value = np.asarray(tf_variable(variable)) if is_root else None
            value = objects.broadcast_object(value, members, have[0], what)
            if here.rank not in have:
                _private.lend(variable, value)
                lent.append(variable)
        yield
    finally:
        for variable in lent:
            _private.take_back(variable)
