"""Canaries of the runtime of several processes."""

from __future__ import annotations

import contextlib
import textwrap
from typing import Any

import pytest
import tensorflow as tf
from helpers import output_of
from processes import check_ranks

from opensmp import _private
from opensmp.distributed.launch.meeting.rendezvous import reserve_port


def test_is_tensorflow_started():
    tf.constant(1)
    assert _private.is_tensorflow_started()
    fresh = "from opensmp import _private; print(_private.is_tensorflow_started())"
    assert output_of(fresh).splitlines()[-1] == "False"


TWO_SERVERS = """
    import os
    import pathlib
    import sys
    import time
    import tensorflow as tf
    from opensmp import _private
    rank = int(os.environ["OPENSMP_RUN_RANK"])
    folder, *ports = sys.argv[1:]
    _private.join_cluster(
        rank,
        [f"127.0.0.1:{port}" for port in ports],
        nccl=False,
        heartbeat_seconds=20,
        join_seconds=240,
    )
    with tf.device(f"/job:worker/replica:0/task:{rank}/device:CPU:0"):
        total = tf.raw_ops.CollectiveReduceV2(
            input=tf.constant([rank + 1.0]), group_size=2, group_key=1, instance_key=1,
            ordering_token=[], merge_op="Add", final_op="Id", timeout_seconds=0,
        )
    answer = _private.answers(1 - rank, 5.0)
    _private.post(f"from {rank}", f"hello-{rank}")
    heard = _private.fetch(f"from {1 - rank}")
    print(total.numpy(), answer, heard, flush=True)
    pathlib.Path(folder, str(rank)).touch()
    while not pathlib.Path(folder, str(1 - rank)).exists():  # nobody leaves before both are done
        time.sleep(0.05)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def two_servers(tmp_path_factory: Any) -> Any:
    """What the ranks of a cluster of two printed."""
    folder = tmp_path_factory.mktemp("two_servers")
    with contextlib.ExitStack() as stack:
        held = [reserve_port() for _ in range(2)]
        for reservation, _ in held:
            stack.callback(reservation.close)
        results = check_ranks(
            TWO_SERVERS, 2, args=[folder, *(port for _, port in held)], fresh=True
        )
    return [result.lines[-1] for result in results]


def test_join_cluster(two_servers):
    assert [line.split()[0] for line in two_servers] == ["[3.]", "[3.]"]


def test_join_cluster__lets_other_threads_run():
    fresh = """
    import threading
    import time
    import tensorflow as tf
    from opensmp import _private
    moments = [time.monotonic()]

    def tick():
        while True:
            moments.append(time.monotonic())
            time.sleep(0.05)

    threading.Thread(target=tick, daemon=True).start()
    try:
        _private.join_cluster(
            1, ["127.0.0.1:9", "127.0.0.1:0"], nccl=False, heartbeat_seconds=20, join_seconds=4
        )
    except tf.errors.OpError as error:
        moments.append(time.monotonic())
        longest = max(b - a for a, b in zip(moments, moments[1:]))
        print(longest < 0.75 * max(2.0, moments[-1] - moments[0]), error.error_code)
    """
    ran_on, code = output_of(textwrap.dedent(fresh)).splitlines()[-1].split()
    assert ran_on == "True"
    assert int(code) in (tf.errors.DEADLINE_EXCEEDED, tf.errors.UNAVAILABLE)


def test_answers(two_servers):
    assert [line.split()[1] for line in two_servers] == ["True", "True"]


def test_post(two_servers):
    assert two_servers[0].split()[2] == "hello-1"


def test_fetch(two_servers):
    assert two_servers[1].split()[2] == "hello-0"


INTERRUPTED = """
    import threading
    import tensorflow as tf
    import opensmp as smp
    from opensmp import _private
    smp.init()
    rank = smp.rank()

    @tf.function
    def reduce(x):
        return smp.allreduce(x, op="sum", group=smp.WORLD)

    for number in (1, 2):
        print(reduce(tf.constant(1.0)).numpy(), flush=True)
        if rank:
            threading.Timer(1, _private.interrupt_collectives, ("a reason",)).start()
            with tf.device(f"/job:worker/replica:0/task:1/device:CPU:0"):
                try:
                    tf.raw_ops.CollectiveReduceV2(
                        input=tf.constant([1.0]), group_size=2, group_key=77, instance_key=1,
                        ordering_token=[], merge_op="Add", final_op="Id", timeout_seconds=0,
                    )
                except tf.errors.AbortedError as error:
                    print("a reason" in str(error), flush=True)
        _private.post(f"{number} from {rank}", "here")
        _private.fetch(f"{number} from {1 - rank}")
        _private.renew_collectives()
        _private.post(f"{number} renewed by {rank}", "here")
        _private.fetch(f"{number} renewed by {1 - rank}")
    print(reduce(tf.constant(1.0)).numpy(), smp.allgather(rank), flush=True)
"""


@pytest.fixture(scope="module")
def interrupted():
    return [result.lines for result in check_ranks(INTERRUPTED, 2, fresh=True)]


def test_interrupt_collectives(interrupted):
    assert interrupted[1][-5:-1] == ["2.0", "True", "2.0", "True"]


def test_renew_collectives(interrupted):
    assert interrupted[0][-3:] == ["2.0", "2.0", "2.0 [0, 1]"]
    assert interrupted[1][-1] == "2.0 [0, 1]"
