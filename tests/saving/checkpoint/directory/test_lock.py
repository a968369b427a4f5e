"""A lock of a directory: for one program, as long as that lives, and no longer."""

from __future__ import annotations

import errno
import fcntl
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from processes import environ_of_tests

from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint.directory import lock as module
from opensmp.saving.checkpoint.directory.lock import DirectoryLock

# Takes the lock by file name, says so, and lives until it is killed or told to end.
HOLDER = """
import sys
from opensmp.saving.checkpoint.directory.lock import DirectoryLock
lock = DirectoryLock(sys.argv[1])
try:
    lock.take()
    print("held", flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def program():
    """`program(path)` starts one that takes the lock; gives it, and the first line it says."""
    started = []

    def start(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, path],
            env=environ_of_tests(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=240)


def taken_here(path):
    lock = DirectoryLock(path)
    lock.take()
    return lock


def test_a_second_program_is_refused_until_the_first_is_killed(tmp_path, program):
    path = str(tmp_path / ".ckpt.lock")
    holder, said = program(path)
    assert said == "held"
    with pytest.raises(CheckpointError) as caught:
        taken_here(path)
    for word in (f"process {holder.pid} ", socket.gethostname(), "'ckpt'", str(tmp_path), "End th"):
        assert word in str(caught.value)
    other, _ = program(str(tmp_path / ".best.lock"))  # another name is another lock
    assert other.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.wait(240)
    assert (tmp_path / ".ckpt.lock").exists()  # it is left over, and in nobody's way
    lock = taken_here(path)
    assert lock.is_held()


def test_a_program_that_ends_leaves_nothing(tmp_path, program):
    path = str(tmp_path / ".ckpt.lock")
    holder, said = program(path)
    assert said == "held"
    holder.communicate("", timeout=240)
    assert os.listdir(tmp_path) == []


def test_objects_of_one_process_share_it_and_the_last_one_releases_it(tmp_path, program):
    path = str(tmp_path / ".ckpt.lock")
    first, second = taken_here(path), taken_here(path)
    first.take()
    del first
    gc.collect()
    _, said = program(path)
    assert said.startswith("CheckpointError Another program writes")
    assert f"process {os.getpid()} " in said
    second.release()
    assert not os.path.exists(path)
    _, said = program(path)
    assert said == "held"


def test_reading_or_copying_the_file_releases_nothing(tmp_path, program):
    path = str(tmp_path / "a" / ".ckpt.lock")
    (tmp_path / "a").mkdir()
    lock = taken_here(path)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # opens and closes the file
    assert program(path)[1].startswith("CheckpointError")
    assert program(str(tmp_path / "b" / ".ckpt.lock"))[1] == "held"
    assert lock.is_held()


def _sleep(connection):
    connection.send((list(module._files), "ready"))
    connection.recv()


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(tmp_path, program):
    path = str(tmp_path / ".ckpt.lock")
    lock = taken_here(path)
    here, there = multiprocessing.Pipe()
    # As TensorFlow is not used by the child, the fork is safe.
    process = os.fork()
    if process == 0:
        try:
            assert not lock.is_held()
            _sleep(there)
        finally:
            os._exit(0)
    try:
        assert here.recv() == ([], "ready")
        assert lock.is_held()
        assert program(path)[1].startswith("CheckpointError")
        lock.release()
        assert program(path)[1] == "held"  # though the child lives
    finally:
        here.send("end")
        os.waitpid(process, 0)


def test_a_directory_that_was_renamed_is_another_place(tmp_path, program):
    (tmp_path / "a").mkdir()
    path = str(tmp_path / "a" / ".ckpt.lock")
    lock = taken_here(path)
    (tmp_path / "a").rename(tmp_path / "c")
    assert not lock.is_held()
    (tmp_path / "a").mkdir()
    lock.take()
    assert lock.is_held()
    assert program(path)[1].startswith("CheckpointError")


def test_a_file_that_was_removed_is_made_again(tmp_path):
    path = str(tmp_path / ".ckpt.lock")
    lock = taken_here(path)
    os.unlink(path)
    assert not lock.is_held()
    lock.take()
    assert lock.is_held()
    assert os.path.exists(path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = str(tmp_path / ".ckpt.lock")
    with pytest.warns(UserWarning, match=r"has no locks.*would not be noticed"):
        taken_here(path)
    assert not taken_here(path).is_held()  # it is said once


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_what_is_no_file_is_left_alone_with_a_warning(tmp_path, kind):
    path = tmp_path / ".ckpt.lock"
    (tmp_path / "mine").write_text("mine")
    if kind == "link":
        path.symlink_to(tmp_path / "mine")
    else:
        path.mkdir()
    with pytest.warns(UserWarning, match="remove what has this name"):
        taken_here(str(path))
    assert (tmp_path / "mine").read_text() == "mine"
    assert path.is_symlink() or path.is_dir()


def test_a_file_of_another_user_is_locked_as_it_is(tmp_path, monkeypatch, program):
    path = str(tmp_path / ".ckpt.lock")
    (tmp_path / ".ckpt.lock").write_text("process 1 on host x\n")
    original = os.open

    def opened(path, flags, *args):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, flags, *args)

    monkeypatch.setattr(os, "open", opened)
    lock = taken_here(path)
    monkeypatch.undo()
    assert lock.is_held()
    assert program(path)[1].startswith("CheckpointError")


def test_a_directory_that_may_not_be_written_to_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        taken_here(str(tmp_path / "nothing" / ".ckpt.lock"))


@pytest.mark.parametrize("content", [b"", b"\0\xff" * 1000, b"\n\x1b[31m"])
def test_any_content_of_the_file_makes_a_message(tmp_path, content):
    path = tmp_path / ".ckpt.lock"
    path.write_bytes(content)
    with open(path, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="Another program writes") as caught:
            taken_here(str(path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1200
