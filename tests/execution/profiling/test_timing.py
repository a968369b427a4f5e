from __future__ import annotations

import itertools

import tensorflow as tf

from opensmp.execution.profiling.timing import seconds_of, seconds_per_call


class Runs:
    """Runs of known length and the clock that shows it, however often it is looked at."""

    def __init__(self, *seconds):
        self.left = list(seconds)
        self.now = 0

    def run(self):
        self.now += self.left.pop(0)

    def clock(self):
        return self.now


def test_two_runs_do_not_count_and_the_median_of_the_others_does():
    runs = Runs(100, 100, 1, 9, 2)
    assert seconds_of(runs.run, repeats=3, clock=runs.clock) == 2
    assert runs.left == []


def test_the_least_time_counts_if_asked_for():
    runs = Runs(0, 0, 3, 9, 2)
    assert seconds_of(runs.run, repeats=3, pick=min, clock=runs.clock) == 2


def test_a_call_is_run_and_not_optimised_away():
    def work(x):
        for _ in range(20):
            x = tf.linalg.matmul(x, x) * 0.01
        return x

    def nothing(x):
        return x + 1.0

    x = tf.ones([200, 200])
    options = {"experimental_attributes": {"_noinline": True}}
    slow, fast = (
        tf.function(body, autograph=False, **options).get_concrete_function(x)
        for body in (work, nothing)
    )
    assert seconds_per_call(slow, [x]) > 2 * seconds_per_call(fast, [x])


def test_a_call_that_noise_hides_takes_some_time_all_the_same():
    tiny = tf.function(lambda x: x + 1.0, autograph=False).get_concrete_function(tf.ones([2]))
    ticks = itertools.count()  # one call and many take a millisecond each
    seconds = seconds_per_call(tiny, [tf.ones([2])], clock=lambda: next(ticks) / 1000)
    assert 0 < seconds < 0.001
