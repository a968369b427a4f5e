"""Sums of tensors over processes of one machine, through shared memory.

TensorFlow's collectives would copy each tensor several times through gRPC and two sockets, on the
cores that compute. Here each process copies its tensors into memory that all of them see, and adds
up those of all, in the order of the ranks: the sums have the same bits everywhere.

Each bucket of tensors has a region of the `Arena`, with room for the tensors of each process, and
two counters for each: of the last run whose tensors it has written, and of the last run whose
tensors of the others it has read. A process writes again when all have read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import ConcreteFunction, Op, Tensor
from opensmp.distributed.collectives.objects import allgather_objects
from opensmp.distributed.launch.cluster import Cluster
from opensmp.distributed.transport.arena import Arena, Array, Region, share
from opensmp.distributed.transport.arrivals import Arrivals, in_place, write_row
from opensmp.distributed.watchdog import recovery

MOST_RANKS = 4
"""In larger groups each process would read more than the collectives do: N times its tensors."""

_DTYPES = ("float32", "float64", "int32", "int64")
_ALIGNMENT = 64
_NOWHERE = 1  # an invalid row of a tensor of one row


class _Bucket(NamedTuple):
    """What depends on the dtype and the shapes of a bucket only: its functions."""

    ready: ConcreteFunction
    add: ConcreteFunction


class SharedSums:
    """The sums of one process.

    Args:
        arena: The memory.
        rank: This process.
        here: The ranks of this machine, each of which has a column of the arena's counters.
        members: Those of them that see the memory.
        device: Host device of this process.
    """

    def __init__(
        self, arena: Arena, rank: int, here: Sequence[int], members: Sequence[int], device: str
    ) -> None:
        self._arena, self._rank = arena, rank
        self._columns = {member: here.index(member) for member in members}
        self._width = len(here)
        self._device = device
        self._arrivals = Arrivals(arena.counters, device, "opensmp-sums")
        self._views: dict[int, Array] = {}
        self._functions: dict[Any, _Bucket] = {}
        recovery.interruptible.add(self)

    def can_sum(self, tensors: Sequence[Tensor], members: Sequence[int]) -> bool:
        """Whether a bucket can go through shared memory; the same in all processes."""
        return (
            len(members) <= MOST_RANKS
            and all(member in self._columns for member in members)
            and all(
                tensor.dtype.name in _DTYPES
                and tensor.shape.is_fully_defined()
                and tensor.shape.num_elements()
                for tensor in tensors
            )
        )

    def sum_up(
        self, tensors: Sequence[Tensor], members: Sequence[int], key: str, divisor: int | None
    ) -> list[Tensor] | None:
        """Inserts the sums of a bucket, divided by `divisor`; None if there is no memory left.

        All processes of the group do so in a function with the same `key`.
        """
        sizes = [_aligned(_num_bytes(tensor)) for tensor in tensors]
        region = self._arena.region(key, len(members) * sum(sizes))
        if region is None:
            return None
        with tf.init_scope(), tf.device(self._device):
            places = self._places(region, tensors, sizes, len(members))
            bucket = self._bucket(tensors, members.index(self._rank), len(members), divisor)
        return self._inserted(tensors, members, region, places, bucket)

    def _inserted(
        self,
        tensors: Sequence[Tensor],
        members: Sequence[int],
        region: Region,
        places: list[list[Tensor]],
        bucket: _Bucket,
    ) -> list[Tensor]:
        written, read = (
            [(2 * region.number + row) * self._width + self._columns[m] for m in members]
            for row in (0, 1)
        )
        me = members.index(self._rank)
        counters = self._arrivals.counters
        waits = [
            (tf.constant(positions), tf.constant(number), self._arrivals.queue(number, positions))
            for number, positions in ((2 * region.number, written), (2 * region.number + 1, read))
        ]
        with tf.device(self._device):
            run, row = self._call(bucket.ready, [counters, *waits[1]], "room")
            stored = [
                write_row(place, row, tf.reshape(tensor, [-1]))
                for place, tensor in zip(places[me], tensors, strict=True)
            ]
            with tf.control_dependencies(stored):
                said = write_row(counters, tf.constant(written[me]), run)
            others = [place for i, each in enumerate(places) if i != me for place in each]
            with tf.control_dependencies([said]):
                came, *sums = self._call(
                    bucket.add, [counters, *waits[0], run, *tensors, *others], "shared_sum"
                )
            with tf.control_dependencies([sums[0].op]):
                done = write_row(counters, tf.constant(read[me]), came)
        _private.must_run(tf.compat.v1.get_default_graph(), [done])
        for total, tensor in zip(sums, tensors, strict=True):
            total.set_shape(tensor.shape)
        return sums

    def _call(self, function: ConcreteFunction, args: list[Tensor], name: str) -> list[Tensor]:
        # The queues among the arguments order the calls of one region, also in functions that are
        # called several times and inlined, if the calls are stateful.
        with tf.compat.v1.get_default_graph().gradient_override_map(
            {"StatefulPartitionedCall": _NO_GRADIENT}
        ):
            return list(
                tf.raw_ops.StatefulPartitionedCall(
                    args=args,
                    Tout=[output.dtype for output in function.outputs],
                    f=function,
                    name=name,
                    **_private.call_attributes(),
                )
            )

    def _places(
        self, region: Region, tensors: Sequence[Tensor], sizes: Sequence[int], count: int
    ) -> list[list[Tensor]]:
        """The memory of each process for each tensor, shape `[1, elements]`."""
        if region.number not in self._views:
            self._views[region.number] = self._arena.view(region)
        memory, offset = self._views[region.number], 0
        places: list[list[Tensor]] = [[] for _ in range(count)]
        for each in places:
            for tensor, size in zip(tensors, sizes, strict=True):
                part = memory[offset : offset + _num_bytes(tensor)]
                each.append(in_place(part.view(tensor.dtype.as_numpy_dtype).reshape(1, -1)))
                offset += size
        return places

    def _bucket(
        self, tensors: Sequence[Tensor], me: int, count: int, divisor: int | None
    ) -> _Bucket:
        shapes = [tuple(tensor.shape.as_list()) for tensor in tensors]
        dtype = tensors[0].dtype
        key = (dtype, tuple(shapes), me, count, divisor)
        if key not in self._functions:
            word = [
                tf.TensorSpec(self._arrivals.counters.shape, tf.int64),
                tf.TensorSpec([count], tf.int32),
                tf.TensorSpec([], tf.int32),
                tf.TensorSpec([], tf.resource),
            ]
            run = tf.TensorSpec([], tf.int64)
            own = [tf.TensorSpec(shape, dtype) for shape in shapes]
            rows = [tf.TensorSpec([1, math.prod(shape)], dtype) for shape in shapes]
            self._functions[key] = _Bucket(
                _function(self._ready(me), word),
                _function(self._add(shapes, me, divisor), [*word, run, *own, *rows * (count - 1)]),
            )
        return self._functions[key]

    def _ready(self, me: int) -> Callable[..., Any]:
        def ready(counters: Tensor, positions: Tensor, number: Tensor, queue: Tensor) -> Any:
            """The number of this run, when its tensors may be written, and the row to write to."""
            # What this process has read last is the last run that it has ended.
            last = tf.gather(counters, positions[me])
            came = self._arrivals.wait(counters, positions, number, queue, last)
            # Fails after an interrupt, which gives a smaller number.
            row = tf.gather(tf.zeros([1], tf.int32), tf.where(came >= last, 0, _NOWHERE))
            return last + 1, row

        return ready

    def _add(
        self, shapes: Sequence[tuple[int, ...]], me: int, divisor: int | None
    ) -> Callable[..., Any]:
        def add(
            counters: Tensor,
            positions: Tensor,
            number: Tensor,
            queue: Tensor,
            run: Tensor,
            *rest: Tensor,
        ) -> Any:
            """The sums, when the tensors of all have been written; after the run's number."""
            came = self._arrivals.wait(counters, positions, number, queue, run)
            row = tf.where(came >= run, 0, _NOWHERE)
            own, others = rest[: len(shapes)], rest[len(shapes) :]
            sums = []
            for i, shape in enumerate(shapes):
                # A slice of the first axis has the memory of its tensor: nothing is copied.
                terms = [tf.reshape(each[row], shape) for each in others[i :: len(shapes)]]
                terms.insert(me, own[i])
                total = terms[0] + terms[1]
                for term in terms[2:]:
                    total += term
                sums.append(total if divisor is None else total / tf.cast(divisor, total.dtype))
            return [tf.minimum(came, run), *sums]

        return add

    # ------------------------------------------------------------------ after an error of a rank

    def interrupt(self) -> None:
        """See `recovery.Interruptible`."""
        self._arrivals.interrupt()

    def restart(self, generation: int) -> None:
        """See `recovery.Interruptible`."""
        self._arrivals.restart()
        # Regions that another process has made already count from the same number.
        own = self._arena.counters.reshape(-1, self._width)[:, self._columns[self._rank]]
        own[:] = generation << recovery.GENERATION_BITS


def _function(body: Callable[..., Any], specs: Sequence[tf.TensorSpec]) -> ConcreteFunction:
    made = tf.function(body, autograph=False, experimental_attributes={"_noinline": True})
    return made.get_concrete_function(*specs)


def _num_bytes(tensor: Tensor) -> int:
    return int(tensor.shape.num_elements() * tensor.dtype.size)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


_NO_GRADIENT = "OpensmpSharedSum"


@tf.RegisterGradient(_NO_GRADIENT)
def _refuse_gradient(_: Op, *__: Any) -> Any:
    raise LookupError(
        "A sum over replicas has no gradient. Compute gradients before smp.allreduce, or wrap it "
        "in tf.stop_gradient."
    )


_made: list[SharedSums | None] = []
_is_on = False


def connect(here: Cluster, is_on: bool) -> None:
    """Lets sums go through shared memory from now on, or not. All ranks of the run call it.

    The memory is made once, and lasts as long as the processes.
    """
    global _is_on
    _is_on = is_on
    if is_on and not _made:
        peers = here.meeting.peers
        machine = peers[here.rank].machine
        on_machine = [peer.rank for peer in peers if peer.machine == machine]
        arena, members = share(
            here.rank,
            on_machine,
            lambda value: allgather_objects(value, range(len(peers)), "sharing memory"),
        )
        if arena is None or here.rank not in members:
            _made.append(None)
        else:
            _made.append(SharedSums(arena, here.rank, on_machine, members, here.host))


def current() -> SharedSums | None:
    """The sums of this process; None if they do not go through shared memory."""
    return _made[0] if _is_on and _made else None
