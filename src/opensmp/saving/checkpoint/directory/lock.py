"""Lock that lets one program at a time write checkpoints of one name to a directory.

It is an operating system lock (`flock`) on a file beside the checkpoints. It belongs to the process
and is released when the process ends, even by SIGKILL. A leftover or copied lock file has no
effect.
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

_Key = tuple[int, int]  # device and inode of the file

_mutex = threading.Lock()
_files: dict[_Key, tuple[int, str]] = {}  # descriptors and paths of locked files
_users: dict[_Key, int] = {}  # reference counts
_gone: list[_Key] = []  # keys of collected objects, to be released when it is safe
_warned: set[str] = set()


class DirectoryLock:
    """A file lock that all objects of a process share and that excludes other processes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._key: _Key | None = None
        self._release: weakref.finalize[[_Key], DirectoryLock] | None = None

    def take(self) -> None:
        """Acquires the lock, unless this process holds it; released when the object is collected.

        If the directory was renamed or removed, the file that is at the path now is locked. Where
        locks are not supported, a warning is issued and nothing is locked.
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
        """Drops this object's reference; the last one in the process releases the lock."""
        if self._release is not None:
            self._release()
        self._key = self._release = None


def _take(path: str) -> _Key | None:
    """Locks the file and returns its key; None, with a warning, if locks are unsupported."""
    for _ in range(10):  # the file may be removed in between
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
                with contextlib.suppress(OSError):  # another user's file, or a full disk
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
        # A file of another user can be locked if it is readable.
        return os.open(path, (os.O_RDONLY | flags) & ~os.O_CREAT)


def _key(path: str) -> _Key | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _let_go(key: _Key) -> None:
    _gone.append(key)
    # The garbage collector may call this at any point, even while this thread holds the mutex.
    if _mutex.acquire(blocking=False):
        try:
            _close_unused()
        finally:
            _mutex.release()


def _close_unused() -> None:
    while _gone:
        key = _gone.pop()
        if key in _users:  # otherwise the key is from the parent process
            _users[key] -= 1
            if not _users[key]:
                del _users[key]
                file, path = _files.pop(key)
                if _key(path) == key:
                    # A program that has just opened it notices that its name is gone.
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                os.close(file)


def _forget() -> None:
    """In a forked child, closes the parent's locks, which would otherwise outlive the parent."""
    global _mutex
    _mutex = threading.Lock()  # a thread of the parent may have held it
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
