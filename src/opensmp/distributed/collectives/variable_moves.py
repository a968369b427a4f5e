"""Moves and copies variables, with their optimizer slots, between ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Variable
from opensmp.compiler.trace.variables import is_keras, tf_variable, variable_name
from opensmp.distributed.collectives import objects
from opensmp.distributed.collectives.reduce import replace_by
from opensmp.distributed.world import World, current
from opensmp.errors import ElsewhereError

_NAME = "moving variables to the ranks of a new configuration"


def move_between_ranks(
    variables: Iterable[Variable], homes: Mapping[int, int], world: World
) -> None:
    """Moves variables that were placed before the last `smp.init` to the ranks that own them now.

    The number of partitions, or of processes per replica, may have changed since. A rank that owns
    a variable now but lacks its value receives it from the first rank that has it; the others keep
    theirs until they give it up. All ranks must call it with the same variables in the same order.
    No value is sent if every owner has its values.
    """
    moving = list({id(v): v for v in variables if id(v) in homes}.values())
    if world.size == 1 or not moving:
        return
    gc.collect()  # drops slots of deleted optimizers, which must be gone on all ranks
    found = [
        (each, homes[id(variable)]) for variable in moving for each in _private.with_slots(variable)
    ]
    own = [(tuple(each.shape), _private.is_kept_here(each)) for each, _ in found]
    ranks = range(world.size)
    tables = objects.allgather_objects((world.mp_group, own), ranks, _NAME)
    shapes = [[shape for shape, _ in table] for _, table in tables]
    if any(each != shapes[0] for each in shapes):
        raise ElsewhereError(
            f"Rank {world.rank}: the ranks have made different models or optimizers, so that "
            "variables cannot be moved to those who own them since the last smp.init. Expected: "
            "the same program in all ranks."
        )
    for index, (variable, partition) in enumerate(found):
        _private.set_shard(variable, False)  # until an optimizer divides its slots again
        have = [rank for rank in ranks if tables[rank][1][index][1]]
        position = world.owner(partition)
        need = {group[position] for group, _ in tables} - set(have)
        if not need:
            continue
        if not have:
            raise ElsewhereError(
                f"Variable {variable_name(variable)} has a value in no rank any more. Load the "
                "model's weights again, or restore a checkpoint, after smp.init."
            )
        root = have[0]
        value = np.asarray(tf_variable(variable)) if world.rank == root else None
        value = objects.broadcast_object(value, ranks, root, _NAME)
        if world.rank in need:
            _private.take_in(variable, value, world.devices[partition])


def copy_variables(
    variables: Iterable[Any], members: tuple[int, ...], root: int, name: str
) -> None:
    """Copies the values of variables from one rank to the others, bit by bit.

    The variables are in the same order in all of `members`. Those of other processes, those without
    a value, and slots of an optimizer that only one replica has, are skipped.
    """
    here = [
        tf_variable(variable)
        for variable in variables
        if not _private.is_elsewhere(variable)
        and not _private.is_shard(variable)
        and (not is_keras(variable) or _private.is_initialized(variable))
    ]
    if len(members) == 1 or not here:
        return
    values = replace_by([tf.convert_to_tensor(v) for v in here], members, root, name=name)
    if current(name).rank != root:
        for variable, value in zip(here, values, strict=True):
            variable.assign(value)
