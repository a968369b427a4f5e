"""Rejects using the values of all microbatches as if they were one tensor."""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.errors import StepError

_BINARY = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "matmul": "@",
    "truediv": "/",
    "floordiv": "//",
    "mod": "%",
    "divmod": "divmod()",
    "pow": "**",
    "and": "&",
    "or": "|",
    "xor": "^",
    "lshift": "<<",
    "rshift": ">>",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_OF_ITSELF = {
    "neg": "The operator -",
    "pos": "The operator +",
    "invert": "The operator ~",
    "abs": "abs()",
    "round": "round()",
    "trunc": "math.trunc()",
    "floor": "math.floor()",
    "ceil": "math.ceil()",
    "bool": "bool(), or a condition,",
    "int": "int()",
    "float": "float()",
    "complex": "complex()",
    "index": "Use as a whole number",
}
_ACCUMULATE = (
    "call `accumulate()` on each gradient first, as in `gradients = [g.accumulate() for g in "
    "gradients]`"
)
_ATTRIBUTES = frozenset(
    name for name in ("numpy", *dir(tf.Tensor), *dir(np.ndarray)) if not name.startswith("_")
)


class _NoTensorAttribute(StepError, AttributeError):
    """Error for a tensor attribute; an AttributeError for `hasattr` and `getattr` defaults."""


class Unreduced(abc.ABC):
    """A sequence with one value per microbatch, which is not a tensor of the whole batch.

    Subclasses implement a sequence: `len`, iteration, and an integer or a slice as index. All
    tensor operations raise an error that names the operation and the missing reduction method.
    """

    @abc.abstractmethod
    def _smp_mend(self) -> str:
        """The part of the error message that says which method to call first."""

    def _smp_refusal(self, what: str, mend: str | None = None) -> str:
        return (
            f"{what} is not possible with {self!r}, which has one value for each microbatch and "
            f"none for the whole batch: {mend or self._smp_mend()}."
        )

    def _smp_refuse(self, what: str) -> NoReturn:
        raise StepError(self._smp_refusal(what))

    # Objects must remain usable in lists and sets, although == raises an error.
    __hash__ = object.__hash__

    def __format__(self, spec: str) -> str:
        if spec:
            self._smp_refuse(f"The format {spec!r}")
        return str(self)

    def __getattr__(self, name: str) -> Any:
        """Called for attributes that do not exist."""
        if name in _ATTRIBUTES:
            raise _NoTensorAttribute(self._smp_refusal(f"`.{name}`"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def __array_struct__(self) -> NoReturn:
        """Read by NumPy. `tf.function` would treat an object with `__array__` as an array."""
        self._smp_refuse("Use as an array, in NumPy,")

    def __array_ufunc__(self, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        self._smp_refuse(f"numpy.{function.__name__}")

    def __array_function__(self, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        self._smp_refuse(f"numpy.{function.__name__}")

    def _smp_position(self, index: Any) -> Any:
        """Checks that an index selects microbatches, not rows or columns of a tensor."""
        if isinstance(index, slice):
            return index
        try:
            return operator.index(index)
        except TypeError:
            self._smp_refuse(f"The index {index!r}")


def _refusing(method: str, what: str) -> Callable[..., NoReturn]:
    def refuse(self: Unreduced, *args: Any) -> NoReturn:
        self._smp_refuse(what)

    refuse.__name__, refuse.__qualname__ = method, f"Unreduced.{method}"
    return refuse


def _comparing(method: str, what: str) -> Callable[..., Any]:
    def compare(self: Unreduced, other: Any) -> Any:
        if isinstance(other, (Number, np.generic, np.ndarray, Unreduced)) or tf.is_tensor(other):
            self._smp_refuse(what)
        return NotImplemented  # for a list search that compares with None, for example

    compare.__name__, compare.__qualname__ = method, f"Unreduced.{method}"
    return compare


def _add_operators() -> None:
    for name, sign in _BINARY.items():
        what = sign if sign.endswith("()") else f"The operator {sign}"
        for method in (f"__{name}__", f"__r{name}__"):
            setattr(Unreduced, method, _refusing(method, what))
    for name, sign in _COMPARISONS.items():
        method = f"__{name}__"
        setattr(Unreduced, method, _comparing(method, f"The operator {sign}"))
    for name, what in _OF_ITSELF.items():
        method = f"__{name}__"
        setattr(Unreduced, method, _refusing(method, what))


_add_operators()


def _refuse_call(value: Unreduced, function: str) -> NoReturn:
    value._smp_refuse(function)


@tf.autograph.experimental.do_not_convert
def _refuse_conversion(value: Unreduced, *args: Any, **kwargs: Any) -> NoReturn:
    value._smp_refuse("Use as a tensor")


def _refuse_gradients(gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    for number, gradient in enumerate(gradients):
        if isinstance(gradient, Unreduced):
            named = getattr(variables[number], "path", None) if variables else None
            what = f"An update of {named!r} by an optimizer" if named else "optimizer.apply"
            raise StepError(gradient._smp_refusal(what, _ACCUMULATE))


def refuse_unreduced(logs: Any, method: str) -> None:
    """Raises StepError if a Keras step returned unreduced values, which Keras would pass on."""
    named = logs.items() if isinstance(logs, Mapping) else [(None, logs)]
    for name, value in named:
        if isinstance(value, Unreduced):
            what = f"A result {name!r}" if name else "A result"
            value._smp_refuse(f"{what} of `{method}`")


tf.register_tensor_conversion_function(Unreduced, _refuse_conversion)
_private.refuse_in_api_calls(Unreduced, _refuse_call)
_private.check_gradients_with(_refuse_gradients)
