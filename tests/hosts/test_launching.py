"""`opensmp run` over several machines, which are network namespaces of this one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hosts.test_machines import PROGRAM, STEPS, results, trains_as_plain_keras
from machines import Machines, ip, machines_or_skip
from patience import patient
from processes import environ_of_tests

RUN = [sys.executable, "-m", "opensmp", "run"]
CONFIG = json.dumps({"partitions": 2, "microbatches": 2})


def stand_in(machines: Machines) -> Path:
    """A command that does what ssh does, for the machines' names, without a server."""
    cases = "".join(
        f'{name}) shift; exec {shlex.join(machines.prefix(number))} "$*";;\n'
        for number, name in enumerate(machines.names)
    )
    path = machines.folder / "ssh"
    options = 'while [ "${1#-}" != "$1" ]; do shift; done'
    path.write_text(
        f'#!/bin/sh\n{options}\ncase "$1" in\n{cases}*) echo "no host $1" >&2; exit 255;;\nesac\n'
    )
    path.chmod(0o755)
    return path


def over_hosts(machines: Machines, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """Starts `opensmp run --hosts` on no machine of the run."""
    hosts = ",".join(f"{name}:{count}" for name, count in zip(machines.names, (1, 3), strict=True))
    command = [*RUN, "-a", "--hosts", hosts, "--ssh", stand_in(machines), *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        env=environ_of_tests(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=machines.folder,
        **options,
    )


def test_the_same_command_on_each_machine_trains_two_replicas_of_two_ranks():
    with machines_or_skip(2) as machines:
        processes = []
        for node in (0, 1):
            command = [*RUN, "-n", 2, "--nnodes", 2, "--node-rank", node, "-a"]
            command += ["--master", f"{machines.names[0]}:29400", PROGRAM, CONFIG, STEPS]
            environ = environ_of_tests({"OPENSMP_RUN_TOKEN": "x"})
            processes.append(machines.start(node, command, environ))
        found = results(processes)
    trains_as_plain_keras(found, 2 * 2, layers=3)
    assert [each["rank"] for each in found] == [0, 1, 2, 3]
    assert [each["local"] for each in found] == [[0, 2], [1, 2], [0, 2], [1, 2]]


def test_hosts_are_started_over_ssh_with_as_many_ranks_as_each_has():
    with machines_or_skip(2) as machines:
        found = results([over_hosts(machines, PROGRAM, CONFIG, STEPS)])
    trains_as_plain_keras(found, 2 * 2, layers=3)
    assert [each["local"] for each in found] == [[0, 1], [0, 3], [1, 3], [2, 3]]


SLEEPING = """
import os, sys, time
print("STARTED", os.environ["OPENSMP_RUN_RANK"], sys.argv[1:], flush=True)
if os.environ["OPENSMP_RUN_RANK"] == "2" and sys.argv[1] == "fail":
    sys.exit(7)
time.sleep(300)
"""


def _all_started(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    while sum("STARTED" in line for line in lines) < 4:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return lines


def _is_empty(machines: Machines) -> bool:
    return not any(ip("netns", "pids", space).split() for space in machines._spaces)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_on_any_machine_when_the_launcher_ends(how):
    with machines_or_skip(2) as machines:
        (machines.folder / "s.py").write_text(SLEEPING)
        process = over_hosts(machines, "--grace-seconds", 1, "s.py", "wait a; 'bit'")
        lines = _all_started(process)
        assert sum("wait a; 'bit'" in line or "wait a; 'bit" in line for line in lines) == 4
        os.kill(process.pid, how)
        process.wait(patient(40))
        assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how)
        end = time.monotonic() + patient(20)
        while not _is_empty(machines) and time.monotonic() < end:
            time.sleep(0.1)
        assert _is_empty(machines)
        process.communicate()


def test_rank_that_fails_on_another_machine_ends_all_and_they_start_again():
    with machines_or_skip(2) as machines:
        (machines.folder / "s.py").write_text(SLEEPING)
        arguments = ["--grace-seconds", 1, "--max-restarts", 1, "s.py", "fail"]
        process = over_hosts(machines, *arguments)
        output, _ = process.communicate(timeout=patient(90))
        assert process.returncode == 7, output
        assert (
            output.count("[2] STARTED 2") == 4
        )  # the last lines of a rank that fails are told again
        assert "restart 1 of 1: all ranks are started again" in output
        assert f"opensmp run: {machines.names[1]} ended with exit code 7" in output
        assert _is_empty(machines)


def test_host_that_cannot_be_reached_is_named():
    environ: Mapping[str, str] = environ_of_tests()
    command = [*RUN, "--hosts", "nowhere", "--ssh", "sh -c 'exit 255' --", str(PROGRAM), "{}", "1"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 255
    assert "opensmp run: nowhere ended with exit code 255, as sh -c" in done.stderr


def test_master_that_no_name_server_knows_is_an_error_at_once(tmp_path):
    (tmp_path / "s.py").write_text("print('STARTED')")
    command = [*RUN, "--nnodes", "2", "--master", "no-such-machine.invalid:29400"]
    done = subprocess.run(
        [*command, str(tmp_path / "s.py")],
        env=environ_of_tests({"OPENSMP_RUN_TOKEN": "x"}),
        capture_output=True,
        text=True,
        timeout=patient(60),
    )
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "--master: there is no machine 'no-such-machine.invalid'" in said
    assert "STARTED" not in done.stdout


def test_machines_with_other_numbers_of_ranks_are_told_which_option():
    with machines_or_skip(2) as machines:
        processes = []
        for node, count in ((0, 1), (1, 2)):
            command = [*RUN, "-n", count, "--nnodes", 2, "--node-rank", node, "-a"]
            command += ["--master", f"{machines.names[0]}:29400", PROGRAM, CONFIG, STEPS]
            environ = environ_of_tests({"OPENSMP_RUN_TOKEN": "x"})
            processes.append(machines.start(node, command, environ))
        output, _ = processes[0].communicate(timeout=patient(100))
        for process in processes[1:]:
            process.kill()
    assert processes[0].returncode
    assert "Give opensmp run the same -n and --nnodes on all machines." in output
