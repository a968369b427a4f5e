from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks, run_ranks

from opensmp.distributed.watchdog import traced_calls
from opensmp.distributed.watchdog.call_log import CallLog, Report
from opensmp.distributed.watchdog.traced_calls import FunctionRuns, noted

RANKS = (0, 1)
HOST = "/device:CPU:0"


@pytest.fixture
def record(monkeypatch) -> CallLog:
    made = CallLog()
    monkeypatch.setattr(traced_calls, "waits", made)
    return made


def lanes(report: Report) -> dict[str, int]:
    return {group.lane.rsplit(" ", 1)[0]: done.number for group, done in report.entered.items()}


def test_a_run_is_noted_while_it_lasts(record):
    inside: list[Report] = []

    def look(value: float) -> np.float32:
        inside.append(record.report())
        return np.float32(value)

    @tf.function
    def train(x):
        with noted("a sum", RANKS, HOST) as waiting:
            waited = tf.numpy_function(look, [x], tf.float32)
            waiting.append(waited.op)
        return waited

    for step in (1, 2):
        assert float(train(tf.constant(3.0))) == 3.0
        assert inside[-1].wait.name == "the function train with a sum"
        assert inside[-1].wait.computes
        assert inside[-1].wait.number == step
        assert record.report().wait is None


def test_what_the_code_does_after_a_call_does_not_wait_for_it(record):
    """Else a later call that needs it would wait for itself."""
    seen: list[float] = []

    @tf.function
    def train(x):
        with noted("a sum", RANKS, HOST) as waiting:
            first = tf.identity(x)
            waiting.append(first.op)
        y = tf.numpy_function(lambda v: (seen.append(float(v)), np.float32(v))[1], [x], tf.float32)
        with noted("a sum", RANKS, HOST) as waiting:
            second = tf.identity(y)
            waiting.append(second.op)
        return first + second

    assert float(train(tf.constant(2.0))) == 4.0
    assert seen == [2.0]
    assert lanes(record.report()) == {"runs of train": 1}


def test_branches_and_loops_run_unnoted(record):
    def call(x):
        with noted("a sum", RANKS, HOST) as waiting:
            result = tf.identity(x)
            waiting.append(result.op)
        return result

    @tf.function
    def train(x):
        x = tf.cond(x > 0.0, lambda: call(x), lambda: x)
        return tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, call(x)), (0, x))[1]

    assert float(train(tf.constant(1.0))) == 1.0
    assert lanes(record.report()) == {}


def test_the_order_of_calls_is_free_and_their_number_is_not():
    first, second, third = (FunctionRuns("f", RANKS) for _ in range(3))
    for call in ("a", "b"):
        first.add(call)
    for call in ("b", "a"):
        second.add(call)
    third.add("a")
    assert (first.name, first.lane) == (second.name, second.lane)
    assert third.lane != first.lane


TWO = """
import sys
import opensmp as smp
smp.init()
import tensorflow as tf
rank, kind = smp.rank(), sys.argv[1]

@tf.function
def train(tensors):
    return smp.allreduce(tensors)

if kind == "one more":
    for step in range(3 - rank):
        train([tf.ones([2])])
elif kind == "shape":
    train([tf.ones([3 + rank])])
elif kind == "order":
    tensors = [tf.ones([2, 3]), tf.ones([3, 2])]
    train(tensors[::-1] if rank else tensors)
elif kind == "root":
    variable = tf.Variable([1.0])
    tf.function(lambda: smp.broadcast_variables([variable], root_rank=rank))()
elif rank:
    smp.barrier()
else:
    train([tf.ones([3])])
"""


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("one more", "rank 0 waits in the function train with smp.allreduce mean of float32 [2]"),
        ("shape", "rank 1 waits in the function train with smp.allreduce mean of float32 [4]"),
        ("order", "with smp.allreduce mean of float32 [3, 2], float32 [2, 3]"),
        ("root", "with smp.broadcast_variables from rank 1 of int32 [1]"),
        ("barrier", "rank 1 waits in smp.barrier for rank 0"),
    ],
)
def test_functions_that_do_not_match_end_the_run(kind, told):
    for result in run_ranks(TWO, 2, args=[kind]):
        assert result.code != 0
        assert "the programs do not match" in result.output
        assert told in result.output


def test_a_rank_that_computes_before_it_comes_is_waited_for():
    check_ranks(
        """
        import time
        import opensmp as smp
        smp.init()
        import tensorflow as tf

        def compute(value):
            end = time.monotonic() + 8.0
            while time.monotonic() < end:
                pass
            return value

        @tf.function
        def first(x):
            return smp.allreduce(x)

        @tf.function
        def second(x):
            return smp.allreduce(tf.stack([x, x]))

        @tf.function
        def both(x):  # the ranks come to them in opposite order, and meanwhile compute
            late = tf.numpy_function(compute, [x], tf.float32)
            late.set_shape([])
            pair = (x, late) if smp.rank() else (late, x)
            return first(pair[0]), second(pair[1])

        a, b = both(tf.constant(1.0))
        assert float(a) == 1.0 and b.numpy().tolist() == [1.0, 1.0]
        """,
        2,
    )
