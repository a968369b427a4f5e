"""The meaning of a model call outside of `smp.step`, set by `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

Mode = Literal["whole", "plain"]

_local = threading.local()


def current_mode() -> Mode | None:
    """`"whole"`: the call splits a batch into microbatches; `"plain"`: the call is Keras' own.

    None outside of `fit`, `evaluate` and `predict`.
    """
    return getattr(_local, "mode", None)


@contextlib.contextmanager
def calls_are(mode: Mode | None) -> Iterator[None]:
    """Context in which model calls on this thread have this mode."""
    outer, _local.mode = current_mode(), mode
    try:
        yield
    finally:
        _local.mode = outer
