"""Writes HDF5 files so that a failed write raises an error instead of crashing the process.

When the HDF5 library cannot write, for example to a full disk, it cannot close the file either, and
the next file that the process closes may cause a segmentation fault: training would end hours after
an error that was caught. Here the library writes through a Python file object that hides errors
from it; the first error is raised when the file is closed.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from typing import Any

import h5py

# HDF5 modes to Python modes.
_MODES = {"w": "w+", "w-": "x+", "x": "x+", "r+": "r+"}

_lock = threading.Lock()
_active: dict[int, list[_Patient]] = {}
_original: list[Any] = []


class _Patient(io.RawIOBase):
    """A read-write file that stores its first error instead of raising it."""

    def __init__(self, path: str, mode: str) -> None:
        self.error: OSError | None = None
        self._file = io.FileIO(path, mode)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return 0 if self._file.closed else self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return 0 if self._file.closed else self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while not self._file.closed and done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                break
            done += count
        view[done:] = bytes(len(view) - done)  # zeros for data that could not be written
        return len(view)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self.error is None and done < len(view):
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            if self.error is None:
                return self._file.truncate(size)
        except OSError as error:
            self.error = error
        return size if size is not None else self.tell()

    def flush(self) -> None:
        """Does nothing: the file is unbuffered."""

    def finish(self) -> None:
        """Closes the file; raises `OSError` if a write failed."""
        found, self.error = self.error, OSError("the file is closed")
        self._file.close()
        if found is not None:
            raise found


@contextlib.contextmanager
def failing_late() -> Iterator[None]:
    """Context in which write errors of HDF5 files of this thread are raised only on exit."""
    thread = threading.get_ident()
    with _lock:
        if not _active:
            _original[:] = [h5py.File]
            h5py.File = _file_class(_original[0])
        outer = _active.get(thread)
        mine: list[_Patient] = []
        _active[thread] = mine
    try:
        yield
    finally:
        with _lock:
            if outer is None:
                del _active[thread]
            else:
                _active[thread] = outer
            if not _active:
                h5py.File = _original[0]
        with contextlib.ExitStack() as stack:
            for file in mine:
                stack.callback(file.finish)


def _file_class(original: Any) -> Any:
    class File(original):
        """`h5py.File` that writes new files on disk through `_Patient`."""

        def __init__(self, name: Any, mode: str = "r", *args: Any, **kwargs: Any) -> None:
            mine = _active.get(threading.get_ident())
            if mine is not None and mode != "r" and isinstance(name, (str, os.PathLike)):
                path = os.fspath(name)
                if mode == "a":
                    mode = "r+" if os.path.exists(path) else "w"
                mine.append(_Patient(path, _MODES[mode]))
                name = mine[-1]
                mode = "r+" if mode == "r+" else "w"
            super().__init__(name, mode, *args, **kwargs)

    return File
