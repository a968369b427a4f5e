"""Variables that a step has read before the call of a model that decided where they lie.

A trace holds on to the memory that a variable had when it was first read. If a model that is
called later in the same trace moves it, what the trace reads and assigns is the old memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from opensmp import _private
from opensmp.compiler.trace.variables import is_keras, tf_variable, variable_name

_local = threading.local()


class ReadEarly(Exception):
    """The step has to be traced once more: all variables that it reads have their place now."""


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Context in which a step's function is traced, in a graph that can be thrown away.

    Raises:
        ReadEarly: A variable was read before it got its place.
    """
    outer, _local.names = getattr(_local, "names", None), []
    try:
        yield
        if _local.names:
            raise ReadEarly(", ".join(_local.names))
    finally:
        _local.names = outer


def note_placing(variables: Iterable[Any]) -> None:
    """Is told of the variables that get their place now, for the first time.

    All processes come to the same result, whichever of the variables they keep.
    """
    names = getattr(_local, "names", None)
    if names is None:
        return
    held = _private.captured_from_outside()
    for variable in variables:
        has_memory = is_keras(variable) and _private.is_initialized(variable)
        if has_memory and id(tf_variable(variable).handle) in held:
            names.append(variable_name(variable))
