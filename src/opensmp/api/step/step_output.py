"""`smp.StepOutput`: one returned tensor of a step, with one value per microbatch."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp.base import notebook
from opensmp.base.message_text import counted
from opensmp.base.types import Tensor
from opensmp.compiler.lowering.sparse_gradients import side_by_side
from opensmp.errors import StepError
from opensmp.execution.multi_process.remote_gradient import RemoteGradient
from opensmp.execution.multi_process.remote_values import known
from opensmp.execution.unreduced import Unreduced


class StepOutput(Unreduced):
    """One returned tensor of an `smp.step` function, with one value per microbatch.

    `tf.function` and `tf.nest` treat it as a list of its tensors. Passed as an argument to another
    step, it is split into its microbatches again.

    It is not a tensor: arithmetic, comparison, `float`, `bool`, a format such as `.3f`, NumPy,
    TensorFlow, metrics and optimizers raise a `StepError` that names the method to call first, even
    with a single microbatch. `print`, `len`, iteration and indexing, over the microbatches, work.

    Args:
        outputs: The tensor of each microbatch, in order; `tf.Tensor`, `tf.IndexedSlices`,
            `tf.RaggedTensor` or `tf.SparseTensor`.
        device: Device on which to reduce them; None for the default placement.
        terms: Optional smaller set of tensors with the same sum as `outputs`, each computed for
            several microbatches at once; empty if there are none.

    Example:
        ```python
        gradients, loss, predictions = forward_backward(images, labels)
        gradients = [g.accumulate() for g in gradients]
        loss = loss.reduce_mean()
        predictions = predictions.merge()
        ```
    """

    def __init__(
        self, outputs: Sequence[Tensor], device: str | None = None, terms: Sequence[Tensor] = ()
    ) -> None:
        self._outputs = outputs if isinstance(outputs, Stacked) else list(outputs)
        self._device = device
        self._terms = list(terms)

    @property
    def _sample(self) -> Tensor:
        """A tensor with the type of an output, and with its shape if all have the same."""
        return self._terms[0] if isinstance(self._outputs, Stacked) else self._outputs[0]

    @property
    def outputs(self) -> list[Tensor]:
        """The tensor of each microbatch."""
        return known(list(self._outputs))

    def __len__(self) -> int:
        return len(self._outputs)

    def __iter__(self) -> Any:
        return iter(self.outputs)

    def __getitem__(self, microbatch: int | slice) -> Tensor:
        return self.outputs[self._smp_position(microbatch)]

    def __repr__(self) -> str:
        count, first = len(self._outputs), self._sample
        if not hasattr(first, "dtype"):  # tf.nest has replaced the tensors with placeholders
            return f"StepOutput({self._outputs!r})"
        return (
            f"StepOutput({count} microbatch{'es' * (count > 1)} of shape={first.shape}, "
            f"dtype={tf.as_dtype(first.dtype).name})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the type, and the values of each microbatch if they are known."""
        rows = [[str(m), *_cells(value)] for m, value in enumerate(self._outputs)]
        shown = notebook.table(["microbatch", "shape", "values"], rows, left=["shape", "values"])
        return notebook.paragraph(repr(self)) + shown

    def _smp_mend(self) -> str:
        first = self._sample
        if isinstance(first, tf.Tensor) and first.shape.rank == 0:
            return "call `reduce_mean()` on it first, as in `loss = loss.reduce_mean()`"
        return (
            "call a method of it first, `accumulate()` where it is a gradient, as in "
            "`gradients = [g.accumulate() for g in gradients]`, `reduce_mean()` where it is a "
            "mean, such as a loss, `merge()` where it has the rows of the batch"
        )

    @tf.autograph.experimental.do_not_convert
    def reduce_mean(self) -> Tensor:
        """Computes the elementwise mean over microbatches; same shape as one output.

        Integers give a floating-point mean.

        Raises:
            StepError: if the outputs have different shapes, or a boolean or string dtype.
        """
        self._check_addable("reduce_mean", "mean")
        with self._on_device():
            return _known(_divide(self._sum(_sum_in_order), len(self._outputs)))

    @tf.autograph.experimental.do_not_convert
    def reduce_sum(self) -> Tensor:
        """Computes the elementwise sum over microbatches; same shape and dtype as one output.

        Raises:
            StepError: if the outputs have different shapes, or a boolean or string dtype.
        """
        self._check_addable("reduce_sum", "sum")
        with self._on_device():
            return _known(self._sum(_sum_in_order))

    @tf.autograph.experimental.do_not_convert
    def concat(self, axis: int = 0) -> Tensor:
        """Concatenates the outputs along `axis`; scalars are stacked into a vector."""
        first = self._sample
        with self._on_device():
            if isinstance(first, tf.SparseTensor):
                return tf.sparse.concat(axis, list(self._outputs))
            dense = [_dense(t) for t in self.outputs]
            if not isinstance(first, tf.RaggedTensor) and dense[0].shape.rank == 0:
                return tf.stack(dense)
            return tf.concat(dense, axis)

    @tf.autograph.experimental.do_not_convert
    def merge(self) -> Tensor:
        """Concatenates the outputs along the batch axis (axis 0), giving the whole batch."""
        return self.concat(0)

    @tf.autograph.experimental.do_not_convert
    def stack(self) -> Tensor:
        """Stacks the outputs along a new first axis of length `microbatches`.

        Raises:
            StepError: if the outputs have different shapes.
        """
        self._check_same_shape("stack")
        with self._on_device():
            return tf.stack([_dense(t) for t in self.outputs])

    @tf.autograph.experimental.do_not_convert
    def accumulate(self, method: str = "variable", var: Any | None = None) -> Tensor:
        """Computes the mean over microbatches without keeping all outputs in memory.

        Args:
            method: "variable" adds the microbatches one at a time; "add_n" and
                "accumulate_n" use the TensorFlow operations of these names.
            var: A variable with the outputs' shape and dtype; it holds the mean afterwards, in the
                rank that has the output. Others leave it as it is. With method "variable" it also
                holds the sum meanwhile, instead of memory of its own.

        Raises:
            StepError: if the method is unknown, or the variable does not fit.
        """
        self._check_accumulate(method, var)
        self._check_addable("accumulate", "mean")
        with self._on_device():
            first, *rest = self._terms or list(self._outputs)
            if var is None or isinstance(first, RemoteGradient):
                return _known(_divide(self._sum(_SUMS[method]), len(self._outputs)))
            if method == "variable":
                var.assign(_dense(first))
                for tensor in rest:
                    var.assign_add(_dense(tensor))
                var.assign(tf.convert_to_tensor(var) / len(self._outputs))
            else:
                var.assign(_dense(_divide(self._sum(_SUMS[method]), len(self._outputs))))
            return tf.convert_to_tensor(var)

    def _sum(self, how: Callable[[list[Tensor]], Tensor]) -> Tensor:
        terms = self._terms or list(self._outputs)
        first = terms[0]
        if isinstance(first, RemoteGradient):
            return first
        if isinstance(first, tf.IndexedSlices):
            return side_by_side(terms)
        if isinstance(first, tf.SparseTensor):
            return reduce(tf.sparse.add, terms)
        return how(terms)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return tf.device(self._device) if self._device else contextlib.nullcontext()

    def _check_addable(self, method: str, what: str) -> None:
        dtype = self._sample.dtype
        if dtype in (tf.bool, tf.string):
            raise StepError(
                f"StepOutput.{method}: a {what} of {dtype.name} values is not defined; use concat, "
                "merge or stack, or cast the values in the step function."
            )
        self._check_same_shape(method)

    def _check_same_shape(self, method: str) -> None:
        if isinstance(self._outputs, Stacked):
            return
        first, *rest = [t.shape for t in self._outputs]
        other = next((shape for shape in rest if not shape.is_compatible_with(first)), None)
        if other is not None and not isinstance(self._outputs[0], tf.RaggedTensor):
            raise StepError(
                f"StepOutput.{method}: the microbatches' outputs must have one shape, received "
                f"{first} and {other}. Put them side by side with merge(), or reduce each of them "
                "in the step function."
            )

    def smp_slice(self, num_mb: int, mb: int, axis: int) -> Tensor:
        """Returns output `mb`; called when this object is passed to another step.

        Args:
            num_mb: Number of microbatches; must equal the number of outputs.
            mb: Index of the microbatch.
            axis: Ignored.

        Raises:
            StepError: if the number of outputs is different.
        """
        if num_mb != len(self._outputs):
            raise StepError(
                f"A StepOutput of {counted(len(self._outputs), 'microbatch')} was given to an "
                f"smp.step function, but the step has {num_mb}. Give it the whole batch, merge()."
            )
        return self._outputs[mb]

    def _check_accumulate(self, method: str, var: Any) -> None:
        if method not in _SUMS:
            raise StepError(
                f"StepOutput.accumulate: method={method!r} is unknown; accepted: "
                f"{', '.join(map(repr, _SUMS))}."
            )
        if var is None:
            return
        first = self._sample
        if not hasattr(var, "assign"):
            raise StepError(
                "StepOutput.accumulate: var must be a variable, which then holds the mean; "
                f"received {type(var).__name__}. Give a tf.Variable or a Keras variable, or leave "
                "var out."
            )
        dtype = tf.as_dtype(var.dtype)
        if not var.shape.is_compatible_with(first.shape) or dtype != first.dtype:
            raise StepError(
                f"StepOutput.accumulate: var must have shape {first.shape} and dtype "
                f"{first.dtype.name} like the outputs, received shape {var.shape} and dtype "
                f"{dtype.name}."
            )
        if not dtype.is_floating:
            raise StepError(
                f"StepOutput.accumulate: the mean needs a floating-point var, received "
                f"{dtype.name}."
            )

    # tf.nest and tf.function flatten and rebuild a StepOutput with these methods.

    # Terms are dropped: a function applied to each tensor need not preserve the equality of the
    # sums. One placeholder of another process's gradient stands for those of all microbatches: in a
    # step with many weights and microbatches, they would be most of the graph.

    def __tf_flatten__(self) -> tuple[Any, tuple[Tensor, ...]]:
        return (self._device, len(self._outputs)), tuple(self._smp_distinct())

    @classmethod
    def __tf_unflatten__(cls, metadata: Any, leaves: Sequence[Tensor]) -> StepOutput:
        device, count = metadata
        return cls(list(leaves) * (count // len(leaves)), device)

    def _smp_distinct(self) -> list[Tensor]:
        first = self._sample
        is_one = isinstance(first, RemoteGradient) and all(t is first for t in self._outputs)
        return [first] if is_one else list(self._outputs)


class Returned(StepOutput):
    """A `StepOutput` inside the step's own `tf.function`; it keeps its terms when flattened.

    The caller gets a `StepOutput`. Where there are terms, the outputs themselves are hardly ever
    read: they leave the function as one stacked tensor, which TensorFlow prunes if nothing reads
    it. As results of their own they would be most of the graph of a step with many weights and
    microbatches.
    """

    def __tf_flatten__(self) -> tuple[Any, tuple[Tensor, ...]]:
        count = len(self._outputs)
        if isinstance(self._outputs, Stacked):
            return (self._device, count, 0), (self._outputs.tensor, *self._terms)
        distinct = self._smp_distinct()
        return (self._device, count, len(distinct)), (*distinct, *self._terms)

    @classmethod
    def __tf_unflatten__(cls, metadata: Any, leaves: Sequence[Tensor]) -> StepOutput:
        device, count, distinct = metadata
        is_inside = tf.compat.v1.get_default_graph() in _step_graphs
        made = cls if is_inside else StepOutput
        if not distinct:
            return made(Stacked(leaves[0], count), device, leaves[1:])
        outputs = list(leaves[:distinct]) * (count // distinct)
        return made(outputs, device, leaves[distinct:])


class Stacked(Sequence[Tensor]):
    """Tensors of equal shape that were stacked into one; they are taken apart when read.

    Args:
        tensor: The stacked tensor, shape (count, ...).
        count: Number of tensors.
    """

    def __init__(self, tensor: Tensor, count: int) -> None:
        self.tensor = tensor
        self._count = count
        self._parts: tuple[Any, list[Tensor]] | None = None  # the graph, and its tensors

    @classmethod
    def of(cls, values: Sequence[Any], terms: Sequence[Any]) -> Sequence[Any]:
        """The values stacked, if they are tensors of one known shape which have terms."""
        if not terms or not all(isinstance(t, tf.Tensor) for t in (*values, *terms)):
            return values
        shape = values[0].shape
        if not shape.is_fully_defined() or any(t.shape != shape for t in (*values, *terms)):
            return values
        with tf.device(values[0].device or None):
            return cls(tf.stack(values), len(values))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._unstacked()[index]

    def _unstacked(self) -> list[Tensor]:
        graph = tf.compat.v1.get_default_graph()
        if self._parts is None or self._parts[0] is not graph:
            with tf.device(self.tensor.device or None):
                self._parts = graph, tf.unstack(self.tensor, self._count)
        return self._parts[1]


_step_graphs: weakref.WeakSet[Any] = weakref.WeakSet()


def returns_terms(graph: Any) -> None:
    """Registers the graph of a step, so that unflattening in it gives `Returned`."""
    _step_graphs.add(graph)


def _known(value: Tensor) -> Tensor:
    """Result made usable in a process that does not own it; see `remote_values.known`."""
    return known([value])[0]


# TensorFlow's optimizer replaces a chain of additions by one operation, and sorts the inputs of
# such an operation by name. The order of a sum would then differ between ranks, whose graphs
# differ, and so would the last digits of their losses. `tf.ensure_shape` keeps operations apart.


def _sum_in_order(tensors: list[Tensor]) -> Tensor:
    """The running sum, in this order on all ranks."""

    def add(total: Tensor, tensor: Tensor) -> Tensor:
        result = total + tensor
        return tf.ensure_shape(result, result.shape) if _is_tensor(result) else result

    return reduce(add, tensors)


def _add_n(tensors: list[Tensor]) -> Tensor:
    return tf.add_n(_in_order_of_names(tensors))


def _accumulate_n(tensors: list[Tensor]) -> Tensor:
    return tf.math.accumulate_n(_in_order_of_names(tensors))


_SUMS = {"variable": _sum_in_order, "add_n": _add_n, "accumulate_n": _accumulate_n}


def _in_order_of_names(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors, of operations whose names are in the same order."""
    if not all(map(_is_tensor, tensors)):
        return tensors
    with tf.name_scope("terms"):
        return [
            tf.ensure_shape(tensor, tensor.shape, name=f"term_{index:07d}")
            for index, tensor in enumerate(tensors)
        ]


def _cells(value: Any) -> list[str]:
    """Shape and first values of one output, for a notebook; values only of eager tensors."""
    if isinstance(value, RemoteGradient) or not hasattr(value, "shape"):
        return [str(getattr(value, "shape", "")), "in another process"]
    if not isinstance(value, tf.Tensor) or not hasattr(value, "numpy"):
        return [str(value.shape), ""]
    text = np.array2string(np.asarray(value), threshold=8, edgeitems=2, precision=4)
    return [str(value.shape), text if text.count("\n") < 6 else text[: text.index("\n")] + " ..."]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, tf.Tensor)


def _dense(tensor: Tensor) -> Tensor:
    if isinstance(tensor, tf.IndexedSlices):
        return tf.convert_to_tensor(tensor)
    if isinstance(tensor, tf.SparseTensor):
        return tf.sparse.to_dense(tensor)
    return tensor


def _divide(total: Tensor, count: int) -> Tensor:
    if count == 1 and total.dtype.is_floating:
        return total  # a division by one would still read and write the whole gradient
    if isinstance(total, RemoteGradient):
        return total
    if isinstance(total, tf.IndexedSlices):
        return tf.IndexedSlices(total.values / count, total.indices, total.dense_shape)
    return total / count
