"""Puts variables on the device of the partition that uses them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opensmp import _private
from opensmp.compiler.trace.variables import is_keras, tf_variable, variable_name
from opensmp.errors import ElsewhereError

Variable = Any


def place(
    variables: Iterable[Variable],
    home: Mapping[int, int],
    devices: Sequence[str],
    default_partition: int,
    elsewhere: Mapping[int, int] | None = None,
    owner: Callable[[int], int] | None = None,
) -> bool:
    """Allocates or moves Keras variables so that each lies on its home's device.

    A variable that waits for its first value and that nothing reads goes to the
    default partition. A plain `tf.Variable` stays where its owner made it: it
    cannot change its device.

    Args:
        variables: The variables of a model.
        home: Id of a variable to its partition.
        devices: Device of each partition.
        default_partition: Partition of variables without a home.
        elsewhere: Partitions of other processes, and the rank of each; their variables get no
            memory here.
        owner: Position in its replica of the process with a partition; None if there is one.

    Returns:
        Whether a variable moved that had its memory elsewhere before.
    """
    moved = False
    for variable in variables:
        if not is_keras(variable):
            continue
        partition = home.get(id(variable))
        if elsewhere and partition is not None and partition in elsewhere:
            if not _private.is_elsewhere(variable):
                moved |= _private.is_initialized(variable)
                _private.give_up(variable, f"{variable.path} of rank {elsewhere[partition]}")
            _note_home(variable, partition, elsewhere, owner)
            continue
        if _private.is_elsewhere(variable):  # what is empty here must not pass for a value
            if partition is None:
                continue
            raise ElsewhereError(
                f"Variable {variable_name(variable)} is to lie in partition {partition} of this "
                "process, but its value is in another one. Expected: where it was placed, it "
                "stays. This is a fault of opensmp: please report it with the script."
            )
        device = devices[default_partition if partition is None else partition]
        if not _private.is_initialized(variable):
            _private.initialize_on(variable, device)
        elif not tf_variable(variable).device.endswith(device) and id(variable) in home:
            _private.move_to(variable, device)
            moved = True
        _note_home(variable, partition, elsewhere, owner)
    return moved


_numbers = itertools.count()


def _note_home(
    variable: Variable,
    partition: int | None,
    elsewhere: Mapping[int, int] | None,
    owner: Callable[[int], int] | None,
) -> None:
    """Notes in which process a variable lives; variables are numbered alike in all of them."""
    if not elsewhere or partition is None or owner is None:
        return
    known = _private.home_of(variable)
    number = known.number if known is not None else (next(_numbers),)
    rank = f" of rank {elsewhere[partition]}" if partition in elsewhere else ""
    home = _private.Home(owner(partition), number, f"{variable.path}{rank}")
    _private.set_home(variable, home)


def mark_copies(
    variables: Iterable[Variable], home: Mapping[int, int], elsewhere: Mapping[int, int]
) -> None:
    """Tells the variables of which another process has the value that counts.

    A model may read variables that it does not have, such as Keras' own seed. All processes have
    these in memory from the start, and the one with the partition that reads them changes them.

    Args:
        variables: Those that a model reads.
        home: Id of a variable to its partition.
        elsewhere: Partitions of other processes, and the rank of each.
    """
    for variable in variables:
        if is_keras(variable) and _private.is_initialized(variable):
            _private.set_copy(variable, home.get(id(variable)) in elsewhere)
