"""What a model keeps from batch to batch where several replicas each have a part of them."""

from __future__ import annotations

import pytest
from processes import check_ranks, run_ranks

SCRIPT = """
import logging, sys
import keras, numpy as np, tensorflow as tf
import opensmp as smp

smp.init()
keras.utils.set_random_seed(1)
x = np.random.default_rng(0).normal(size=(12, 4)) * 3.0
y = np.zeros((12, 2))
keras.config.set_floatx("float64")

def model(*middle):
    layers = [keras.Input((4,)), *middle, keras.layers.Dense(2)]
    split = smp.DistributedModel.from_keras(keras.Sequential(layers))
    split.compile(keras.optimizers.SGD(0.0), "mse", **dict(steps_per_execution=STEPS))
    return split
"""


@pytest.mark.parametrize("steps", [1, 2])
def test_statistics_of_batch_normalization_are_those_of_all_replicas(steps):
    script = (
        f"STEPS = {steps}\n"
        + SCRIPT
        + """
split = model(
    keras.layers.BatchNormalization(momentum=0.5, name="first"),
    keras.layers.Dense(3, name="middle"),
    keras.layers.BatchNormalization(momentum=0.5, name="second"),
    keras.layers.BatchNormalization(trainable=False, name="frozen"),
)
split.fit(x, y, batch_size=6, shuffle=False, verbose=0)
batches = x.reshape(2, 6, 4)
halves = batches.reshape(2, 2, 3, 4)
mean, variance = np.zeros(4), np.ones(4)
for batch, parts in zip(batches, halves):
    mean = 0.5 * mean + 0.5 * batch.mean(0)
    variance = 0.5 * variance + 0.5 * parts.var(1).mean(0)
weights = dict(zip([w.path for w in split.weights], split.get_weights()))
found = {path.split("/")[-2] + "/" + path.split("/")[-1]: value for path, value in weights.items()}
np.testing.assert_allclose(found["first/moving_mean"], mean, rtol=1e-12)
np.testing.assert_allclose(found["first/moving_variance"], variance, rtol=1e-12)
assert abs(found["second/moving_mean"]).max() > 0
assert not found["frozen/moving_mean"].any()
scores = split.evaluate(x, y, verbose=0)
everything = smp.allgather((scores, split.get_weights()))
for other in everything:
    np.testing.assert_equal(other, everything[0])
"""
    )
    check_ranks(script, 4, {"partitions": 2, "microbatches": 1})


def test_what_a_layer_assigns_in_its_call_is_told_in_replicas():
    script = (
        "STEPS = 1\n"
        + SCRIPT
        + """
class Codebook(keras.layers.Layer):
    def build(self, shape):
        self.codes = self.add_weight(shape=(shape[-1],), trainable=False, name="codes")

    def call(self, x):
        self.codes.assign(0.9 * self.codes + 0.1 * keras.ops.mean(x, 0))
        return x + self.codes

split = model(Codebook(name="quantizer"))
split(x)
print("A CALL ALONE IS TOLD NOTHING", file=sys.stderr, flush=True)
split.fit(x, y, batch_size=6, shuffle=False, verbose=0)
"""
    )
    (result, *_) = run_ranks(script, 2, {"partitions": 1, "microbatches": 1})
    assert result.code == 0, result.output
    before, _, after = result.output.partition("A CALL ALONE IS TOLD NOTHING")
    assert "codes'" not in before
    assert "a batch is divided among 2 replicas" in after
    assert "/quantizer/codes' is assigned once per microbatch" in after
    assert "use as many processes as partitions, or change" in after


def test_a_model_for_the_rows_of_a_batch_is_told_those_of_a_replica():
    script = (
        "STEPS = 1\n"
        + SCRIPT
        + """
inputs = keras.Input(batch_shape=(12, 4))
reshaped = keras.layers.Lambda(lambda x: tf.reshape(x, (12, 4)), output_shape=(4,))(inputs)
split = smp.DistributedModel.from_keras(keras.Model(inputs, keras.layers.Dense(2)(reshaped)))
split.compile("sgd", "mse")
try:
    split.fit(x, y, batch_size=12, verbose=0)
except smp.StepError as error:
    assert "which has 6 rows: a batch is divided among 2 replicas. Expected" in str(error), error
else:
    raise AssertionError("it was not refused")
"""
    )
    check_ranks(script, 2, {"partitions": 1, "microbatches": 1})
