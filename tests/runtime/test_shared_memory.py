from __future__ import annotations

import threading

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

from opensmp.errors import CommunicationError
from opensmp.runtime import shared_memory
from opensmp.runtime.localise import Transfer
from opensmp.runtime.shared_memory import SMALLEST_BYTES, rooms, share


def transfer(shape, dtype="float32", source=0, target=1):
    with tf.Graph().as_default():
        tensor = tf.compat.v1.placeholder(dtype, shape)
    return Transfer(tensor.op, tensor, source, target)


LARGE = [SMALLEST_BYTES // 4]
HERE = ["a", "a"]


def test_large_tensors_of_known_shape_go_by_shared_memory():
    listed = [
        transfer(LARGE),
        transfer([2]),
        transfer([None, 100_000]),
        transfer([200_000], "bfloat16"),
        transfer([200_000], tf.string),
        transfer([100_000], tf.bool),
        transfer(LARGE, source=1, target=0),
        Transfer(tf.Graph().as_graph_def, None, 0, 1),
    ]
    found = rooms(listed, HERE)
    assert {pair: set(room.slots) for pair, room in found.items()} == {(0, 1): {0, 3}, (1, 0): {6}}
    first, second = found[0, 1].slots.values()
    assert second.offset >= first.offset + SMALLEST_BYTES
    assert found[0, 1].size >= second.offset + 400_000


def test_nothing_is_shared_between_machines():
    assert rooms([transfer(LARGE)], ["a", "b"]) == {}


def test_what_would_be_too_much_travels_as_before(monkeypatch):
    monkeypatch.setattr(shared_memory, "MOST_BYTES", 3 * SMALLEST_BYTES)
    (room,) = rooms([transfer(LARGE) for _ in range(5)], HERE).values()
    assert set(room.slots) == {0, 1}
    assert room.size <= 3 * SMALLEST_BYTES


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


def test_a_tensor_comes_out_as_it_went_in():
    all_rooms = rooms([transfer([300, 100]), transfer([40_000], "bfloat16")], HERE)
    here, there = in_two_threads(all_rooms)
    sender, receiver = here[0, 1], there[0, 1]
    for step in range(3):
        value = np.full([300, 100], step, "float32")
        use = sender.put(0, value)
        got = receiver.get(0, use)
        np.testing.assert_array_equal(got, value)
        assert use == step + 1
    half = tf.cast(tf.range(40_000), tf.bfloat16).numpy()
    np.testing.assert_array_equal(receiver.get(1, sender.put(1, half)), half)


def test_memory_that_was_not_read_is_not_written_over(monkeypatch):
    monkeypatch.setattr(shared_memory, "_PATIENCE_SECONDS", 0.05)
    here, there = in_two_threads(rooms([transfer(LARGE)], HERE))
    use = here[0, 1].put(0, np.ones(LARGE, "float32"))
    with pytest.raises(CommunicationError, match="not taken out"):
        here[0, 1].put(0, np.zeros(LARGE, "float32"))
    assert there[0, 1].get(0, use).min() == 1.0


def test_a_tensor_out_of_turn_is_an_error():
    here, there = in_two_threads(rooms([transfer(LARGE)], HERE))
    use = here[0, 1].put(0, np.ones(LARGE, "float32"))
    there[0, 1].get(0, use)
    with pytest.raises(CommunicationError, match="out of turn"):
        there[0, 1].get(0, use)


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
        return loss.reduce_mean()

    x = tf.constant(np.random.default_rng(0).normal(size=(200, 600)).astype("float32"))
    losses = [float(train_step(x)) for _ in range(5)]
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
