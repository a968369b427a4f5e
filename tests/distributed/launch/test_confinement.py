from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from processes import check_ranks

from opensmp.distributed.launch import confinement
from opensmp.distributed.launch.confinement import confined
from opensmp.distributed.launch.meeting.rendezvous import reserve_port

EVERYWHERE = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET


def interface(listener: socket.socket) -> bytes:
    """The only one at which this socket listens; empty for all."""
    return listener.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """A socket of all interfaces that does not listen yet."""
    with socket.socket(EVERYWHERE) as made:
        made.bind(("", 0))
        yield made


def test_a_server_that_begins_meanwhile_can_be_reached_from_this_machine_only(bound):
    port = bound.getsockname()[1]
    with confined(port):
        bound.listen()
        end = time.monotonic() + 30
        while not interface(bound) and time.monotonic() < end:  # while it still starts
            time.sleep(0.01)
        assert interface(bound) == b"lo"
    for address in ("127.0.0.1", "localhost"):
        with socket.create_connection((address, port), 10):
            bound.accept()[0].close()


def test_a_server_is_found_at_the_end_at_the_latest(bound, monkeypatch):
    monkeypatch.setattr(confinement, "_PAUSE_SECONDS", 1000.0)
    with confined(bound.getsockname()[1]):
        bound.listen()
    assert interface(bound) == b"lo"


def test_other_sockets_stay_as_they_are(bound):
    with socket.create_server(("", 0), family=EVERYWHERE) as other:
        with confined(bound.getsockname()[1]):
            bound.listen()
        assert interface(other) == b""


def test_sockets_that_block_go_on_blocking(bound):
    one, two = socket.socketpair()
    with one, two:
        one.setblocking(True)
        socket.setdefaulttimeout(5.0)
        try:
            with confined(bound.getsockname()[1]):
                bound.listen()
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(one.fileno())


@pytest.mark.parametrize("fails", [True, False])
def test_a_server_that_stays_open_to_others_is_warned_of(bound, monkeypatch, caplog, fails):
    def refuse(port: int) -> bool:
        if fails:
            raise PermissionError("Operation not permitted")
        return False

    monkeypatch.setattr(confinement, "_confine", refuse)
    with confined(1):
        pass
    (told,) = caplog.records
    assert "can be reached from other machines" in told.getMessage()
    assert ("not permitted" if fails else "was not found") in told.getMessage()


def test_errors_pass_through_and_leave_no_thread():
    with pytest.raises(ZeroDivisionError), confined(1):
        raise ZeroDivisionError
    assert not any(each.name == "opensmp-confinement" for each in threading.enumerate())


# ----------------------------------------------------------------------- with TensorFlow's

LISTENING = """
import os, socket
import opensmp as smp
smp.init()
for name in os.listdir("/proc/self/fd"):
    try:
        own = socket.socket(fileno=os.dup(int(name)))
    except OSError:
        continue
    if own.family in (socket.AF_INET, socket.AF_INET6):
        if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            print(own.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\\0"))
print(smp.allgather(smp.rank()))
smp.barrier()
"""


def test_nothing_of_a_run_of_one_machine_listens_for_other_machines():
    for result in check_ranks(LISTENING, 2, fresh=True):
        assert result.lines == ["b'lo'", "[0, 1]"]


def test_given_addresses_of_one_machine_may_be_any_of_it():
    """Of an address of this machine other than the loopback, where it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:  # sends nothing: the system says from which address it would
            probe.connect(("203.0.113.7", 9))
            address = probe.getsockname()[0]
        except OSError:
            address = "127.0.0.1"
    held = [reserve_port() for _ in range(2)]
    workers = [f"{address}:{port}" for _, port in held]

    def variables(rank: int) -> dict[str, str]:
        task = {"type": "worker", "index": rank}
        return {"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": task})}

    try:
        results = check_ranks(LISTENING, 2, environ=variables, own_variables=False)
    finally:
        for reservation, _ in held:
            reservation.close()
    for result in results:
        assert result.lines[-2:] == ["b'lo'", "[0, 1]"]


def _can_make_networks() -> bool:
    if os.geteuid() or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        return False
    return not subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode


@pytest.mark.skipif(not _can_make_networks(), reason="no network of its own can be made")
@pytest.mark.parametrize("is_confined", [True, False])
def test_another_machine_gets_no_connection(is_confined):
    """The other machine is a second network namespace, joined by a cable."""
    inner = """
    import os, socket, subprocess, sys, time
    from opensmp.distributed.launch.confinement import confined
    run = lambda line: subprocess.run(line.split(), check=True)
    far = subprocess.Popen(["unshare", "-n", "sleep", "60"])
    while os.readlink(f"/proc/{far.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.02)
    run("ip link set lo up")
    run("ip link add near type veth peer name far")
    run(f"ip link set far netns {far.pid}")
    run("ip addr add 10.77.0.1/24 dev near")
    run("ip link set near up")
    inside = f"nsenter -t {far.pid} -n "
    run(inside + "ip addr add 10.77.0.2/24 dev far")
    run(inside + "ip link set far up")
    server = socket.socket(); server.bind(("", 0)); port = server.getsockname()[1]
    if sys.argv[1] == "True":
        with confined(port):
            server.listen()
    else:
        server.listen()
    socket.create_connection(("127.0.0.1", port), 10).close()
    code = f"import socket; socket.create_connection(('10.77.0.1', {port}), 10)"
    print(subprocess.run([*inside.split(), sys.executable, "-c", code], stderr=-3).returncode)
    far.kill()
    """
    lines = [line.removeprefix("    ") for line in inner.splitlines()]
    command = ["unshare", "-n", sys.executable, "-c", "\n".join(lines), str(is_confined)]
    done: Any = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.stdout.strip() == ("1" if is_confined else "0"), done.stderr
