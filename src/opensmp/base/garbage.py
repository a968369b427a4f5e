"""Garbage collection around a trace."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collected_once() -> Iterator[None]:
    """Context without garbage collection, at the end of which there is one.

    A trace makes many objects, nearly all of which live to its end, so that collections on the way
    take time and find little. At its end, graphs are left that refer to themselves: the first step
    can use their memory. Does nothing where the program has switched collection off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
