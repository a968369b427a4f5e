from __future__ import annotations

import os
import platform
import threading

import pytest

from opensmp.runtime import promptness


@pytest.mark.skipif(platform.machine() not in promptness._SYSCALLS, reason="other processor")
def test_the_calling_thread_keeps_its_nice_value():
    results = []

    def run():
        before = os.getpriority(os.PRIO_PROCESS, 0)
        results.append((promptness.wake_promptly(), before, os.getpriority(os.PRIO_PROCESS, 0)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((accepted, before, after),) = results
    assert accepted
    assert before == after


def test_other_processors_do_without(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not promptness.wake_promptly()
