from __future__ import annotations

import ctypes
import os
import platform
import threading

import pytest

from opensmp.distributed.transport import thread_priority

PR_GET_TIMERSLACK = 30


@pytest.mark.skipif(platform.machine() not in thread_priority._SYSCALLS, reason="other processor")
def test_the_calling_thread_keeps_its_nice_value():
    results = []

    def run():
        before = os.getpriority(os.PRIO_PROCESS, 0)
        results.append(
            (thread_priority.wake_promptly(), before, os.getpriority(os.PRIO_PROCESS, 0))
        )

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((accepted, before, after),) = results
    assert accepted
    assert before == after


@pytest.mark.skipif(platform.system() != "Linux", reason="other system")
def test_short_sleeps_of_the_calling_thread_end_when_they_are_over():
    def slack():
        return ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0)

    before, inside = slack(), []

    def run():
        thread_priority.sleep_precisely()
        inside.append(slack())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [1000]  # nanoseconds
    assert before > 1000
    assert slack() == before  # other threads keep theirs


def test_other_processors_do_without(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not thread_priority.wake_promptly()
