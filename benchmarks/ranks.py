"""What meeting, watching and agreeing cost rank 0: `python benchmarks/ranks.py`, or `--quick`.

The other ranks are simulated: one process does what they do on their connections to rank 0. Times
are processor time of rank 0, which depends little on what else the machine does. Each number is
followed by its growth from the line before: the power of the number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp.distributed.channel.channel import Channel
from opensmp.distributed.channel.handshake import Secret, introduce
from opensmp.distributed.collectives import consistency
from opensmp.distributed.collectives.gather import tasks_in_order
from opensmp.distributed.launch import cluster
from opensmp.distributed.launch.launch import Launch
from opensmp.distributed.launch.meeting.rendezvous import Meeting, meet, reserve_port
from opensmp.distributed.launch.meeting.table import unpacked
from opensmp.distributed.watchdog import heartbeat
from opensmp.distributed.watchdog.call_log import CallLog
from opensmp.distributed.watchdog.monitor import Watch
from opensmp.distributed.watchdog.verdicts.judge import beat_seconds

SIZES = (8, 64, 256, 1024, 4096)
QUICK_WATCH_SECONDS, WATCH_SECONDS = 2.0, 8.0
QUICK_MOST = 1024
AGREEMENTS = 9
SECRET = Secret("secret", is_secret=True)
FACTS = {f"key {number}": number for number in range(30)}  # as long as those of a configuration


def launch_of(size: int, port: int) -> Launch:
    return Launch(
        "by hand",
        size=size,
        meeting=("127.0.0.1", port),
        token=SECRET.token,
        has_secret=True,
        join_seconds=120.0,
    )


# ------------------------------------------------------------------------------ meeting


def guests(told: Connection, size: int, port: int) -> None:
    """Meets as all ranks but 0, and tells so; ends when it is told to."""
    made: list[Channel] = []
    for rank in range(1, size):
        while True:
            with contextlib.suppress(OSError):
                connection = socket.create_connection(("127.0.0.1", port), 10)
                break
            time.sleep(0.05)
        channel = introduce(connection, SECRET, rank, size, 60.0)
        channel.most_bytes = 1 << 24
        channel.send(
            {
                "kind": "hello",
                "rank": rank,
                "size": size,
                "port": 1024 + rank % 60_000,
                "machine": f"node{rank // 8} 3c4f7a5e-2a0e-4a46-9f0b-4e0a7be6f2a1",
                "process": 1000 + 37 * rank,
                "network": "net:[4026531840]",
                "facts": FACTS,
            }
        )
        assert channel.receive(60.0) == {"kind": "welcome"}
        made.append(channel)
    tables = [channel.receive(60.0) for channel in made]
    for table in {str(table): table for table in tables}.values():
        assert unpacked(table, size) is not None
    told.send("met")
    told.recv()


def meeting(size: int) -> tuple[float, float]:
    """Processor time of rank 0 and time until all ranks have met, in seconds."""
    reservation, port = reserve_port("127.0.0.1")
    reservation.close()
    with simulated(guests, size, port) as done:
        used, began = time.process_time(), time.monotonic()
        met = meet(launch_of(size, port), "node0", os.getpid(), FACTS)
        seconds = time.process_time() - used
        done.recv()
        elapsed = time.monotonic() - began
    assert len(met.peers) == size
    close(met)
    return seconds, elapsed


def close(met: Meeting) -> None:
    for channel in met.channels.values():
        channel.close()
    if met.reservation is not None:
        met.reservation.close()


@contextlib.contextmanager
def simulated(work: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """Runs the other ranks in a process of their own; yields a pipe to it."""
    here, there = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=work, args=(there, *args), daemon=True)
    process.start()
    try:
        yield here
    finally:
        process.kill()
        process.join()


# ------------------------------------------------------------------------------ watching


def heartbeats(told: Connection, size: int, port: int, does_step: bool) -> None:
    """Sends the heartbeats of all ranks but 0, evenly in time, until it is told to end."""
    world = tuple(range(size))
    channels, logs = [], []
    for _ in range(1, size):
        connection = socket.create_connection(("127.0.0.1", port), 10)
        channels.append(Channel(connection, SECRET.token))
        logs.append(CallLog())
        logs[-1].enter("smp.barrier", world)
    senders = [heartbeat.Sender() for _ in channels]
    beat, due = beat_seconds(size), time.monotonic()
    while not told.poll():
        for channel, log, sender in zip(channels, logs, senders, strict=True):
            due += beat / len(channels)
            time.sleep(max(0.0, due - time.monotonic()))
            if does_step:
                log.leave(log.enter("the step train", world))
            channel.send(sender.heartbeat(log.report()))
            with contextlib.suppress(BlockingIOError):
                channel.connection.recv(1 << 16)
    for channel, log, sender in zip(channels, logs, senders, strict=True):
        log.finish()
        channel.send(sender.heartbeat(log.report()))
    for channel in channels:
        text = b""
        channel.connection.settimeout(60.0)
        while b"together" not in text:  # all have finished
            text += channel.connection.recv(1 << 16)


def watching(size: int, does_step: bool, seconds: float) -> float:
    """Share of a core that the watch of rank 0 takes; ranks wait in a barrier, or train."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        port = listener.getsockname()[1]
        with simulated(heartbeats, size, port, does_step) as told:
            channels = {r: Channel(listener.accept()[0], SECRET.token) for r in range(1, size)}
            log = CallLog()
            log.enter("smp.barrier", tuple(range(size)))
            watch = Watch(0, channels, log, leave=_fail, idle_seconds=0.0)
            watch.start()
            time.sleep(1.0)
            used, began = time.process_time(), time.monotonic()
            time.sleep(seconds)
            share = (time.process_time() - used) / (time.monotonic() - began)
            told.send("end")
            watch.finish()
    for channel in channels.values():
        channel.close()
    return share


def _fail(code: int) -> None:
    os._exit(code)  # the watch has said why


# ------------------------------------------------------------------------------ agreeing


def agreeing(size: int) -> float:
    """Processor time in which rank 0 compares its next step with those of all ranks, in seconds.

    What TensorFlow's gather itself takes is not counted.
    """
    order = tasks_in_order(range(size))

    gathered: list[Any] = []

    def played(input: Any, **_: Any) -> Any:
        if not gathered:
            rows = np.tile(input.numpy(), (size, 1))
            rows[:, 1] = order  # the rank of the sender
            gathered.append(tf.constant(rows.reshape(-1)))
        return gathered[0]

    real = tf.raw_ops.CollectiveGatherV2, cluster.needed
    tf.raw_ops.CollectiveGatherV2 = played
    cluster.needed = lambda *_: SimpleNamespace(rank=0, host="/device:CPU:0")
    try:
        consistency.agree(range(size), "a step", ["the same"])
        taken = []
        for _ in range(AGREEMENTS):
            used = time.process_time()
            consistency.agree(range(size), "a step", ["the same"])
            taken.append(time.process_time() - used)
        return statistics.median(taken)
    finally:
        tf.raw_ops.CollectiveGatherV2, cluster.needed = real


# -------------------------------------------------------------------------------- table


class Row(NamedTuple):
    """What rank 0 needs, in seconds of processor time; watching: seconds of each second."""

    size: int
    meeting: float
    met: float
    waiting: float
    training: float
    agreeing: float


def measure(size: int, quick: bool) -> Row:
    meets, met = meeting(size)
    seconds = QUICK_WATCH_SECONDS if quick else WATCH_SECONDS
    waiting, training = (watching(size, does_step, seconds) for does_step in (False, True))
    return Row(size, meets, met, waiting, training, agreeing(size))


def shown(row: Row, last: Row | None) -> str:
    def growth(now: float, before: float) -> str:
        assert last is not None
        return f"{math.log(now / before) / math.log(row.size / last.size):5.2f}"

    texts = [f"{row.size:6d}", f"{row.met:6.1f} s"]
    for name, value in row._asdict().items():
        if name in ("size", "met"):
            continue
        is_share = name in ("waiting", "training")
        text = f"{100 * value:7.2f} %" if is_share else f"{1e3 * value:7.1f} ms"
        texts.append(f"{text} {growth(value, getattr(last, name)) if last else '':>5}")
    return "  ".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="up to 1,024 ranks, and shorter")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(" ranks  all met  meeting, rank 0  watch, waiting  watch, training  agreeing")
    last = None
    for size in arguments.sizes:
        if arguments.quick and size > QUICK_MOST:
            continue
        row = measure(size, arguments.quick)
        print(shown(row, last), flush=True)
        last = row


if __name__ == "__main__":
    main()
