"""The meaning of a model call outside of `smp.step`, set by `fit`, `evaluate` and `predict`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

from opensmp.base.thread_values import ThreadValue

Mode = Literal["whole", "plain"]

_mode: ThreadValue[Mode | None] = ThreadValue(None)


def current_mode() -> Mode | None:
    """`"whole"`: the call splits a batch into microbatches; `"plain"`: the call is Keras' own.

    None outside of `fit`, `evaluate` and `predict`.
    """
    return _mode.get()


def calls_are(mode: Mode | None) -> AbstractContextManager[None]:
    """Context in which model calls on this thread have this mode."""
    return _mode.set_to(mode)
