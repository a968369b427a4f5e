"""What a `tf.function` offers besides calls, for `smp.step` functions."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from opensmp.api.step.split import freeze_sets


class FunctionAttributes(abc.ABC):
    """The attributes and methods of a `tf.function`, which look through to those of a step.

    Those that describe a trace are of the `tf.function` for the calling context: eager code, or
    another `tf.function`. The others are the same for both.
    """

    _tf_function_arguments: Mapping[str, Any]

    @abc.abstractmethod
    def _function(self) -> Any:
        """The `tf.function` for the current world and calling context."""

    @abc.abstractmethod
    def _functions(self) -> list[Any]:
        """The `tf.function`s that exist."""

    @property
    def name(self) -> str:
        """Name of the decorated function."""
        return str(getattr(self, "__name__", "step"))

    @property
    def input_signature(self) -> Any | None:
        """The argument of this name, for the whole batch; None if there was none."""
        given = self._tf_function_arguments.get("input_signature")
        return tuple(given) if isinstance(given, list) else given

    @property
    def function_type(self) -> Any:
        """Parameters of the function, as `tf.types.experimental.FunctionType`."""
        return self._function().function_type

    @property
    def function_spec(self) -> Any:
        """Parameters, defaults and `input_signature`, as those of a `tf.function`."""
        return self._function().function_spec

    def get_concrete_function(self, *args: Any, **kwargs: Any) -> Any:
        """Like that of `tf.function`, for arguments of the whole batch."""
        return self._function().get_concrete_function(*freeze_sets(args), **freeze_sets(kwargs))

    def get_initialization_function(self, *args: Any, **kwargs: Any) -> Any:
        """Like that of `tf.function`, for arguments of the whole batch."""
        function = self._function()
        return function.get_initialization_function(*freeze_sets(args), **freeze_sets(kwargs))

    def experimental_get_compiler_ir(self, *args: Any, **kwargs: Any) -> Any:
        """Like that of `tf.function`; needs `jit_compile=True`, and with it one partition."""
        function = self._function()
        return function.experimental_get_compiler_ir(*freeze_sets(args), **freeze_sets(kwargs))

    def experimental_get_tracing_count(self) -> int:
        """Number of traces since `smp.init`."""
        return sum(int(each.experimental_get_tracing_count()) for each in self._functions())

    def pretty_printed_concrete_signatures(self, verbose: bool = True) -> str:
        """Signatures of all traces since `smp.init`, those for eager calls first.

        Args:
            verbose: Whether to list types and shapes of inputs and outputs, and captures.
        """
        texts = (each.pretty_printed_concrete_signatures(verbose) for each in self._functions())
        return "\n\n".join(text for text in texts if text)
