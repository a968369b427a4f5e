"""Places variables on the device of the partition that uses them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from opensmp import _private
from opensmp.base.types import Variable
from opensmp.compiler.trace.variables import is_keras, tf_variable, variable_name
from opensmp.errors import ElsewhereError


def place(
    variables: Iterable[Variable],
    home: Mapping[int, int],
    devices: Sequence[str],
    default_partition: int,
    elsewhere: Mapping[int, int] | None = None,
    owner: Callable[[int], int] | None = None,
) -> None:
    """Allocates or moves Keras variables to the device of their partition.

    An uninitialized variable that nothing reads is placed in the default partition. A plain
    `tf.Variable` stays where its owner created it, because it cannot change its device. No memory
    is allocated here for variables of `elsewhere`, which maps the partitions of other processes to
    their ranks; `owner` maps a partition to the position of its process in the replica.
    """
    for variable in variables:
        if not is_keras(variable):
            continue
        partition = home.get(id(variable))
        if elsewhere and partition is not None and partition in elsewhere:
            if not _private.is_elsewhere(variable):
                _private.give_up(variable, f"{variable.path} of rank {elsewhere[partition]}")
            _note_home(variable, partition, elsewhere, owner)
            continue
        if _private.is_elsewhere(variable):  # its empty memory here must not be used as its value
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
        _note_home(variable, partition, elsewhere, owner)


_numbers = itertools.count()


def _note_home(
    variable: Variable,
    partition: int | None,
    elsewhere: Mapping[int, int] | None,
    owner: Callable[[int], int] | None,
) -> None:
    """Records the process that owns a variable; the numbers are the same in all processes."""
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
    """Marks those of a model's read variables whose authoritative value is in another process.

    A model may read variables that it does not own, such as Keras' global seed. All processes have
    these in memory from the start, and the process of the partition that reads them changes them.
    `home` maps the id of a variable to its partition; `elsewhere` the partitions of other processes
    to their ranks.
    """
    for variable in variables:
        if is_keras(variable) and _private.is_initialized(variable):
            _private.set_copy(variable, home.get(id(variable)) in elsewhere)
