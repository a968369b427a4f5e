"""Values of the current thread, such as the step that it traces."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ThreadValue(Generic[T]):
    """A value that each thread has for itself, and that is replaced within a context."""

    def __init__(self, default: T) -> None:
        self._default = default
        self._local = threading.local()

    def get(self) -> T:
        """The value on the current thread."""
        return getattr(self._local, "value", self._default)

    @contextlib.contextmanager
    def set_to(self, value: T) -> Iterator[None]:
        """Context with another value on the current thread."""
        outer, self._local.value = self.get(), value
        try:
            yield
        finally:
            self._local.value = outer
