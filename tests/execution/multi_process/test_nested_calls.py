"""Functions that partitions run in one thread, and that wait for functions that they call."""

from __future__ import annotations

from helpers import output_of
from processes import check_ranks

OWN_STEP = """
import keras, numpy as np, tensorflow as tf
import opensmp as smp

smp.init({"partitions": 2, "microbatches": 4, "check_finite": True})
keras.utils.set_random_seed(0)

class OwnStep(smp.DistributedModel):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x, training=None):
        return self.inner(x, training=training)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"own": loss}

x = inputs = keras.Input((8,))
x = keras.layers.BatchNormalization()(keras.layers.Dense(16)(x))
x = keras.layers.Dense(3)(keras.layers.Dense(16)(x))
model = OwnStep(keras.Model(inputs, x))
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
random = np.random.default_rng(0)
x, y = random.normal(size=(32, 8)).astype("float32"), random.integers(0, 3, 32)
losses = model.fit(x, y, batch_size=8, epochs=10, shuffle=False, verbose=0).history["own"]
assert losses[0] > losses[-1] > 0, losses
print("TRAINED", flush=True)
"""

PARTITIONS_OF_ONE_PROCESS = """
import tensorflow as tf
from opensmp.compiler.lowering.finite_flags import finite_flags
from opensmp.distributed import devices
from opensmp.distributed.world import World
from opensmp.config import Config
from opensmp.compiler.schedule.actions import Action
from opensmp.execution.emission.emitted_calls import EmittedCalls

names = ("/device:CPU:0", "/device:CPU:1")
devices.prepare(names, nests={nests})
nested = devices.nested_calls(names)
assert nested == {nested}, nested
world = World(Config(partitions=2), names, one_core_each=True, nested_calls=nested)

def body(x):
    tensors = [tf.tanh(x @ (x + i)) for i in range(8)]
    return tf.add_n(tensors) / 100.0, finite_flags(tensors)

unit = {{"_noinline": True}}
call = tf.function(body, autograph=False, experimental_attributes=unit)
call = call.get_concrete_function(tf.TensorSpec([64, 64]))

@tf.function(autograph=False)
def step(x):
    emitted, sums = EmittedCalls(world, 50, None), []
    for partition in range(2):
        y = x + float(partition)
        for microbatch in range(50):
            action = Action("F", partition, microbatch)
            y, flags = emitted.emit(action, partition, call, [y])
            y += tf.cast(tf.reduce_all(flags), tf.float32) * 0.0
        sums.append(y)
    return tf.add_n(sums)

for _ in range(40):
    found = step(tf.ones([64, 64]))
print("DONE", bool(tf.reduce_all(tf.math.is_finite(found))))
"""


def test_checks_in_passes_that_call_a_pass_end_in_two_ranks():
    for result in check_ranks(OWN_STEP, 2, seconds=300):
        assert "TRAINED" in result.output


def test_two_partitions_of_a_process_do_not_take_each_others_last_thread():
    for nests, nested in ((False, 0), (True, 1)):
        script = PARTITIONS_OF_ONE_PROCESS.format(nests=nests, nested=nested)
        threads = {"TF_NUM_INTRAOP_THREADS": "1"}
        assert "DONE True" in output_of(script, env=threads, timeout=300)
