from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

from patience import patient

from opensmp.distributed.channel.link import Link, LinkState

SCRIPT = """
import socket, sys, time
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(b"x")
time.sleep(1000)
"""


def test_machine_of_a_stopped_process_acknowledges_what_it_is_sent():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        other = subprocess.Popen([sys.executable, "-c", SCRIPT, str(port)])
        connection, _ = listener.accept()
        with other, connection:
            try:
                assert connection.recv(1) == b"x"
                os.kill(other.pid, signal.SIGSTOP)
                link = Link(connection)
                for _ in range(40):
                    connection.sendall(b"x" * 100)
                    time.sleep(0.1)
                    state = link.sample(time.monotonic())
                    assert state is not None
                    assert not state.is_lost
                assert state.silent_seconds < patient(1)
            finally:
                other.kill()


def test_connection_without_traffic_is_silent_but_owes_no_answer():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as one,
        listener.accept()[0],
    ):
        link = Link(one)
        link.sample(100.0)
        time.sleep(0.3)
        state = link.sample(200.0)
        assert state is not None
        assert state.silent_seconds >= 0.2
        assert state.unanswered_seconds == 0.0


def test_what_is_no_tcp_tells_nothing():
    one, two = socket.socketpair()
    with one, two:
        assert Link(one).sample(0.0) is None
    assert Link(one).sample(0.0) is None  # closed


def test_lost_directions():
    assert not LinkState(1.0, 1.0).is_lost
    assert LinkState(3.0, 0.0).is_deaf
    assert LinkState(0.0, 2.0).is_mute
    assert LinkState(3.0, 0.0).is_lost
    assert LinkState(0.0, 2.0).is_lost
