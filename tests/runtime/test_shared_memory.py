from __future__ import annotations

import gc
import itertools
import threading

import numpy as np
import tensorflow as tf
from processes import check_ranks, run_ranks
from small import STEP_OF_TWO

from opensmp.runtime import shared_memory
from opensmp.runtime.failures import ENDED_BY_PEER
from opensmp.runtime.localise import Transfer
from opensmp.runtime.shared_memory import SharedMemoryTransport, rooms, share
from opensmp.runtime.transport import CollectiveTransport


def transfer(shape, dtype="float32", source=0, target=1):
    with tf.Graph().as_default():
        tensor = tf.compat.v1.placeholder(dtype, shape)
    return Transfer(tensor.op, tensor, source, target)


LARGE = [20_000]
HERE = ["a", "a"]
REST = CollectiveTransport((0, 1), "/device:CPU:0", 0)


def test_tensors_of_known_shape_go_by_shared_memory():
    listed = [
        transfer(LARGE),
        transfer([]),
        transfer([None, 100_000]),
        transfer([200_000], "bfloat16"),
        transfer([200_000], tf.string),
        transfer([100_000], tf.bool),
        transfer([0, 3]),
        transfer(LARGE, source=1, target=0),
        Transfer(tf.Graph().as_graph_def, None, 0, 1),
    ]
    found = rooms(listed, HERE)
    assert {pair: set(room.slots) for pair, room in found.items()} == {
        (0, 1): {0, 1, 3, 5, 8},
        (1, 0): {7},
    }
    slots = sorted(found[0, 1].slots.values(), key=lambda slot: slot.offset)
    for one, other in itertools.pairwise(slots):
        assert other.offset >= one.offset + np.prod(one.shape) * one.dtype.itemsize
    assert found[0, 1].size >= slots[-1].offset + 4


def test_nothing_is_shared_between_machines():
    assert rooms([transfer(LARGE)], ["a", "b"]) == {}


def test_what_would_be_too_much_travels_as_before(monkeypatch):
    monkeypatch.setattr(shared_memory, "MOST_BYTES", 400_000)
    (room,) = rooms([transfer(LARGE) for _ in range(5)], HERE).values()
    assert set(room.slots) == {0, 1}
    assert room.size <= 400_000


def in_two_threads(all_rooms, monkeypatch=None):
    """`share` as two processes would call it."""
    barrier, box, results = threading.Barrier(2), {}, {}

    def run(process):
        count = iter(range(100))

        def gather(value):
            key = next(count)
            box[key, process] = value
            barrier.wait(10)
            return [box[key, 0], box[key, 1]]

        results[process] = share(all_rooms, process, gather)

    threads = [threading.Thread(target=run, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0], results[1]


def taken(memory):
    """The next tensor that comes, with its number."""
    found = []
    assert memory.take(lambda *came: found.append(came))
    ((number, place),) = found
    return number, memory.places(number)[place].copy()


def test_a_tensor_comes_out_as_it_went_in():
    all_rooms = rooms([transfer([300, 100]), transfer([40_000], "bfloat16"), transfer([])], HERE)
    here, there = in_two_threads(all_rooms)
    sender, receiver = here[0, 1], there[0, 1]
    half = tf.cast(tf.range(40_000), tf.bfloat16).numpy()
    for step in range(5):
        values = [np.full([300, 100], step, "float32"), half, np.float32(step)]
        order = [0, 1, 2] if step % 2 else [2, 0, 1]
        for number in order:
            sender.put(number, values[number])
        for number in order:
            came, value = taken(receiver)
            assert came == number
            np.testing.assert_array_equal(value, values[number])
        receiver.end_run()


def test_memory_that_is_still_needed_is_not_written_over():
    here, there = in_two_threads(rooms([transfer(LARGE)], HERE))
    sender, receiver = here[0, 1], there[0, 1]
    for step in range(2):
        sender.put(0, np.full(LARGE, step, "float32"))
    third = threading.Thread(target=sender.put, args=(0, np.full(LARGE, 2.0, "float32")))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    assert [taken(receiver)[1].max() for _ in range(2)] == [0.0, 1.0]
    receiver.end_run()
    third.join(10)
    assert not third.is_alive()
    assert taken(receiver)[1].min() == 2.0


def test_a_result_is_not_written_over():
    (room,) = rooms([transfer(LARGE)], HERE).values()
    here, there = in_two_threads({(0, 1): room})
    transport = []

    def receive():
        transport.append(SharedMemoryTransport(REST, {(0, 1): room}, there, 1, "/device:CPU:0"))
        return transport[0].receive(transfer(LARGE), 0)[0]

    function = tf.function(receive).get_concrete_function()
    results = []
    for step in range(5):
        here[0, 1].put(0, np.full(LARGE, step, "float32"))
        results.append(function())
        transport[0].end_run()
    assert [float(tf.reduce_max(result)) for result in results] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [float(tf.reduce_min(result)) for result in results] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_who_waits_can_be_woken():
    _, there = in_two_threads(rooms([transfer(LARGE)], HERE))
    came = []
    thread = threading.Thread(target=lambda: came.append(there[0, 1].take(lambda *_: None)))
    thread.start()
    there[0, 1].wake()
    thread.join(10)
    assert came == [False]


def test_the_thread_of_an_inbox_ends_with_its_graph():
    (room,) = rooms([transfer([2])], HERE).values()
    here, there = in_two_threads({(0, 1): room})
    before = set(threading.enumerate())

    def receive():
        transport = SharedMemoryTransport(None, {(0, 1): room}, there, 1, "/device:CPU:0")
        return transport.receive(transfer([2]), 0)[0]

    function = tf.function(receive).get_concrete_function()
    (thread,) = set(threading.enumerate()) - before
    for _ in range(3):
        here[0, 1].put(0, np.ones([2], "float32"))
        np.testing.assert_array_equal(function(), np.ones([2]))
        there[0, 1].end_run()
    assert thread.is_alive()
    del function
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_pair_that_cannot_see_each_other_does_without(monkeypatch):
    monkeypatch.setattr(shared_memory, "_opened", lambda *_: None)
    assert in_two_threads(rooms([transfer(LARGE)], HERE)) == ({}, {})


def test_memory_of_another_process_is_not_taken_for_ours():
    (room,) = rooms([transfer(LARGE)], HERE).values()
    here, _ = in_two_threads({(0, 1): room})
    nonce = here[0, 1].nonce
    assert len(nonce) == 16
    assert shared_memory._opened(room, 1, 0, nonce) is None


TRAINING = """
import opensmp as smp

def train(transport, pipeline):
    smp.shutdown()
    smp.init({
        "partitions": 2, "microbatches": 4, "auto_partition": False, "default_partition": 0,
        "transport": transport, "pipeline": pipeline,
    })
    import keras
    import numpy as np
    import tensorflow as tf

    keras.utils.set_random_seed(1)
    x = inputs = keras.Input((600,))
    for part in (0, 1, 0, 1):
        with smp.partition(part):
            x = keras.layers.Dense(600, activation="tanh")(x)
    model = smp.DistributedModel.from_keras(keras.Model(inputs, x))
    optimizer = keras.optimizers.SGD(0.1)

    @smp.step
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @smp.step
    def forward(x):
        return model(x)

    @tf.function
    def train_step(x):
        gradients, loss = step(x)
        optimizer.apply_gradients(
            zip([g.accumulate() for g in gradients], model.trainable_variables)
        )
        return loss.stack()  # TensorFlow may add them up in one order here, in another there

    x = tf.constant(np.random.default_rng(0).normal(size=(200, 600)).astype("float32"))
    losses = [train_step(x).numpy().tolist() for _ in range(5)]
    # Nobody answers the first partition here, which can run ahead.
    sums = [float(tf.reduce_sum(forward(x * i).merge())) for i in range(20)]
    return losses + sums

from opensmp.runtime import shared_memory
puts, put = [], shared_memory.Memory.put
def counted(self, number, value):
    puts.append(number)
    return put(self, number, value)
shared_memory.Memory.put = counted

expected = train("collective", "interleaved")
assert not puts
for pipeline in ("interleaved", "simple", "zero_bubble"):
    assert train("auto", pipeline) == expected, pipeline
assert len(puts) > 100, len(puts)
print("SAME")
"""


def test_training_gives_the_same_numbers_as_by_collectives():
    results = check_ranks(TRAINING, 2)
    assert [result.lines[-1] for result in results] == ["SAME", "SAME"]


INTERRUPTED = """
import opensmp as smp

smp.init({"partitions": 2, "microbatches": 2, "auto_partition": False, "default_partition": 0})
import keras
import tensorflow as tf

class Small(keras.layers.Layer):
    def call(self, x):
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_max(x) < 10.0, ["large"])]):
            return tf.identity(x)

x = inputs = keras.Input((4,))
for part in (0, 1):
    with smp.partition(part):
        x = Small()(x) if part else keras.layers.Dense(4, kernel_initializer="ones")(x)
model = smp.DistributedModel.from_keras(keras.Model(inputs, x))

@smp.step
def forward(x):
    return model(x)

print(float(tf.reduce_max(forward(tf.ones([4, 4])).merge())), flush=True)
try:
    forward(tf.ones([4, 4]) * 100)
except tf.errors.InvalidArgumentError as error:
    print("large" in str(error), flush=True)
forward(tf.ones([4, 4]))
"""


def test_a_step_that_fails_while_another_waits_ends_and_does_not_run_again():
    waiting, failing = run_ranks(INTERRUPTED, 2)
    assert failing.lines[:2] == ["4.0", "True"]
    assert failing.code == 1
    assert "was interrupted in this process in an earlier run" in failing.output
    assert waiting.code == ENDED_BY_PEER
    assert "rank 1 failed" in waiting.output


BOUNDED = f"""
import opensmp as smp

smp.init({{"partitions": 2, "microbatches": 8, "auto_partition": False,
           "default_partition": 0, "pipeline": "zero_bubble"}})
{STEP_OF_TWO}
@smp.step
def predict(x):
    return tf.reduce_sum(model(x))

for _ in range(3):
    total = predict(tf.ones([8, 4]))
print(float(total.reduce_mean()))
graph = predict.get_concrete_function(tf.ones([8, 4])).graph
sent = [op.inputs[0].op.type for op in graph.get_operations() if op.type == "PyFuncStateless"]
print(len(sent), sent.count("Const"))
"""


def test_words_about_the_order_are_sent_in_each_step():
    # Four of eight microbatches may be in flight. Without backward passes nothing but a word tells
    # the first partition that the second one has ended with a microbatch.
    # TensorFlow may send a constant while it optimises the graph, and never again.
    first, second = check_ranks(BOUNDED, 2, seconds=120)
    assert first.lines[-2:] == ["64.0", "8 0"]
    assert second.lines[-2:] == ["64.0", "12 0"]
