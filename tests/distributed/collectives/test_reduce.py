from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

from opensmp.distributed.collectives import reduce
from opensmp.errors import CommunicationError

TYPES = [tf.bool, tf.int8, tf.uint8, tf.int16, tf.uint16, tf.int32, tf.uint32, tf.int64]
TYPES += [tf.uint64, tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64, tf.complex128]

# What every script begins with: two ranks that know each other.
BEGIN = """
import opensmp as smp
smp.init()
import numpy as np, tensorflow as tf
from opensmp.distributed.collectives.reduce import gather_rows, replace_by, all_reduce
rank, ranks = smp.rank(), tuple(range(smp.size()))
"""


def test_one_process_gives_everything_back():
    tensor = tf.constant([1.0, 2.0])
    assert reduce.all_reduce([tensor], (0,))[0] is tensor
    assert reduce.gather_rows(tensor, (0,)) is tensor
    assert reduce.replace_by([tensor], (0,), 0)[0] is tensor


def test_mean_of_integers_is_float64_also_in_one_process():
    (mean,) = reduce.all_reduce([tf.constant([3])], (0,), mean=True)
    assert mean.dtype == tf.float64


def test_small_neighbours_of_one_type_share_a_bucket():
    small, large = tf.zeros([1000]), tf.zeros([reduce.BUCKET_BYTES // 4])
    other = tf.zeros([1000], tf.float64)
    buckets = reduce._buckets([small, small, other, small, large, small])
    assert [len(bucket) for bucket in buckets] == [2, 1, 1, 1, 1]


def test_tensors_of_unknown_shape_travel_alone():
    with tf.Graph().as_default():
        unknown = tf.compat.v1.placeholder(tf.float32, [None])
        buckets = reduce._buckets([unknown, tf.zeros([2]), tf.zeros([2]), unknown])
    assert [len(bucket) for bucket in buckets] == [1, 2, 1]


@pytest.mark.parametrize("dtype", TYPES)
def test_bits_of_any_type_come_back(dtype):
    given = tf.cast(tf.constant([[0, 1], [2, 3]]), dtype)
    bits = reduce.bits_of(given)
    assert bits.dtype in (tf.int32, tf.int64)
    back = reduce.from_bits(bits, given)
    assert back.dtype == given.dtype
    np.testing.assert_array_equal(back.numpy(), given.numpy())


def test_bits_keep_the_sign_of_zero_and_nan():
    given = tf.constant([-0.0, float("nan"), float("-inf")])
    back = reduce.from_bits(reduce.bits_of(given), given).numpy()
    assert np.signbit(back[0])
    assert np.isnan(back[1])
    assert back[2] == -np.inf


def test_without_other_processes_it_is_an_error():
    with pytest.raises(CommunicationError, match=r"needs the ranks \[0, 1\]"):
        reduce.all_reduce([tf.constant(1.0)], (0, 1), name="a loss")


def test_all_faults_of_tensors_are_reported_at_once():
    with pytest.raises(CommunicationError) as error:
        reduce.all_reduce([tf.constant(True), tf.constant(1.0), tf.constant("a")], (0, 1))
    assert "tensor 0 has the dtype bool; tensor 2 has the dtype string" in str(error.value)


def test_sums_over_two_processes_are_those_of_numpy():
    check_ranks(
        BEGIN
        + """
for name in ("bfloat16 float16 float32 float64 int8 uint8 int16 uint16 int32 uint32 int64 uint64 "
             "complex64 complex128").split():
    x = tf.cast(tf.range(6) + rank, name)
    (total,) = all_reduce([x], ranks)
    (mean,) = all_reduce([x], ranks, mean=True)
    assert total.dtype == x.dtype, (name, total)
    np.testing.assert_array_equal(total.numpy().astype("float64"), 2.0 * np.arange(6) + 1)
    np.testing.assert_array_equal(mean.numpy().astype("float64"), np.arange(6) + 0.5)
    assert mean.dtype == (tf.float64 if x.dtype.is_integer else x.dtype)

@tf.function
def several(x):
    big = tf.reshape(tf.range(3 << 20, dtype=tf.float32), [3, 1 << 20]) + x[0]  # 12 MiB
    mixed = [x, big, x * 2, tf.cast(x, tf.int32), x[:0], x[1]]
    return all_reduce(mixed, ranks), all_reduce([x], ranks)

for step in range(3):
    (a, big, b, c, empty, scalar), (again,) = several(tf.constant([1.0, 2.0]) + rank + step)
    np.testing.assert_array_equal(a, [3 + 2 * step, 5 + 2 * step])
    expected = 2 * np.arange(3 << 20, dtype="float32").reshape(3, -1) + 3 + 2 * step
    np.testing.assert_array_equal(big, expected)
    np.testing.assert_array_equal(b, 2 * a)
    np.testing.assert_array_equal(c, a)
    assert empty.shape == [0] and scalar == a[1]
    np.testing.assert_array_equal(again, a)

@tf.function(input_signature=[tf.TensorSpec([None, 2])])
def unknown(x):
    return all_reduce([x], ranks)[0]

for rows in (3, 5, 3, 0):
    np.testing.assert_array_equal(unknown(tf.ones([rows, 2])), np.full([rows, 2], 2.0))

@tf.function
def inner(x):
    return all_reduce([x], ranks)[0]

@tf.function
def twice(x):  # one function, traced once, called often: its uses must not be mixed up
    return [inner(x * i) for i in range(8)] + all_reduce([x], ranks)

values = [float(t[0]) for t in twice(tf.ones([4]))]
assert values == [0, 2, 4, 6, 8, 10, 12, 14, 2], values

rows = gather_rows(tf.constant([[1.0, 2.0]]) + rank, ranks)
np.testing.assert_array_equal(rows, [[1, 2], [2, 3]])
(copy,) = replace_by([tf.constant([-0.0, np.nan]) * (1 - rank)], ranks, 0)
assert np.signbit(copy[0]) and np.isnan(copy[1])
""",
        2,
    )


def test_groups_that_reduce_in_opposite_order_do_not_wait_for_each_other():
    check_ranks(
        BEGIN
        + """
world, pair = ranks, smp.get_mp_group()

@tf.function
def step(x):
    x = tf.ensure_shape(x, [1000])
    reduces = [lambda: all_reduce([x], world)[0], lambda: all_reduce([x], pair)[0]]
    reduces += [lambda: all_reduce([x[:7]], world)[0], lambda: all_reduce([x[:7]], pair)[0]]
    order = range(4) if rank % 2 else reversed(range(4))
    results = {i: reduces[i]() for i in order}
    return [results[i] for i in range(4)]

for _ in range(20):
    a, b, c, d = step(tf.fill([1000], float(rank)))
assert (a[0], b[0], c[0], d[0]) == (6.0, float(sum(pair)), 6.0, float(sum(pair)))

@tf.function
def one_group(x, y):  # even in one group, where shapes tell the reduces apart
    if rank % 2:
        a = all_reduce([x], world)[0]
        return a, all_reduce([y], world)[0]
    b = all_reduce([y], world)[0]
    return all_reduce([x], world)[0], b

for _ in range(20):
    a, b = one_group(tf.ones([10]), tf.ones([20]))
assert a.shape == [10] and b.shape == [20] and a[0] == b[0] == 4
""",
        4,
        {"partitions": 2},
    )


def test_functions_traced_unequally_often_are_paired():
    check_ranks(
        BEGIN
        + """
@tf.function(reduce_retracing=False)
def step(x, extra):
    return all_reduce([x], ranks)[0]

if rank == 1:
    step.get_concrete_function(tf.TensorSpec([3]), "of rank 1 alone")
for _ in range(3):
    assert step(tf.ones([3]), "")[0] == 2
""",
        2,
    )


TRAVELLING = """
import os, sys, threading
import opensmp as smp
from opensmp.distributed.launch import cluster

if sys.argv[2] == "machines":
    cluster.machine_name = lambda: "machine " + os.environ["OPENSMP_RUN_RANK"]
smp.init()
import keras
import numpy as np
import tensorflow as tf

arrived = threading.Event()
in_time = []

def probe(function, tensor):
    result = tf.numpy_function(function, [tensor], tensor.dtype, stateful=False)
    result.set_shape(tensor.shape)
    return result

def note(value):
    arrived.set()
    return value

@tf.custom_gradient
def slow(x):
    def wait(value):  # the first microbatch waits in vain
        in_time.append(arrived.wait(float(sys.argv[3]) if in_time else 0.0))
        return value
    return tf.identity(x), lambda dy: probe(wait, dy)

class Slow(keras.layers.Layer):
    def call(self, x):
        return slow(x)

class Noting(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        if variable.shape == (64, 8):
            gradient = probe(note, gradient)
        super().update_step(gradient, variable, learning_rate)

# The gradient of the first layer's weights is too large to travel with that of the last's.
layers = [keras.layers.Dense(64, use_bias=False), Slow(), keras.layers.Dense(8, use_bias=False)]
model = smp.DistributedModel.from_keras(keras.Sequential([keras.Input((20000,)), *layers]))
x, y = np.ones([8, 20000], "float32"), np.ones([8, 8], "float32")
if sys.argv[1] == "fit":
    model.compile(Noting(0.1), "mse")
    model.fit(x, y, batch_size=8, verbose=0)
else:
    @smp.step
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    @tf.function
    def train_step(x, y):
        first, last = (smp.allreduce(gradient.accumulate()) for gradient in step(x, y))
        return first, probe(note, last)

    train_step(tf.constant(x), tf.constant(y))
print(in_time)
"""


@pytest.mark.parametrize("way", ["fit", "loop"])
def test_gradients_travel_while_those_of_the_layers_before_are_computed(way):
    config = {"microbatches": 2}
    threads = {"TF_NUM_INTEROP_THREADS": 2}  # one of them waits
    results = check_ranks(TRAVELLING, 2, config, args=[way, "machines", 200], environ=threads)
    assert [result.lines[-1] for result in results] == ["[False, True]"] * 2


def test_between_cpus_of_one_machine_they_wait_until_the_cores_are_free():
    config = {"microbatches": 2}
    threads = {"TF_NUM_INTEROP_THREADS": 2}
    results = check_ranks(TRAVELLING, 2, config, args=["fit", "machine", 1], environ=threads)
    assert [result.lines[-1] for result in results] == ["[False, False]"] * 2
