"""Patches Keras 3 classes with Keras 2 API, for scripts written for the original smp API.

Only `import smdistributed.modelparallel.tensorflow` installs the patches; `import opensmp` alone
changes nothing. Each function below adds one Keras 2 feature and documents its behavior in Keras 2.
The patches add names that Keras 3 does not have, or accept arguments that it refuses or ignores, so
that code written for Keras 3 still works; only `optimizer.set_weights` becomes stricter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_installed = False


def install() -> None:
    """Installs all patches of this module. Calling it again does nothing.

    Example:
        ```python
        install()
        optimizer = keras.optimizers.Adam(lr=0.001)
        accuracy = keras.metrics.SparseCategoricalAccuracy()
        accuracy.reset_states()
        ```
    """
    global _installed
    if _installed:
        return
    _installed = True
    _add_get_gradients()
    _add_compute_gradients()
    _add_lr()
    _accept_lr_and_decay()
    _make_variables_callable()
    _add_optimizer_weights()
    _add_metric_reset_states()
    _add_model_reset_states()


# ------------------------------------------------------------------------------- optimizers


def _add_get_gradients() -> None:
    """Adds `optimizer.get_gradients(loss, params)`.

    Keras 2 returned the symbolic gradients of a loss, in graph mode only: eagerly it raised the
    error of `tf.gradients`. A missing gradient was an error there; here it is None, as in
    `tf.gradients` and `tf.GradientTape`, since `apply_gradients` of Keras 3 skips None with a
    warning. With a loss scale they are the gradients of the scaled loss, which `apply_gradients` of
    Keras 3 divides by it.
    """

    def get_gradients(self: Any, loss: Any, params: Any) -> list[Any]:
        """Gradients of `loss` with respect to `params`; None where they are not connected."""
        if tf.executing_eagerly():
            raise RuntimeError(
                "optimizer.get_gradients is not supported when eager execution is enabled. "
                "Expected: a call inside a function decorated with @smp.step or @tf.function. "
                "Received: an eager call. Decorate the function, or use tf.GradientTape."
            )
        params = tf.nest.flatten(params)
        values = [_value(param) for param in params]
        return list(tf.gradients(loss, values, grad_ys=_scale(self, loss)))

    keras.optimizers.Optimizer.get_gradients = get_gradients


def _scale(optimizer: Any, loss: Any) -> Any | None:
    """What `apply_gradients` will divide gradients of a loss by, in its shape; None for one."""
    ones = tf.nest.map_structure(tf.ones_like, loss)
    scaled = tf.nest.map_structure(optimizer.scale_loss, ones)
    return None if tf.nest.flatten(scaled)[0] is tf.nest.flatten(ones)[0] else scaled


def _add_compute_gradients() -> None:
    """Adds `optimizer.compute_gradients(loss, var_list, tape=None)`.

    In Keras 2, and under this name in TensorFlow 1, it gave the pairs that `apply_gradients` takes.
    `loss` was a function without arguments, or a tensor with the tape that watched its computation.
    A tensor without a tape was an error; here it is allowed in graph mode, as in TensorFlow 1.
    """

    def compute_gradients(
        self: Any, loss: Any, var_list: Any, tape: Any | None = None
    ) -> list[tuple[Any, Any]]:
        """Pairs of gradient and variable; the gradient is None where they are not connected."""
        if not callable(loss) and tape is None:
            if tf.executing_eagerly():
                raise ValueError(
                    "optimizer.compute_gradients: a loss that is a tensor needs tape=, the "
                    f"tf.GradientTape under which it was computed. Received: loss={loss!r} without "
                    "a tape. Give the tape, or a function without arguments that returns the loss."
                )
            variables = tf.nest.flatten(var_list() if callable(var_list) else var_list)
            return list(zip(self.get_gradients(loss, variables), variables, strict=True))
        recorded: Any = tf.GradientTape() if tape is None else tape
        if callable(loss):
            with recorded:
                if not callable(var_list):  # trainable variables of Keras are watched anyway
                    leaves = tf.nest.flatten(var_list)
                    recorded.watch([v for v in leaves if isinstance(v, tf.Tensor | tf.Variable)])
                loss = loss()
        variables = tf.nest.flatten(var_list() if callable(var_list) else var_list)
        gradients = recorded.gradient(loss, variables, output_gradients=_scale(self, loss))
        return list(zip(gradients, variables, strict=True))

    keras.optimizers.Optimizer.compute_gradients = compute_gradients


def _value(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _add_lr() -> None:
    """Adds `optimizer.lr`, in Keras 2 a readable and writable alias of `learning_rate`."""

    def get_lr(self: Any) -> Any:
        """Alias of `learning_rate`."""
        return self.learning_rate

    def set_lr(self: Any, value: Any) -> None:
        self.learning_rate = value

    keras.optimizers.Optimizer.lr = property(get_lr, set_lr)


def _accept_lr_and_decay() -> None:
    """Accepts `Adam(lr=0.01, decay=1e-4)`.

    In Keras 2 `lr` took precedence over `learning_rate`, integers were accepted, and with `decay`
    the rate of a step was `learning_rate / (1 + decay * iterations)`. Keras 3 refuses `lr` and
    ignores `decay` with a warning. The decay becomes an `InverseTimeDecay`, which Keras can
    serialize; therefore, as with every Keras 3 schedule, the learning rate cannot be assigned
    afterwards.
    """
    original = keras.optimizers.Optimizer.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if "lr" not in kwargs and "decay" not in kwargs:
            original(self, *args, **kwargs)
            return
        if args:
            kwargs["learning_rate"], args = args[0], args[1:]
        lr = kwargs.pop("lr", None)
        decay = kwargs.pop("decay", None)
        if lr is not None:
            kwargs["learning_rate"] = float(lr) if isinstance(lr, Real) else lr
        if decay:
            kwargs["learning_rate"] = _decayed(kwargs.get("learning_rate"), decay)
        original(self, *args, **kwargs)

    keras.optimizers.Optimizer.__init__ = init


def _decayed(learning_rate: Any, decay: Any) -> Any:
    if not isinstance(decay, Real) or decay < 0:
        raise ValueError(
            f"decay must be a number >= 0. Received: decay={decay!r} ({type(decay).__name__})."
        )
    if not isinstance(learning_rate, Real):
        raise ValueError(
            "decay needs a learning rate that is a number, for Keras 3 takes one schedule only. "
            f"Received: learning_rate={learning_rate!r}, decay={decay!r}. Put the decay into the "
            "schedule, or leave one of the two out."
        )
    return keras.optimizers.schedules.InverseTimeDecay(
        float(learning_rate), decay_steps=1, decay_rate=float(decay)
    )


class CallableList(list[Any]):
    """A list that returns its items as a plain list when it is called."""

    def __call__(self) -> list[Any]:
        """The same values as a plain list."""
        return list(self)


def _make_variables_callable() -> None:
    """Makes `optimizer.variables()` work.

    `variables` was a method in Keras 2 and is a property in Keras 3, which Keras itself reads for
    saving and counting. It stays a property, but returns a list that can also be called.
    """
    for cls in _classes_of(keras.optimizers.Optimizer):
        stock = vars(cls).get("variables")
        if isinstance(stock, property) and stock.fget is not None:
            cls.variables = property(_callable(stock.fget), stock.fset, stock.fdel, stock.__doc__)


def _callable(getter: Callable[[Any], Sequence[Any]]) -> Callable[[Any], CallableList]:
    @functools.wraps(getter)
    def variables(self: Any) -> CallableList:
        return CallableList(getter(self))

    return variables


def _classes_of(cls: Any) -> Iterator[Any]:
    """Yields the bases of a class, the class itself and all its subclasses."""
    yield from cls.__mro__[1:]
    pending = [cls]
    seen = set()
    while pending:
        found = pending.pop()
        if found not in seen:
            seen.add(found)
            pending += found.__subclasses__()
            yield found


def _add_optimizer_weights() -> None:
    """Adds `optimizer.get_weights()` and replaces `optimizer.set_weights(weights)`.

    Keras 2 returned the values of all variables as arrays and assigned them in the same order,
    refusing a list of another length. Keras 3 has no `get_weights`, and its `set_weights` ignores
    excess values and skips inner optimizers. The order of values is that of Keras 3: the iteration
    is followed by the learning rate, which Keras 2 did not include.
    """

    def get_weights(self: Any) -> list[Any]:
        """Values of all variables of the optimizer, as arrays."""
        return [variable.numpy() for variable in self.variables]

    def set_weights(self: Any, weights: Sequence[Any]) -> None:
        """Assigns values in the order of `get_weights`."""
        if not self.built:
            raise ValueError(
                f"{self.name}.set_weights was called before the optimizer has its variables. Call "
                "optimizer.build(model.trainable_variables) first."
            )
        variables = list(self.variables)
        faults = [
            f"array {index} ({variable.name}) has the shape {tuple(variable.shape)}, received "
            f"{np.shape(weight)}"
            for index, (variable, weight) in enumerate(zip(variables, weights, strict=False))
            if tuple(variable.shape) != np.shape(weight)
        ]
        if len(weights) != len(variables):
            faults.insert(0, f"expected {len(variables)} arrays, received {len(weights)}")
        if faults:
            raise ValueError(
                f"{self.name}.set_weights: {'; '.join(faults)}. Give the list that "
                "optimizer.get_weights() of the same optimizer returns."
            )
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)

    for cls in _classes_of(keras.optimizers.Optimizer):
        if cls is keras.optimizers.Optimizer or "set_weights" in vars(cls):
            cls.set_weights = set_weights
    keras.optimizers.Optimizer.get_weights = get_weights


# ------------------------------------------------------------------------ metrics and models


def _add_metric_reset_states() -> None:
    """Adds `metric.reset_states()`: the name before Keras 2.5, later an alias of `reset_state`."""

    def reset_states(self: Any) -> None:
        """Alias of `reset_state`."""
        self.reset_state()

    keras.metrics.Metric.reset_states = reset_states


def _add_model_reset_states() -> None:
    """Adds `model.reset_states()`.

    Keras 2 reset the states of all stateful recurrent layers, including those of nested models. In
    Keras 3 each such layer has its own `reset_states`, but the model has none.
    """

    def reset_states(self: Any) -> None:
        """Resets the states of all stateful layers."""
        for layer in self.layers:
            if isinstance(layer, keras.Model) or getattr(layer, "stateful", False):
                layer.reset_states()

    keras.Model.reset_states = reset_states
