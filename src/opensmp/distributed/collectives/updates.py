"""Updates of variables that are divided over replicas (`shard_optimizer_state`).

Each replica updates some of the variables and has the optimizer's slots of those only, as in stage
1 of ZeRO (Rajbhandari et al., 2020). The new values go to the other replicas by gathers, bit by
bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Gradient, Tensor, Variable
from opensmp.compiler.trace.variables import tf_dtype, tf_variable
from opensmp.distributed.collectives.chunks import CHUNK_BYTES
from opensmp.distributed.collectives.clipping import clipping
from opensmp.distributed.collectives.reduce import all_reduce, bits_of, from_bits, gather_rows
from opensmp.distributed.world import DP_GROUP, World

_NAME = "shard_optimizer_state"
_IN_FLIGHT = 2  # gathers whose tensors may be in memory at a time


class Updates:
    """Divides the updates of variables over the replicas of a world; see `_private.Shards`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.position = world.rank_in(DP_GROUP)
        self._clip_over_all = clipping(range(world.size))

    def divide(self, variables: Sequence[Variable]) -> None:
        """Gives each variable that has none a replica that updates it, and sheds its slots.

        Balances the bytes of the variables, for each process of a replica by itself. The result is
        the same in all processes.
        """
        new = [v for v in variables if _private.updater_of(v) is None and _is_updated(v)]
        loads: dict[Any, list[int]] = {}
        for variable in variables:
            updater = _private.updater_of(variable)
            load = loads.setdefault(_process(variable), [0] * len(self._world.dp_group))
            if updater is not None:
                load[updater] += num_bytes(variable)
        for variable in sorted(new, key=num_bytes, reverse=True):  # stable: equal in all processes
            load = loads[_process(variable)]
            updater = load.index(min(load))
            load[updater] += num_bytes(variable)
            _private.set_updater(variable, updater)
        for variable in new:
            _private.shed_slots(variable)

    def share(self, variables: Sequence[Variable]) -> None:
        """Copies each variable from the replica that updates it to the others, bit by bit.

        Variables of other processes of the replica, and those that each replica updates, are
        skipped. All replicas call it with the same variables.
        """
        here = [v for v in variables if not _private.is_elsewhere(v)]
        for size in (4, 8):  # bytes of what the bits of a number travel as
            alike = [v for v in here if _travel_bytes(v) == size]
            waits: list[Tensor] = []
            for round_ in rounds(self._shares(alike), size):
                after = waits[-_IN_FLIGHT : len(waits) - _IN_FLIGHT + 1]
                waits.append(self._gather(round_, after))

    def clip(
        self, gradients: list[Gradient], places: list[int], num_all: int, clip_norm: Any
    ) -> list[Gradient]:
        """Clips gradients by the norm of those of all replicas; see `_private.Shards`."""
        if len(self._world.mp_group) > 1:
            assert self._clip_over_all is not None
            return self._clip_over_all(gradients, places, num_all, clip_norm)
        # As Keras does in each replica without the key, to the last bit.
        squares = [keras.ops.sum(keras.ops.square(gradient)) for gradient in gradients]
        sums = [tf.zeros([], tf.float64)] * num_all
        for place, square in zip(places, squares, strict=True):
            sums[place] = tf.cast(square, tf.float64)
        (total,) = all_reduce(
            [tf.stack(sums)], self._world.dp_group, name=f"{_NAME} global_clipnorm"
        )
        if not gradients:
            return []
        norm = tf.sqrt(tf.reduce_sum(tf.cast(total, squares[0].dtype)))
        scale = clip_norm * keras.ops.minimum(1.0 / norm, 1.0 / clip_norm)
        scale += norm - norm  # adds 0, or NaN if the norm is not finite
        return [gradient * scale for gradient in gradients]

    def _shares(self, variables: Sequence[Variable]) -> list[list[Variable]]:
        """The variables by the position of the replica that updates them."""
        shares: list[list[Variable]] = [[] for _ in self._world.dp_group]
        for variable in variables:
            updater = _private.updater_of(variable)
            if updater is not None:
                shares[updater].append(variable)
        return shares

    def _gather(self, round_: Round, after: Sequence[Tensor]) -> Tensor:
        """Sends what this replica updates of a round, and assigns what the others send."""
        dtype = tf.int32 if round_.size == 4 else tf.int64
        with tf.control_dependencies(after):
            own = [
                tf.reshape(bits_of(tf.convert_to_tensor(tf_variable(variable))), [-1])
                for variable in round_.shares[self.position]
            ]
        missing = round_.length - sum(_length(v) for v in round_.shares[self.position])
        row = [*own, tf.zeros([missing], dtype)] if missing else own
        sent = row[0] if len(row) == 1 else tf.concat(row, 0)
        rows = gather_rows(sent, self._world.dp_group, name=_NAME)
        for position, share in enumerate(round_.shares):
            start = position * round_.length
            for variable in share if position != self.position else ():
                stored = tf_variable(variable)
                with tf.device(stored.device):
                    bits = tf.slice(rows, [start], [_length(variable)])
                    value = from_bits(tf.reshape(bits, _bits_shape(stored)), stored)
                    stored.assign(value)
                start += _length(variable)
        return rows


class Round(NamedTuple):
    """Variables that travel in one gather.

    Attributes:
        shares: The variables that each replica sends, by its position.
        length: Number of bit patterns that each replica sends, with padding.
        size: Bytes of a bit pattern, 4 or 8.
    """

    shares: list[list[Any]]
    length: int
    size: int


def rounds(shares: Sequence[Sequence[Variable]], size: int) -> list[Round]:
    """Divides the variables of all replicas into gathers to which each sends about as much.

    A gather has up to `CHUNK_BYTES` of each replica, or a larger variable, so that few bytes are in
    memory at a time and few travel as padding.
    """
    # Large ones first, so that those of the replicas fall into one round.
    waiting = [sorted(share, key=_length, reverse=True) for share in shares]
    found = []
    while any(waiting):
        length = max(CHUNK_BYTES // size, *(_length(share[0]) for share in waiting if share), 0)
        taken: list[list[Any]] = []
        for share in waiting:
            taken.append([])
            room = length
            while share and _length(share[0]) <= room:
                room -= _length(share[0])
                taken[-1].append(share.pop(0))
        length = max(sum(map(_length, share)) for share in taken)
        if length:
            found.append(Round(taken, length, size))
    return found


def num_bytes(variable: Variable) -> int:
    """Bytes of a variable."""
    return int(math.prod(variable.shape)) * int(tf_dtype(variable).size)


def _process(variable: Variable) -> int | None:
    """Position in its replica of the process that has a variable; None if all are in one."""
    home = _private.home_of(variable)
    return None if home is None else home.process


def _is_updated(variable: Variable) -> bool:
    """Whether an optimizer updates a variable; Keras assigns the gradients of some to them."""
    return not getattr(variable, "overwrite_with_gradient", False)


def _travel_bytes(variable: Variable) -> int:
    """Bytes of the integers that hold the bits of a variable, see `bits_of`."""
    size = int(tf_dtype(variable).size)
    return 8 if size >= 8 else 4


def _bits_shape(stored: Any) -> list[int]:
    """Shape of the bits of a variable; complex128 has those of both parts."""
    shape = stored.shape.as_list()
    return [2, *shape] if stored.dtype == tf.complex128 else shape


def _length(variable: Variable) -> int:
    """Number of bit patterns of a variable."""
    length = int(math.prod(variable.shape))
    return 2 * length if tf_dtype(variable) == tf.complex128 else length


def updates_of(world: World) -> Updates | None:
    """What divides the updates in a world; None if each replica updates all of its variables."""
    is_shared = world.config.shard_optimizer_state and len(world.dp_group) > 1
    return Updates(world) if is_shared else None
