"""Detects variables that a step reads before a later model call places them.

A trace captures the memory that a variable had at its first read. If a model called later in the
same trace moves the variable, the trace reads and assigns the old memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from opensmp import _private
from opensmp.base.thread_values import ThreadValue
from opensmp.compiler.trace.variables import is_keras, tf_variable, variable_name

_names: ThreadValue[list[str] | None] = ThreadValue(None)


class ReadEarly(Exception):
    """The step must be traced again; all variables that it reads are placed now."""


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Context for tracing a step's function, in a graph that can be discarded."""
    names: list[str] = []
    with _names.set_to(names):
        yield
        if names:
            raise ReadEarly(", ".join(names))


def note_placing(variables: Iterable[Any]) -> None:
    """Records the variables, placed now for the first time, that the trace has already read.

    All processes get the same result, whichever of the variables they own.
    """
    names = _names.get()
    if names is None:
        return
    held = _private.captured_from_outside()
    for variable in variables:
        has_memory = is_keras(variable) and _private.is_initialized(variable)
        if has_memory and id(tf_variable(variable).handle) in held:
            names.append(variable_name(variable))
