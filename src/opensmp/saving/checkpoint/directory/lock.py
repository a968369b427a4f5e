"""One program at a time writes checkpoints of one name into a directory.

The lock is one of the operating system (`flock`) on a file beside the checkpoints. It belongs to
the process and goes with it, also by SIGKILL. The file alone, left over or copied, means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
import warnings
import weakref

from opensmp.errors import CheckpointError

_LONGEST_HOLDER_BYTES = 300
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EIO}
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR}

_Key = tuple[int, int]  # device and number of the file

_mutex = threading.Lock()
_files: dict[_Key, tuple[int, str]] = {}  # descriptors and paths of what this process has locked
_users: dict[_Key, int] = {}  # how many objects need each
_gone: list[_Key] = []  # of objects that are gone, to be looked at when nothing else is done
_warned: set[str] = set()


class DirectoryLock:
    """A lock on a file, which all objects of a process share and other processes cannot have.

    Args:
        path: The file; it is made if need be.

    Example:
        ```python
        lock = DirectoryLock("/opt/ml/checkpoints/.ckpt.lock")
        lock.take()  # by the first of several programs; the others get an error
        ```
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._key: _Key | None = None
        self._release: weakref.finalize[[_Key], DirectoryLock] | None = None

    def take(self) -> None:
        """Takes the lock, unless this process has it. It is released when the object goes.

        If the directory was renamed or removed, the lock is that of the file at the path now.
        Where locks are not possible there is a warning, and nothing is locked.

        Raises:
            CheckpointError: Another process has it.
            OSError: The file cannot be made.
        """
        if self.is_held():
            return
        self.release()
        key = _take(self.path)
        if key is not None:
            self._key = key
            self._release = weakref.finalize(self, _let_go, key)

    def is_held(self) -> bool:
        """Whether this process holds the lock of the file that is at the path now."""
        return self._key is not None and self._key in _files and self._key == _key(self.path)

    def release(self) -> None:
        """Gives the lock back; the last object of the process that needs it releases it."""
        if self._release is not None:
            self._release()
        self._key = self._release = None


def _take(path: str) -> _Key | None:
    for _ in range(10):  # as often as somebody removes the file meanwhile
        with _mutex:
            _close_unused()
            key = _key(path)
            if key is not None and key in _files:
                _users[key] += 1
                return key
            try:
                file = _opened(path)
            except OSError as error:
                if error.errno in _NO_FILE:
                    _warn(path, f"{os.strerror(error.errno)}; remove what has this name")
                    return None
                raise
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(file)
                os.close(file)
                raise CheckpointError(_refusal(path, holder)) from None
            except OSError as error:
                os.close(file)
                if error.errno in _NO_LOCKS:
                    _warn(path, f"the file system has no locks: {error.strerror}")
                    return None
                raise
            found = os.fstat(file)
            if (found.st_dev, found.st_ino) == _key(path):
                key = (found.st_dev, found.st_ino)
                _files[key], _users[key] = (file, path), 1
                with contextlib.suppress(OSError):  # a file of another user, or a full disk
                    os.ftruncate(file, 0)
                    os.pwrite(file, _self().encode(), 0)
                return key
            os.close(file)
    raise OSError(errno.EAGAIN, "the lock file is removed again and again", path)


def _opened(path: str) -> int:
    flags = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:
        # A file that another user has made can be locked if it can be read.
        return os.open(path, (os.O_RDONLY | flags) & ~os.O_CREAT)


def _key(path: str) -> _Key | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _let_go(key: _Key) -> None:
    _gone.append(key)
    # The garbage collector may call this in the midst of all else, also where the mutex is held.
    if _mutex.acquire(blocking=False):
        try:
            _close_unused()
        finally:
            _mutex.release()


def _close_unused() -> None:
    while _gone:
        key = _gone.pop()
        if key in _users:  # else it is of the parent of this process
            _users[key] -= 1
            if not _users[key]:
                del _users[key]
                file, path = _files.pop(key)
                if _key(path) == key:
                    # Another program that has just opened it sees that it has no name any more.
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                os.close(file)


def _forget() -> None:
    """Closes the locks of its parent in a forked process, where they would outlive the parent."""
    global _mutex
    _mutex = threading.Lock()  # a thread of the parent may have had it
    for file, _ in _files.values():
        with contextlib.suppress(OSError):
            os.close(file)
    _files.clear()
    _users.clear()
    _gone.clear()


os.register_at_fork(after_in_child=_forget)


def _self() -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {os.getpid()} on host {socket.gethostname()}, since {moment}\n"


def _holder(file: int) -> str:
    text = ""
    with contextlib.suppress(OSError):
        text = os.pread(file, _LONGEST_HOLDER_BYTES, 0).decode(errors="replace")
    return "".join(c for c in text.strip() if c.isprintable()) or "an unknown process"


def _refusal(path: str, holder: str) -> str:
    directory, name = os.path.split(path)
    name = name.removeprefix(".").removesuffix(".lock")
    return (
        f"Another program writes checkpoints named {name!r} into {directory}: {holder}. Expected: "
        "one program at a time, for each would remove checkpoints of the other. End that process, "
        "or give this program another directory or checkpoint_name. Its lock, "
        f"{os.path.basename(path)}, ends with it, however it ends; there is no need to remove the "
        "file. Restoring needs no lock."
    )


def _warn(path: str, why: str) -> None:
    if path in _warned:
        return
    _warned.add(path)
    warnings.warn(
        f"{path} could not be locked: {why}. A second program that writes checkpoints into the "
        "same directory would not be noticed; make sure that there is none.",
        stacklevel=3,
    )
