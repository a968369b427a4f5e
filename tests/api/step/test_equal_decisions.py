"""What the ranks of a replica see of a loss or a metric are the same bits."""

from __future__ import annotations

import pytest
from processes import check_ranks

SCRIPT = """
import sys
import keras
import numpy as np
import opensmp as smp
import tensorflow as tf

rng = np.random.RandomState(0)
x, y = rng.randn(96, 8).astype("float32"), rng.randint(0, 5, 96)
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

class Net(smp.DistributedModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = [keras.layers.Dense(32, "tanh") for _ in range(2)]
        self.last = [keras.layers.Dense(5)]
    def call(self, x, training=False):
        for number, layers in enumerate((self.first, self.last)):
            with smp.partition(number):
                for layer in layers:
                    x = layer(x)
        return x

class OwnLoss(Net):  # computed from the outputs of the whole batch
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return loss_of(y, y_pred) + 0.1 * tf.reduce_mean(y_pred ** 2)

def seen(value):
    return np.asarray(value).tobytes().hex()

def loop(steps):
    model, optimizer = Net(), keras.optimizers.Adam(0.01)

    @smp.step
    def step(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = loss_of(y, logits)
        return loss, logits, tape.gradient(loss, model.trainable_variables)

    def train(x, y):
        loss, logits, grads = step(x, y)
        grads = [g.accumulate() for g in grads]
        optimizer.apply_gradients(zip(grads, model.trainable_variables))
        return {
            "mean": loss.reduce_mean(), "sum": loss.reduce_sum(), "accumulated": loss.accumulate(),
            "add_n": loss.accumulate("add_n"), "accumulate_n": loss.accumulate("accumulate_n"),
            "stack": tf.reduce_mean(loss.stack()),
            "merge": tf.reduce_mean(logits.merge() ** 2), "logits": logits.reduce_mean(),
        }

    traced = tf.function(train)
    for number in range(steps):
        for name, value in traced(tf.constant(x), tf.constant(y)).items():
            yield f"step {number} {name}", seen(value)
    loss, logits, _ = step(tf.constant(x), tf.constant(y))
    yield "eager", seen(loss.reduce_mean())
    yield "eager merge", seen(logits.merge())

def fit(kind):
    model = kind()
    model.compile(
        keras.optimizers.Adam(0.01), loss_of,
        metrics=["accuracy", keras.metrics.SparseCategoricalCrossentropy(from_logits=True)],
    )
    history = model.fit(x, y, batch_size=48, epochs=5, verbose=0, validation_data=(x, y))
    for name, values in history.history.items():
        yield f"{kind.__name__} {name}", [float(value).hex() for value in values]
    for how in (model.train_on_batch, model.test_on_batch):
        for name, value in how(x, y, return_dict=True).items():
            yield f"{kind.__name__} {how.__name__} {name}", float(value).hex()

transport = sys.argv[1]
for microbatches in (3, 4, 16):
    smp.init({
        "partitions": 2, "microbatches": microbatches, "transport": transport,
        "auto_partition": False, "default_partition": 0,
    })
    keras.utils.set_random_seed(1)
    kinds = {3: [], 4: [OwnLoss], 16: [Net]}
    own = dict([*loop(6), *(seen for kind in kinds[microbatches] for seen in fit(kind))])
    first, *others = smp.allgather(own, smp.MP_GROUP)
    assert len(first) > 40
    for other in others:
        different = [name for name in first if first[name] != other[name]]
        assert not different, (microbatches, different)
    smp.shutdown()
print("equal", flush=True)
"""


@pytest.mark.parametrize("transport", ["auto", "collective"])
def test_ranks_of_a_replica_see_the_same_bits(transport):
    results = check_ranks(SCRIPT, 2, args=[transport])
    assert [result.lines[-1] for result in results] == ["equal", "equal"]
