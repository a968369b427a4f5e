from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks
from sharing import HERE, LARGE, share_in_two_threads, transfer
from small import STEP_OF_TWO

from opensmp import _private
from opensmp.distributed.transport.collective import CollectiveTransport
from opensmp.distributed.transport.shared_memory import rooms
from opensmp.distributed.transport.shared_memory_transport import SharedMemoryTransport
from opensmp.distributed.transport.transfer import Transfer
from opensmp.errors import CommunicationError

HOST = "/device:CPU:0"
RUN = tf.TensorSpec([], tf.int64)


class TwoEnds:
    """A step of two processes in one: the functions that send and receive the same tensors."""

    def __init__(self, *values):
        self.transports = {}
        self.specs = [tf.TensorSpec.from_tensor(tf.constant(value)) for value in values]
        transfers = [transfer(spec.shape, spec.dtype) for spec in self.specs]
        all_rooms = rooms(transfers, HERE)
        self.memories = share_in_two_threads(all_rooms)
        rest = CollectiveTransport((0, 1), HOST, 0)

        def transport(process, run):
            memory = self.memories[process]
            made = SharedMemoryTransport(rest, all_rooms, memory, process, HOST, run)
            self.transports[process] = made
            return made

        def send(run, *tensors):
            sender = transport(0, run)
            for number, tensor in enumerate(tensors):
                tensor = tf.identity(tensor)
                sent = sender.send(Transfer(tensor.op, tensor, 0, 1), number)
                _private.must_run(tf.compat.v1.get_default_graph(), [sent.op])
            return run

        def receive(run):
            receiver = transport(1, run)
            return [receiver.receive(each, number).tensor for number, each in enumerate(transfers)]

        self._send = tf.function(send).get_concrete_function(RUN, *self.specs)
        self._receive = tf.function(receive).get_concrete_function(RUN)

    def send(self, run, *values):
        self.transports[0].begin_run(run)
        self._send(tf.constant(run, tf.int64), *map(tf.constant, values))

    def receive(self, run):
        return self._receive(tf.constant(run, tf.int64))

    def end_run(self):
        self.transports[1].end_run()


def in_thread(function, *args):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)), daemon=True)
    thread.start()
    return thread, results


NUMBERS = ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
NUMBERS += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", ["bool", *NUMBERS])
@pytest.mark.parametrize("shape", [(), (5,), (3, 1, 4)])
def test_a_tensor_comes_out_as_it_went_in(dtype, shape):
    value = tf.cast(tf.reshape(tf.range(1, np.prod(shape, dtype=int) + 1), shape), dtype)
    ends = TwoEnds(value.numpy())
    ends.send(1, value)
    (received,) = ends.receive(1)
    assert received.dtype == value.dtype
    np.testing.assert_array_equal(received.numpy(), value.numpy())


def test_each_run_gets_what_was_sent_for_it():
    ends = TwoEnds(np.zeros(LARGE, "float32"), np.zeros([2, 3]))
    for run in range(1, 6):
        ends.send(run, np.full(LARGE, run, "float32"), np.full([2, 3], -run, "float64"))
        first, second = ends.receive(run)
        ends.end_run()
        assert (first.numpy() == run).all()
        assert (second.numpy() == -run).all()


def test_who_comes_early_waits_until_it_is_there():
    ends = TwoEnds(np.zeros(LARGE, "float32"))
    for run in range(1, 4):
        thread, results = in_thread(ends.receive, run)
        thread.join(0.2)
        assert thread.is_alive()
        ends.send(run, np.full(LARGE, run, "float32"))
        thread.join(60)
        ((received,),) = results
        assert (received.numpy() == run).all()
        ends.end_run()


def test_no_python_runs_for_what_is_there_already():
    ends = TwoEnds(np.zeros(LARGE, "float32"))
    (inbox,) = ends.transports[1]._inboxes.values()
    ends.send(1, np.ones(LARGE, "float32"))
    with inbox.arrivals._changed:  # whoever asked would wait for ever
        thread, results = in_thread(ends.receive, 1)
        thread.join(60)
        assert not thread.is_alive()
    assert (results[0][0].numpy() == 1).all()


def test_memory_that_is_still_needed_is_not_written_over():
    ends = TwoEnds(np.zeros(LARGE, "float32"))
    for run in (1, 2):
        ends.send(run, np.full(LARGE, run, "float32"))
    third, _ = in_thread(ends.send, 3, np.full(LARGE, 3, "float32"))
    third.join(0.2)
    assert third.is_alive()
    assert [ends.receive(run)[0].numpy().max() for run in (1, 2)] == [1.0, 2.0]
    ends.end_run()
    third.join(60)
    assert not third.is_alive()
    assert ends.receive(3)[0].numpy().min() == 3.0


def test_a_result_is_not_written_over():
    ends = TwoEnds(np.zeros(LARGE, "float32"))
    results = []
    for run in range(1, 6):
        ends.send(run, np.full(LARGE, run, "float32"))
        results += ends.receive(run)
        ends.end_run()
    assert [float(tf.reduce_max(result)) for result in results] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [float(tf.reduce_min(result)) for result in results] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_who_waits_long_uses_hardly_any_processor_time():
    ends = TwoEnds(np.zeros(LARGE, "float32"))
    thread, _ = in_thread(ends.receive, 1)
    time.sleep(1.0)
    used = time.process_time()
    time.sleep(2.0)
    used = time.process_time() - used
    ends.send(1, np.ones(LARGE, "float32"))
    thread.join(60)
    assert not thread.is_alive()
    assert used < 0.1


def test_who_asks_beside_one_who_has_waited_long_is_looked_for_as_often_as_alone():
    ends = TwoEnds(np.zeros([2], "float32"), np.zeros([3], "float32"))
    (inbox,) = (each.arrivals for each in ends.transports[1]._inboxes.values())
    with inbox._changed:  # so that the thread does not look
        inbox._ask(0, 1)
        alone = inbox._sleep()
        inbox._asked[0] = inbox._asked[0]._replace(moment=time.monotonic() - 5.0)
        late = inbox._sleep()
        inbox._ask(1, 1)
        beside = inbox._sleep()
        inbox._asked.clear()
    assert alone < late / 10
    assert beside < late / 10


def test_the_thread_of_an_inbox_ends_with_its_graph():
    before = set(threading.enumerate())
    ends = TwoEnds(np.zeros([2], "float32"))
    (thread,) = [t for t in set(threading.enumerate()) - before if t.name == "opensmp-inbox"]
    ends.send(1, np.ones([2], "float32"))
    np.testing.assert_array_equal(ends.receive(1)[0], np.ones([2]))
    assert thread.is_alive()
    del ends
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


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

from opensmp.distributed.transport import shared_memory_transport as shared_transport
puts, put = [], shared_transport.Outbox.put
def counted(self, *args):
    puts.append(args)
    return put(self, *args)
shared_transport.Outbox.put = counted

expected = train("collective", "interleaved")
assert not puts
for pipeline in ("interleaved", "simple", "zero_bubble"):
    before = len(puts)
    assert train("auto", pipeline) == expected, pipeline
    assert len(puts) > before + 10, pipeline
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
print(float(tf.reduce_max(forward(tf.ones([4, 4])).merge())), flush=True)
"""


def test_a_step_that_fails_while_another_waits_fails_in_both_ranks_and_runs_again():
    for result in check_ranks(INTERRUPTED, 2):
        assert result.lines == ["4.0", "True", "4.0"]


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
sent = [op for op in graph.get_operations() if op.type == "InplaceUpdate"]
print(len(sent))
"""


def test_words_about_the_order_are_sent_in_each_step():
    # Three of eight microbatches are in flight. Without backward passes nothing but a word tells
    # the first partition that the second one has ended with a microbatch.
    # TensorFlow may send a constant while it optimises the graph, and never again: the second run
    # would wait for ever.
    first, second = check_ranks(BOUNDED, 2)
    # A tensor and its number for each microbatch; five times nothing but a number. The first rank
    # writes in place that it has heard of these, which the optimizer would remove otherwise.
    assert first.lines[-2:] == ["64.0", "21"]
    assert second.lines[-2:] == ["64.0", "21"]


def test_an_interrupted_run_fails_and_the_next_one_after_a_restart_gets_its_own_tensor():
    ends = TwoEnds(np.ones([2, 3], np.float32))

    def fails():
        with pytest.raises(tf.errors.OpError):
            ends.receive(1)
        return True

    thread, failed = in_thread(fails)
    time.sleep(0.3)
    ends.transports[1].interrupt()
    thread.join(60)
    assert failed == [True]
    with pytest.raises(tf.errors.OpError):  # also what begins to wait later
        ends.receive(1)
    for process in (0, 1):
        ends.transports[process].restart(1 << 32)
    for run in (1, 2, 3):
        value = np.full([2, 3], run, np.float32)
        thread, received = in_thread(ends.receive, (1 << 32) + run)
        ends.send((1 << 32) + run, value)
        thread.join(60)
        np.testing.assert_array_equal(received[0][0], value)
        ends.end_run()


def test_a_sender_that_waits_for_room_is_interrupted():
    ends = TwoEnds(np.ones([2], np.float32))
    sender = ends.transports[0]

    def waits():
        with pytest.raises(CommunicationError):
            sender.begin_run(5)
        return True

    thread, failed = in_thread(waits)
    time.sleep(0.2)
    sender.interrupt()
    thread.join(60)
    assert failed == [True]
    sender.restart(1 << 32)
    ends.transports[1].restart(1 << 32)
    sender.begin_run((1 << 32) + 1)  # at once
