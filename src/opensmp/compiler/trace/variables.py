"""Variables as explicit inputs and outputs of a traced graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor, Variable
from opensmp.errors import TraceError


@dataclass(frozen=True)
class VariableInput:
    """A variable, and the placeholder of its value in its stored dtype."""

    variable: Variable
    placeholder: Tensor

    @property
    def name(self) -> str:
        """Path or name of the variable."""
        return variable_name(self.variable)


def is_keras(variable: Variable) -> bool:
    """Returns whether this is a Keras variable rather than a plain `tf.Variable`."""
    return isinstance(variable, keras.Variable)


def variable_name(variable: Variable) -> str:
    """Returns the path of a Keras variable or the name of a `tf.Variable`."""
    return str(variable.path if is_keras(variable) else variable.name)


def tf_variable(variable: Variable) -> Any:
    """Returns the underlying `tf.Variable`."""
    return _private.storage(variable) if is_keras(variable) else variable


def tf_dtype(variable: Variable) -> Any:
    """Returns the dtype that a variable is stored in."""
    return _private.variable_dtype(variable) if is_keras(variable) else variable.dtype


def is_trainable(variable: Variable) -> bool:
    """Returns whether a variable is trainable and of a floating or complex dtype."""
    dtype = tf_dtype(variable)
    return bool(variable.trainable) and (dtype.is_floating or dtype.is_complex)


def read_after_assignment(value: Tensor, variable: Tensor) -> Tensor:
    """Returns the result of a read after `value` was assigned to a variable.

    As in plain TensorFlow, the gradient of such a read belongs to the variable and does not flow
    into the assigned value.
    """
    with _private.stop_recording():
        read = tf.identity(value)
    (read,) = _private.with_gradient([read], [value, variable], lambda upstream: (None, upstream))
    return read


class VariableScope(keras.StatelessScope):
    """Collects a model's reads of and assignments to its variables during a trace.

    On its first read, a Keras or TensorFlow variable gets one placeholder in the root graph; later
    reads in the same trace return the newest assigned value. Nothing is allocated and no variable
    changes.
    """

    def __init__(self, graph: Any) -> None:
        super().__init__(collect_losses=True, initialize_variables=False)
        self._graph = graph
        self._inputs: dict[int, VariableInput] = {}
        self._raw_values: dict[int, Tensor] = {}
        self._written: dict[int, Variable] = {}
        self._assigned: dict[int, Tensor] = {}
        self._read: dict[int, Tensor] = {}
        self._is_tracing = False

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Enters the scope for Keras variables and for `tf.Variable`s."""
        with self._giving_values(), _private.reads_in_custom_gradients(self._reading):
            self._is_tracing = True
            try:
                yield
            finally:
                self._is_tracing = False

    @contextlib.contextmanager
    def _giving_values(self) -> Iterator[None]:
        with self, _private.variable_access(self._read_raw, self._write_raw):
            yield

    @contextlib.contextmanager
    def _reading(self) -> Iterator[dict[int, Tensor]]:
        """Yields the values of the trainable variables that are read in this context, by id.

        Gradients may be taken, and functions run again for them, after the trace.
        """
        around, self._read = self._read, {}
        try:
            if self._is_tracing:
                yield self._read
            else:
                with self._giving_values():
                    yield self._read
        finally:
            self._read = around | self._read

    @property
    def inputs(self) -> tuple[VariableInput, ...]:
        """The variables read, in the order of their first read."""
        return tuple(self._inputs.values())

    @property
    def updates(self) -> tuple[tuple[Variable, Tensor], ...]:
        """Pairs (variable, new value) of the assigned variables."""
        pairs = []
        for key, variable in self._written.items():
            with self._graph.as_default():
                pairs.append((variable, tf.convert_to_tensor(self._assigned[key])))
        return tuple(pairs)

    # Keras calls the next two methods for its own variables.

    def get_current_value(self, variable: Variable) -> Tensor:
        """Returns the newest value assigned in this trace, or else the variable's placeholder."""
        if tf.executing_eagerly():  # in a layer's `build`, which runs outside of the graph
            if not _private.is_initialized(variable):
                _private.initialize_on(variable, "CPU:0")
            return tf.convert_to_tensor(_private.storage(variable))
        value = super().get_current_value(variable)
        if value is None:
            value = self._placeholder(variable, variable.shape, tf_dtype(variable))
            self.state_mapping[id(variable)] = value
        if is_trainable(variable):
            self._read[id(value)] = value
        return value

    def add_update(self, update: tuple[Variable, Tensor]) -> None:
        """Records an assignment as the variable's new value."""
        variable, value = update
        super().add_update((variable, self._assign(variable, value)))

    # The equivalent methods for `tf.Variable`s.

    def _read_raw(self, variable: Variable) -> Tensor | None:
        outside = tf.executing_eagerly() or _private.in_symbolic_scope()
        if outside or not _lives_outside(variable):
            return None
        if id(variable) not in self._raw_values:
            self._raw_values[id(variable)] = self._placeholder(
                variable, variable.shape, variable.dtype
            )
        value = self._raw_values[id(variable)]
        if is_trainable(variable):
            self._read[id(value)] = value
        return value

    def _write_raw(self, variable: Variable, value: Tensor) -> bool:
        self._raw_values[id(variable)] = self._assign(variable, value)
        return True

    def _assign(self, variable: Variable, value: Tensor) -> Tensor:
        """Records an assignment and returns the result of later reads."""
        self._check_graph(variable, value)
        self._written[id(variable)] = variable
        self._assigned[id(variable)] = value
        if not is_trainable(variable):
            return tf.stop_gradient(value)  # for tapes, a read of the variable
        if id(variable) not in self._inputs:
            self._placeholder(variable, variable.shape, tf_dtype(variable))
        return read_after_assignment(value, self._inputs[id(variable)].placeholder)

    def _placeholder(self, variable: Variable, shape: Any, dtype: Any) -> Tensor:
        name = "".join(c if c.isalnum() else "_" for c in variable_name(variable))
        with self._graph.as_default(), tf.control_dependencies(None), tf.device(None):
            value = tf.compat.v1.placeholder(dtype, shape, name=f"variable_{name}")
        self._inputs[id(variable)] = VariableInput(variable, value)
        return value

    def _check_graph(self, variable: Variable, value: Tensor) -> None:
        graph = getattr(value, "graph", self._graph)
        if graph is not self._graph:
            raise TraceError(
                f"Variable '{variable_name(variable)}' is assigned inside a loop body, a branch "
                "or a nested tf.function of the model. Its new value cannot leave that body. "
                "Return the new value from the loop or branch and assign it afterwards, or use a "
                "Python loop."
            )


def _lives_outside(variable: Variable) -> bool:
    """Returns whether the variable was created outside of any function graph."""
    return not hasattr(variable.handle, "graph")
