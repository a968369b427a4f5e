from __future__ import annotations

import errno
import os
import resource
import socket
import tempfile
import time

import pytest

from opensmp.cli.doctor import machine


def worst(findings) -> list[str]:
    return [each.level for each in findings if each.level != "ok"]


def test_a_container_with_less_time_than_cores_is_told_with_the_cores_to_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    [found] = machine.threads({}, tmp_path)
    assert (found.level, found.mend) == ("warning", "taskset -c 0-1 opensmp run ...")
    assert "16 cores" in found.text
    assert "2.5" in found.text


@pytest.mark.parametrize("text", ["max 100000\n", "1600000 100000\n", "odd\n", ""])
def test_no_limit_and_unreadable_limits_are_well(tmp_path, monkeypatch, text):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    (tmp_path / "cpu.max").write_text(text)
    assert [each.text for each in machine.threads({}, tmp_path)] == ["2 cores"]


def test_limits_of_old_control_groups_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert worst(machine.threads({}, tmp_path)) == ["warning"]
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert worst(machine.threads({}, tmp_path)) == []


def test_numbers_of_threads_in_the_environment_are_told(tmp_path):
    found = list(machine.threads({"OMP_NUM_THREADS": "8", "TF_NUM_INTEROP_THREADS": ""}, tmp_path))
    assert found[-1].mend == "unset OMP_NUM_THREADS"


def test_memory_is_that_of_the_container(tmp_path):
    table = tmp_path / "meminfo"
    table.write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nHugePages_Total: 0\n")
    [found] = machine.memory(tmp_path, table)
    assert found.text == "16 GiB, 8 GiB free"
    (tmp_path / "memory.max").write_text(str(4 << 30))
    [found] = machine.memory(tmp_path, table)
    assert found.text == "4 GiB, 4 GiB free (the container's limit; the machine has 16 GiB)"
    assert list(machine.memory(tmp_path / "no", tmp_path / "none")) == []


def test_shared_memory_that_cannot_be_made_and_few_files_are_told(monkeypatch):
    def refuse(name):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    first, second = machine.shared_memory()
    assert "Operation not permitted" in first.text
    assert '"transport": "collective"' in first.mend
    assert second.mend == "ulimit -n 1024"


def test_a_loopback_that_is_down_is_an_error_and_a_name_without_address_a_warning(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    monkeypatch.setattr(socket, "gethostbyname", refuse)
    assert worst(machine.ports()) == ["error", "warning"]


def test_a_clock_at_its_start_is_told(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    [found] = machine.clock()
    assert "1970-01-01" in found.text
    assert found.mend == "timedatectl set-ntp true"


def test_a_folder_that_cannot_be_written_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    [found] = machine.files()
    assert found.level == "error"
    assert "TMPDIR" in found.mend
