from __future__ import annotations

import ast

import keras
import numpy as np
import tensorflow as tf
from processes import check_ranks
from saving.sample_models import X

SCRIPT = """
import os, sys
import keras, numpy as np, tensorflow as tf
import opensmp as smp
from opensmp import _private
from opensmp.errors import SavingError
from saving.sample_models import X, functional

smp.init({"partitions": 2, "microbatches": 2})
folder = sys.argv[1]
model = smp.DistributedModel.from_keras(functional())
expected = np.asarray(model(X))
own = [not _private.is_elsewhere(v) for v in model.variables]
assert not all(own), own
model.save(folder + "/model.keras")
model.save_weights(folder + "/model.weights.h5")
model.save_model(folder + "/served")
plain = model.to_keras()
assert not isinstance(plain, smp.DistributedModel)
np.testing.assert_allclose(plain(X), expected, rtol=1e-5, atol=1e-6)
assert own == [not _private.is_elsewhere(v) for v in model.variables]
try:
    model.save(folder + "/served/saved_model.pb/model.keras")
except SavingError as error:
    print("refused:", str(error).splitlines()[0])
for variable, here in zip(model.variables, own):
    if here:
        variable.assign(tf.zeros_like(variable.value))
model.load_weights(folder + "/model.weights.h5")
np.testing.assert_allclose(np.asarray(model(X)), expected, rtol=1e-6, atol=1e-6)
if smp.rank() == 0:
    np.save(folder + "/expected.npy", expected)
"""


def test_several_processes_write_one_whole_model(tmp_path):
    results = check_ranks(SCRIPT, 2, args=[tmp_path])
    expected = np.load(tmp_path / "expected.npy")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(X), expected, rtol=1e-5, atol=1e-6)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(X), expected, rtol=1e-5, atol=1e-6)
    for file in (tmp_path / "served").rglob("*"):
        assert not file.is_file() or b"opensmp" not in file.read_bytes()
    for result in results:  # both ranks are told
        assert "refused:" in result.output
        assert "could not be written" in result.output


OUTSIDE = """
import os, sys
import keras, numpy as np, tensorflow as tf
import opensmp as smp
from opensmp import _private
from opensmp.saving.gather import gathered, state_of

smp.init({"partitions": 2, "microbatches": 1})
keras.utils.set_random_seed(3)
generator = keras.random.SeedGenerator(5)
scale = keras.Variable(1.0, trainable=False)
count = tf.Variable(0.0, trainable=False)
keras.random.normal((1,))  # now Keras' own generator is there, before any layer uses it

class Draw(keras.layers.Layer):
    def call(self, x):
        count.assign_add(1.0)
        scale.assign(scale * 2)
        noise = keras.random.normal((1, 1)) + keras.random.normal((1, 1), seed=STATE[0])
        return scale * x + noise

STATE = [generator]
inputs = keras.Input((4,))
x = keras.layers.Dense(4)(inputs)
with smp.partition(1):
    x = Draw()(x)
    outputs = keras.layers.Dense(2)(x)
model = smp.DistributedModel.from_keras(keras.Model(inputs, outputs))
run = smp.step(lambda x: tf.reduce_mean(model(x, training=True)))
for _ in range(3):
    run(tf.ones([4, 4]))

more = {"scale": scale, "count": count, "seed": generator.state}
manager = smp.CheckpointManager(tf.train.Checkpoint(model=model, **more), sys.argv[1])
path = manager.save()
own = _private.global_seed_state()
with gathered([*state_of(model), scale]) as reads_all:
    found = [np.asarray(own).tolist(), float(scale.numpy())] if reads_all else None
seen = [found, None if reads_all else [np.asarray(own).tolist(), float(scale.numpy())]]
scale.assign(0.0)
generator.state.assign([0, 0])
manager.restore()
print([smp.allgather(seen), [float(scale.numpy()), np.asarray(generator.state).tolist()]])
"""


def test_of_state_that_no_layer_has_the_value_of_the_rank_that_changes_it_is_saved(tmp_path):
    results = check_ranks(OUTSIDE, 2, args=[tmp_path])
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(tmp_path))
    saved = {
        name: reader.get_tensor(f"{name}/.ATTRIBUTES/VARIABLE_VALUE").tolist()
        for name in ("scale", "count", "seed")
    }
    assert saved == {"scale": 8.0, "count": 3.0, "seed": [5, 3]}
    for result in results:
        both, restored = ast.literal_eval(result.lines[-1])
        (gathered, _), (_, of_rank_1) = both
        assert gathered == of_rank_1
        assert gathered[1] == 8.0
        assert restored == [8.0, [5, 3]]
