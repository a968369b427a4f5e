"""Splits the arguments of a step into microbatches."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp.base.types import Tensor
from opensmp.errors import StepError

_logger = logging.getLogger("opensmp")


def split_arguments(
    arguments: Mapping[str, Any],
    num_microbatches: int,
    *,
    non_split_inputs: Sequence[str] = (),
    input_split_axes: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Splits named arguments into one dict of arguments per microbatch.

    Tensors (dense, ragged and sparse) and arrays in any nest of lists, tuples, dicts and sets are
    split along an axis. Scalars and values that are not tensors go to every microbatch unchanged.
    An object with a method `smp_slice(num_mb, mb, axis)` splits itself.

    Args:
        arguments: Argument name to value.
        num_microbatches: Number of microbatches.
        non_split_inputs: Names of arguments that every microbatch gets whole.
        input_split_axes: Argument name to split axis, where it is not 0.

    Raises:
        StepError: if the size of a split axis is not a multiple of the number of microbatches; the
            message names all such arguments.
    """
    axes = dict(input_split_axes or {})
    splitter = _Splitter(num_microbatches)
    result: list[dict[str, Any]] = [{} for _ in range(num_microbatches)]
    for name, value in arguments.items():
        if name in non_split_inputs:
            parts = [value] * num_microbatches
        else:
            parts = splitter.split(value, axes.get(name, 0), name)
        for microbatch, part in zip(result, parts, strict=True):
            microbatch[name] = part
    splitter.check()
    return result


# What the assertion of `_divides` says, as TensorFlow prints it.
_UNEVEN = re.compile(
    r"cannot be split into (\d+) microbatches\. Argument \\?'(.*?)\\?' must have a multiple of \d+ "
    r"entries, received:\]? \[?(\d+)"
)


@contextlib.contextmanager
def explaining_sizes() -> Iterator[None]:
    """Context in which a size that was not known before a step ran is refused as others are."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        match = _UNEVEN.search(error.message)
        if match is None:
            raise
        count, name, size = match.groups()
        fault = f"argument '{name}' has {size} entries, which is not a multiple of {count}"
        raise StepError(_refusal(int(count), [fault])) from None


def _refusal(num_microbatches: int, faults: Sequence[str]) -> str:
    listed = "\n".join(f"  - {fault}" for fault in faults)
    return (
        f"smp.step: the batch cannot be split into {num_microbatches} microbatches:\n{listed}\n"
        f"Use a batch size that is a multiple of {num_microbatches}, change 'microbatches' in "
        "smp.init, or name arguments that are not batches in smp.step(non_split_inputs=[...])."
    )


class _FrozenSet(frozenset[Any]):
    """A set in hashable form: `tf.function` accepts only hashable arguments."""


def freeze_sets(nest: Any) -> Any:
    """Converts all sets in a nest of arguments to a hashable form."""
    if not any(isinstance(leaf, set) for leaf in tf.nest.flatten(nest)):
        return nest
    return tf.nest.map_structure(lambda x: _FrozenSet(x) if isinstance(x, set) else x, nest)


def thaw_sets(nest: Any) -> Any:
    """Reverts `freeze_sets`."""
    if not any(isinstance(leaf, _FrozenSet) for leaf in tf.nest.flatten(nest)):
        return nest
    return tf.nest.map_structure(lambda x: set(x) if isinstance(x, _FrozenSet) else x, nest)


class _Splitter:
    """Splits values and collects faults, to report all of them in one error."""

    def __init__(self, num_microbatches: int) -> None:
        self._num = num_microbatches
        self._faults: list[str] = []
        self._sizes: dict[str, int] = {}

    def split(self, value: Any, axis: int, name: str) -> list[Any]:
        """Returns one value per microbatch."""
        if hasattr(value, "smp_slice") and not isinstance(value, type):
            return [value.smp_slice(self._num, i, axis) for i in range(self._num)]
        if isinstance(value, tf.RaggedTensor):
            return self._split_ragged(value, axis, name)
        if isinstance(value, tf.SparseTensor):
            return self._split_sparse(value, axis, name)
        if isinstance(value, (tf.Tensor, np.ndarray)):
            return self._split_tensor(tf.convert_to_tensor(value), axis, name)
        if isinstance(value, Mapping):
            return self._split_items(value.values(), axis, name, functools.partial(_like, value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._split_items(value, axis, name, lambda items: type(value)(*items))
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._split_items(value, axis, name, type(value))
        return [value] * self._num

    def check(self) -> None:
        """Raises one error for all faults; warns if arguments differ in batch size."""
        if self._faults:
            raise StepError(_refusal(self._num, self._faults))
        if len(set(self._sizes.values())) > 1:
            _logger.warning(
                "smp.step: arguments of different size are each split into %d microbatches: %s. "
                "Name those that are not batches in smp.step(non_split_inputs=[...]).",
                self._num,
                ", ".join(f"{name}={size}" for name, size in self._sizes.items()),
            )

    def _split_items(
        self, items: Any, axis: int, name: str, make: Callable[[list[Any]], Any]
    ) -> list[Any]:
        split = [self.split(item, axis, name) for item in items]
        return [make([parts[i] for parts in split]) for i in range(self._num)]

    def _split_tensor(self, value: Tensor, axis: int, name: str) -> list[Tensor]:
        if value.shape.rank == 0 or self._num == 1 or not self._check_axis(value, axis, name):
            return [value] * self._num
        size = value.shape[axis]
        if size is None:
            with tf.control_dependencies([self._divides(tf.shape(value)[axis], name)]):
                parts = tf.split(tf.identity(value), self._num, axis)
            return list(parts)
        if not self._check_size(size, axis, name):
            return [value] * self._num
        return list(tf.split(value, self._num, axis))

    def _split_ragged(self, value: Any, axis: int, name: str) -> list[Any]:
        if axis != 0:
            self._faults.append(
                f"argument '{name}' is ragged and can be split along axis 0 only, not {axis}"
            )
            return [value] * self._num
        if self._num == 1:
            return [value]
        rows = value.shape[0]
        if rows is not None and not self._check_size(rows, axis, name):
            return [value] * self._num
        with tf.control_dependencies([self._divides(value.nrows(), name)]):
            each = tf.identity(value.nrows() // self._num)
        return [value[i * each : (i + 1) * each] for i in range(self._num)]

    def _split_sparse(self, value: Any, axis: int, name: str) -> list[Any]:
        if self._num == 1 or not self._check_axis(value, axis, name):
            return [value] * self._num
        axis %= value.shape.rank
        size = value.shape[axis]
        if size is not None and not self._check_size(size, axis, name):
            return [value] * self._num
        with tf.control_dependencies([self._divides(value.dense_shape[axis], name)]):
            indices = tf.identity(value.indices)
        value = tf.SparseTensor(indices, value.values, value.dense_shape)
        return list(tf.sparse.split(sp_input=value, num_split=self._num, axis=axis))

    def _check_axis(self, value: Tensor, axis: int, name: str) -> bool:
        rank = value.shape.rank
        if rank is None:
            self._faults.append(
                f"argument '{name}' has an unknown rank; give it a shape with set_shape or an "
                "input_signature"
            )
        elif not -rank <= axis < rank:
            self._faults.append(f"argument '{name}' of rank {rank} has no axis {axis}")
        return rank is not None and -rank <= axis < rank

    def _check_size(self, size: int, axis: int, name: str) -> bool:
        self._sizes[name] = size
        if size % self._num:
            self._faults.append(
                f"argument '{name}' has {size} entries along axis {axis}, which is not a "
                f"multiple of {self._num}"
            )
        return size % self._num == 0

    def _divides(self, size: Tensor, name: str) -> Any:
        """Assertion for a size that is known only at run time."""
        return tf.debugging.Assert(
            tf.equal(size % self._num, 0),
            [
                f"smp.step: the batch cannot be split into {self._num} microbatches. Argument "
                f"'{name}' must have a multiple of {self._num} entries, received:",
                size,
            ],
        )


def _like(mapping: Mapping[Any, Any], values: list[Any]) -> Any:
    pairs = list(zip(mapping, values, strict=True))
    try:
        return type(mapping)(pairs)  # type: ignore[call-arg]
    except TypeError:  # e.g. a defaultdict, whose constructor takes other arguments
        return dict(pairs)
