"""Training programs that read weights and gradients of other ranks, by the numbers of Keras."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import check_ranks, run_ranks

PROGRAMS = Path(__file__).with_name("reads.py")

PREPARE = """
import keras, numpy as np, tensorflow as tf
import opensmp as smp
from opensmp.errors import ElsewhereError
smp.init()
keras.utils.set_random_seed(1)
layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dense(4)]
model = smp.DistributedModel.from_keras(keras.Sequential([keras.Input((6,)), *layers]))
model.compile("sgd", "mse")
x, y = np.ones((8, 6), "float32"), np.ones((8, 4), "float32")
model.fit(x, y, batch_size=8, verbose=0)
away = [v for v in model.weights if smp._private.is_elsewhere(v)]
assert len(away) == 2
"""


@pytest.mark.parametrize("n", [2, 4])
def test_programs_give_the_numbers_of_keras(n):
    check_ranks(str(PROGRAMS), n, {"partitions": 2, "microbatches": 2})


def test_what_cannot_be_fetched_is_an_error():
    script = (
        PREPARE
        + """
norm = tf.function(lambda: tf.linalg.global_norm([v.value for v in model.weights]))
for read in (norm, lambda: 0.9 * away[0], lambda: away[0].numpy()):
    try:
        read()
    except ElsewhereError as error:
        assert f"rank {1 - smp.rank()}" in str(error), error
        assert "smp.local_variables" in str(error), error
    else:
        raise AssertionError("no error")

inner = tf.function(lambda: tf.reduce_sum(model.layers[0].kernel.value))

def loop(*_, v=None):
    def body(i):
        v.assign(v * 0.5)
        return i + 1
    return tf.while_loop(lambda i: i < 3, body, [0])[0]

def branch(v):
    def twice():
        v.assign(v * 0.5)
        return tf.reduce_sum(v.value)
    return tf.cond(tf.constant(True), twice, lambda: 0.0)

steps = {
    "the tf.function": inner,
    "a branch or a loop": lambda: loop(v=model.layers[0].kernel),
    "a branch or a loop that": lambda: branch(model.layers[0].kernel),
}
for text, read in steps.items():
    @tf.function
    def function():
        return model(x), read()

    try:
        function()
    except ElsewhereError as error:
        assert text in str(error) and "rank 0" in str(error), error
    else:
        raise AssertionError(text)
model.fit(x, y, batch_size=8, verbose=0)  # all ranks go on
"""
    )
    check_ranks(script, 2, {"partitions": 2, "microbatches": 2})


def test_ranks_that_read_other_things_are_told():
    script = (
        PREPARE
        + """
@tf.function
def function():
    kernel = model.layers[0].kernel  # of rank 0
    if smp.rank() == 0:
        tf.reduce_sum(kernel.value)
        return model(x), 0.0
    return model(x), [tf.reduce_sum(kernel.value + i) for i in range(3)]

try:
    function()
except smp.StepError as error:
    assert "Rank 1 needs a value of rank 0" in str(error), error
else:
    raise AssertionError("no error")

@tf.function
def own():  # that a rank reads its own weights alone is all right
    return model(x), tf.add_n([tf.norm(v.value) for v in smp.local_variables(model)])

own()
"""
    )
    check_ranks(script, 2, {"partitions": 2, "microbatches": 2})


def test_gradients_of_an_eager_step_are_not_taken_for_zeros():
    script = (
        PREPARE
        + """
@smp.step
def step(x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    return tape.gradient(loss, model.trainable_variables), loss

gradients, loss = step(tf.constant(x), tf.constant(y))
gradients = [g.accumulate() for g in gradients]
errors = 0
for gradient, variable in zip(gradients, model.trainable_variables):
    assert gradient.shape == variable.shape
    try:
        assert float(tf.norm(gradient)) > 0
    except ElsewhereError as error:
        assert f"rank {1 - smp.rank()} of the replica" in str(error), error
        errors += 1
assert errors == 2
model.optimizer.apply_gradients(zip([g / 2 for g in gradients], model.trainable_variables))
"""
    )
    check_ranks(script, 2, {"partitions": 2, "microbatches": 2})


def test_nothing_is_sent_that_nobody_reads():
    """A gradient that only flows into its own update, and what a rank computes itself."""
    script = (
        PREPARE
        + """
from opensmp.execution.multi_process import remote_transfers as fetching
sent = []
transfer = fetching._transfer
def noted(one, *rest):
    sent.append((one.dtype, one.shape))
    return transfer(one, *rest)
fetching._transfer = noted

class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.b = keras.layers.Dense(8), keras.layers.Dense(4)
        self.logs = False
    def call(self, x):
        return self.b(self.a(x))
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        weights = self.trainable_variables
        gradients = [g - tf.reduce_mean(g) for g in tape.gradient(loss, weights)]
        self.optimizer.apply_gradients(zip(gradients, weights))
        if not self.logs:
            return {"loss": loss}
        norm = tf.linalg.global_norm([v.value for v in weights])
        return {"loss": loss, "norm": norm}

model = smp.DistributedModel.from_keras(Own())
model.compile("sgd")
model.fit(x, y, batch_size=8, verbose=0)
assert sent == [], sent
model.logs = True
model.make_train_function(force=True)
model.fit(x, y, batch_size=8, verbose=0)
assert len(sent) == 4 and set(sent) == {("float32", ())}, sent
"""
    )
    check_ranks(script, 2, {"partitions": 2, "microbatches": 2})


def test_a_read_of_one_rank_alone_ends_in_an_error_and_not_in_waiting():
    results = run_ranks(
        PREPARE
        + """
if smp.rank() == 0:
    tf.function(lambda: tf.add_n([tf.norm(v.value) for v in model.weights]))()
smp.barrier()
""",
        2,
        {"partitions": 2, "microbatches": 2},
    )
    assert results[0].code == 1
    assert "ElsewhereError" in results[0].output
