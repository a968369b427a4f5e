from __future__ import annotations

from processes import check_ranks

BEGIN = """
import opensmp as smp
smp.init()
import numpy as np, tensorflow as tf
from opensmp.distributed.collectives.reduce import all_reduce
from opensmp.distributed.transport import shared_sums
rank, ranks = smp.rank(), tuple(range(smp.size()))
sums = shared_sums.current()
assert sums is not None
used = []
insert = sums.sum_up
sums.sum_up = lambda *args: used.append(insert(*args)) or used[-1]
"""


def test_sums_of_all_types_and_sizes_are_those_of_numpy_in_many_runs():
    check_ranks(
        BEGIN
        + """
@tf.function(autograph=False)
def several(x, mean):
    big = tf.reshape(tf.range(3 << 20, dtype=tf.float32), [3, 1 << 20]) + x[0]  # 12 MiB
    odd = tf.reshape(tf.range(1001 * 7, dtype=tf.float64), [1001, 7]) * tf.cast(x[1], tf.float64)
    given = [x, big, x * 2, tf.cast(x, tf.int32), tf.cast(x, tf.int8), x[:0], odd, x[1]]
    given += [tf.cast(x, tf.complex64), tf.cast(x, tf.bfloat16), tf.cast(x, tf.uint64)]
    return all_reduce(given, ranks, mean=mean)

for mean in (False, True):
    for step in range(12):
        x = np.array([1, 2], "float32") + step
        found = several(tf.constant(x + rank), mean)
        of_all = len(ranks) * x + sum(ranks)
        for index, factor in {0: 1, 2: 2, 3: 1, 4: 1, 8: 1, 9: 1, 10: 1}.items():
            expected = of_all * factor / (len(ranks) if mean else 1)
            found_one = tf.cast(found[index], tf.float64).numpy()
            np.testing.assert_allclose(found_one, expected, rtol=1e-2 if index == 9 else 1e-6)
        numbers = np.arange(3 << 20, dtype="float32").reshape(3, -1)
        expected = sum(numbers + np.float32(x[0] + r) for r in ranks)
        if mean:
            expected = expected / np.float32(len(ranks))
        np.testing.assert_array_equal(found[1], expected)
        assert found[5].shape == [0]
assert len(used) > 4, used
print("done")
""",
        3,
    )


def test_functions_inside_of_functions_that_are_called_several_times():
    check_ranks(
        BEGIN
        + """
@tf.function
def inner(x):
    return smp.allreduce(x, "sum")

@tf.function
def outer(x):
    once, twice = inner(x), inner(x * 10)
    return once, twice, inner(once)

@tf.function
def looped(x):
    total = tf.zeros([2])
    for _ in tf.range(200):
        total += inner(x)
    return total

for step in range(50):
    once, twice, again = outer(tf.constant([1.0, 2.0]) + rank)
    assert once.numpy().tolist() == [3.0, 5.0], once
    assert twice.numpy().tolist() == [30.0, 50.0], twice
    assert again.numpy().tolist() == [6.0, 10.0], again
for step in range(5):
    total = looped(tf.constant([1.0, 2.0]) + rank)
    assert total.numpy().tolist() == [600.0, 1000.0], total
""",
        2,
    )


def test_sums_that_nobody_reads_here_are_there_for_the_other():
    check_ranks(
        BEGIN
        + """
@tf.function(autograph=False)
def nobody(x):
    all_reduce([x * 3], ranks)
    return x

@tf.function(autograph=False)
def one_of_them(x):
    (total,) = all_reduce([x], ranks)
    return x if rank == 0 else total

for step in range(20):
    nobody(tf.ones([4]))
    found = one_of_them(tf.fill([4], float(step + rank)))
    assert found.numpy().tolist() == [step + rank if rank == 0 else 2.0 * step + 1] * 4, found
assert used
""",
        2,
    )


def test_processes_may_trace_a_function_a_different_number_of_times():
    check_ranks(
        BEGIN
        + """
@tf.function(autograph=False)
def step(x, flag):
    return all_reduce([x], ranks)[0]

for number in range(6):
    found = step(tf.fill([5], float(number + rank)), number if rank == 0 else 0)
    assert found.numpy().tolist() == [2.0 * number + 1] * 5, found
""",
        2,
    )


def test_a_slower_rank_is_waited_for_and_a_result_is_not_written_over():
    check_ranks(
        BEGIN
        + """
import time
@tf.function(autograph=False)
def step(x):
    return all_reduce([x], ranks)[0]

kept = []
for number in range(9):
    if number % 3 == rank:
        time.sleep(0.2)
    kept.append(step(tf.fill([100_000], float(number + rank))))
for number, found in enumerate(kept):
    assert (found.numpy() == 2.0 * number + 1).all(), (number, found)
""",
        2,
    )


def test_after_an_error_that_the_program_catches_the_next_sums_are_right():
    check_ranks(
        BEGIN
        + """
@tf.function(autograph=False)
def step(x, bad):
    x = tf.debugging.check_numerics(tf.where(bad, np.nan, 1.0), "bad number") * x
    return all_reduce([x, tf.ones([2 << 20]) * x[0]], ranks)

def check(number):
    small, large = step(tf.fill([5], float(number + rank)), False)
    assert small.numpy().tolist() == [2.0 * number + 1] * 5, small
    assert (large.numpy() == 2.0 * number + 1).all()

for round_ in range(3):
    for number in range(4):
        check(number)
    try:
        step(tf.fill([5], -5.0), rank == round_ % 2)
    except Exception as error:
        assert "bad number" in str(error), error
    else:
        raise AssertionError("no error")

    @tf.function(autograph=False)
    def new(x):  # a key that has not been used before the error
        return all_reduce([x], ranks)[0]

    found = new(tf.fill([7 + round_], 2.0 + rank))
    assert found.numpy().tolist() == [5.0] * (7 + round_), found
check(7)
""",
        2,
    )


def test_a_sum_has_no_gradient_and_says_so():
    check_ranks(
        BEGIN
        + """
@tf.function(autograph=False)
def with_tape(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(all_reduce([x], ranks)[0])
    return tape.gradient(total, x)

@tf.function(autograph=False)
def without(x):
    return tf.gradients(tf.reduce_sum(all_reduce([x], ranks)[0]), x)

for function in (with_tape, without):
    try:
        function(tf.ones([3]))
    except LookupError as error:
        assert "no gradient" in str(error) or "no entry" in str(error), error
    else:
        raise AssertionError("a gradient")
""",
        2,
    )


def test_without_memory_or_if_it_is_not_wanted_the_collectives_sum_up():
    check_ranks(
        BEGIN
        + """
def total():
    @tf.function(autograph=False)
    def step(x):
        return all_reduce([x, tf.ones([1 << 20]) * x[0]], ranks)

    return [each.numpy()[:2].tolist() for each in step(tf.constant([1.0, 2.0]) + rank)]

assert total() == [[3.0, 5.0], [3.0, 3.0]]
assert all(used) and len(used) == 2
before, sums._arena.region = sums._arena.region, lambda *args: None
assert total() == [[3.0, 5.0], [3.0, 3.0]]
assert not any(used[2:]) and len(used) == 4
sums._arena.region = before
smp.shutdown()
smp.init({"transport": "collective"})
assert shared_sums.current() is None
assert total() == [[3.0, 5.0], [3.0, 3.0]]
smp.shutdown()
smp.init()
assert shared_sums.current() is sums
assert total() == [[3.0, 5.0], [3.0, 3.0]]
assert len(used) == 6
""",
        2,
    )
