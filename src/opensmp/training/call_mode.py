"""What a call of a model outside of `smp.step` means: set by `fit` and its like."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

Mode = Literal["whole", "plain"]

_local = threading.local()


def current_mode() -> Mode | None:
    """`"whole"`: a batch, split into microbatches and put together again; `"plain"`: Keras' own.

    None outside of `fit`, `evaluate` and `predict`.
    """
    return getattr(_local, "mode", None)


@contextlib.contextmanager
def calls_are(mode: Mode | None) -> Iterator[None]:
    """Context in which models are called that way on this thread."""
    outer, _local.mode = current_mode(), mode
    try:
        yield
    finally:
        _local.mode = outer
