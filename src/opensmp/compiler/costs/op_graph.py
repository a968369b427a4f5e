"""A graph as integer indices and shapes: which operation reads which tensor, and tensor sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.base.types import Op, Tensor

Port = tuple[int, int]
"""A tensor: index of its producer and its index among the producer's outputs."""


class Array(NamedTuple):
    """Size and kind of a tensor.

    Attributes:
        shape: Its dimensions, all known.
        itemsize: Bytes per element; 0 for handles, whose contents are stored elsewhere.
        differentiable: Whether gradients can flow through it.
    """

    shape: tuple[int, ...]
    itemsize: int
    differentiable: bool

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, eq=False)
class Wiring:
    """The operations of one graph by index, in topological order.

    Attributes:
        operations: The operations.
        index: Maps an operation to its index.
        types: Type of each operation.
        inputs: Tensors that each operation reads.
        controls: Control inputs of each operation.
        arrays: Outputs of each operation.
    """

    operations: tuple[Op, ...]
    index: dict[Op, int]
    types: list[str]
    inputs: list[tuple[Port, ...]]
    controls: list[tuple[int, ...]]
    arrays: list[tuple[Array, ...]]

    @classmethod
    def of(cls, operations: Sequence[Op], unknown_size: int) -> Wiring:
        """Converts the operations of a graph, given in topological order.

        An unknown dimension is assumed to equal the corresponding one of an input that has as many
        unknown dimensions; if there is no such input, it is `unknown_size`. The unknown dimension
        of a reshape follows from the number of elements.
        """
        index = {op: i for i, op in enumerate(operations)}
        types: list[str] = []
        inputs: list[tuple[Port, ...]] = []
        controls: list[tuple[int, ...]] = []
        arrays: list[tuple[Array, ...]] = []
        assumed: dict[Port, tuple[int, ...]] = {}
        for i, op in enumerate(operations):
            # Gradients built after the trace may have added inputs to a loop.
            read = tuple((index[t.op], t.value_index) for t in op.inputs if t.op in index)
            types.append(op.type)
            inputs.append(read)
            controls.append(tuple(sorted(index[c] for c in op.control_inputs if c in index)))
            made = []
            for k, tensor in enumerate(op.outputs):
                static = _dimensions(tensor)
                shape = _resolve(op.type, static, read, arrays, assumed, unknown_size)
                if None in static:
                    assumed[i, k] = tuple(
                        size for size, known in zip(shape, static, strict=True) if known is None
                    )
                made.append(Array(shape, *_kind(tensor.dtype)))
            arrays.append(tuple(made))
        return cls(tuple(operations), index, types, inputs, controls, arrays)

    def array(self, port: Port) -> Array:
        """Returns size and kind of a tensor."""
        return self.arrays[port[0]][port[1]]

    def input_arrays(self, op: int) -> tuple[Array, ...]:
        """Returns size and kind of the tensors that an operation reads."""
        return tuple(self.arrays[i][k] for i, k in self.inputs[op])

    def producers(self, op: int) -> list[int]:
        """Returns the data and control predecessors of an operation; duplicates are possible."""
        return [*(i for i, _ in self.inputs[op]), *self.controls[op]]


_KINDS: dict[Any, tuple[int, bool]] = {}


def _kind(dtype: Any) -> tuple[int, bool]:
    """Returns bytes per element and whether gradients flow through the dtype."""
    if dtype not in _KINDS:
        if dtype in (tf.variant, tf.resource, tf.string):
            _KINDS[dtype] = (0, dtype == tf.variant)
        else:
            _KINDS[dtype] = (int(dtype.size), bool(dtype.is_floating or dtype.is_complex))
    return _KINDS[dtype]


def _dimensions(tensor: Tensor) -> tuple[int | None, ...]:
    shape = tensor.shape
    return () if shape.rank is None else tuple(shape.as_list())


def _resolve(
    op_type: str,
    static: tuple[int | None, ...],
    read: tuple[Port, ...],
    arrays: list[tuple[Array, ...]],
    assumed: dict[Port, tuple[int, ...]],
    unknown_size: int,
) -> tuple[int, ...]:
    """Returns a shape with its unknown dimensions filled in; see `Wiring.of`."""
    num_unknown = static.count(None)
    if not num_unknown:
        return tuple(size for size in static if size is not None)
    if op_type == "Reshape" and num_unknown == 1:
        known = math.prod(size for size in static if size is not None)
        producer, output = read[0]
        missing = max(1, arrays[producer][output].elements // max(known, 1))
        return tuple(missing if size is None else size for size in static)
    sizes = next(
        (assumed[port] for port in read if len(assumed.get(port, ())) == num_unknown),
        (unknown_size,) * num_unknown,
    )
    waiting = iter(sizes)
    return tuple(next(waiting) if size is None else size for size in static)
