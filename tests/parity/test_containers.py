"""Models whose steps call their parts, over several processes, against plain Keras."""

from __future__ import annotations

import pytest
from processes import check_ranks
from turns import in_turn

SCRIPT = """
import logging, sys
import keras, numpy as np, tensorflow as tf
import opensmp as smp
from opensmp import _private
smp.init()
from training import containers

def plain(model):
    return model

made = []

def split(model):
    made.append(smp.DistributedModel.from_keras(model))
    return made[-1]

for name in sys.argv[1:]:
    program = containers.PROGRAMS[name]
    wanted = program(plain)
    containers.assert_same(program(split), wanted)
    elsewhere = [_private.is_elsewhere(weight) for weight in made[-1].weights]
    assert any(elsewhere) and not all(elsewhere), (name, elsewhere)
    print("equal", name, flush=True)
"""

FILES = """
import sys
from pathlib import Path
import keras, numpy as np, tensorflow as tf
import opensmp as smp
smp.init()
from training import containers
from training.containers import ROWS, assert_same, data
folder = Path(sys.argv[1])

def made():
    keras.utils.set_random_seed(1)
    model = smp.DistributedModel.from_keras(containers.Gan())
    optimizers = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01)
    model.compile(*optimizers, keras.losses.BinaryCrossentropy(from_logits=True))
    model.built = True
    return model

def train(model):
    model.fit(data(), batch_size=ROWS, shuffle=False, verbose=0)
    return {"weights": model.get_weights()}

model = made()
first = train(model)
model.save(folder / "gan.keras")
model.generator.save(folder / "generator.keras")
model.save_weights(folder / "gan.weights.h5")
manager = smp.CheckpointManager(
    tf.train.Checkpoint(model=model, d=model.d_optimizer, g=model.g_optimizer), folder / "kept"
)
manager.save()
second = train(model)
manager.restore()
assert_same({"weights": model.get_weights()}, first)
assert_same(train(model), second)  # the optimizers went on as well
model.load_weights(folder / "gan.weights.h5")
assert_same({"weights": model.get_weights()}, first)

one = keras.saving.load_model(folder / "gan.keras", custom_objects={"Gan": containers.Gan})
assert_same({"weights": [weight.numpy() for weight in one.weights]}, first)
generator = keras.saving.load_model(folder / "generator.keras")
assert type(generator).__name__ == "Functional"
made_of = model.generator.predict(data(3), verbose=0)
np.testing.assert_allclose(generator(data(3)), made_of, rtol=1e-5, atol=1e-6)
copied = model.to_keras()
assert type(copied.generator) is type(generator), type(copied.generator)
np.testing.assert_allclose(copied.generator(data(3)), made_of, rtol=1e-5, atol=1e-6)

seen = []
class Look(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        seen.append(self.model.generator(data(3)).numpy())
        seen.append(self.model.generator.predict(data(3), verbose=0))

model.fit(data(), batch_size=ROWS, verbose=0, callbacks=[smp.OnRankZero(Look())])
after = model.generator.predict(data(3), verbose=0)
for each in seen:
    np.testing.assert_allclose(each, after, rtol=1e-5, atol=1e-6)
assert len(seen) == (2 if smp.rank() == 0 else 0)
print("files and callbacks are right")
"""

STRANGER = """
import keras, numpy as np
import opensmp as smp
smp.init()
from training import containers
from training.test_parts import Student

keras.utils.set_random_seed(smp.rank())
teacher = containers.block(6, 3, "teacher")
keras.utils.set_random_seed(0)
model = smp.DistributedModel.from_keras(Student(teacher))
model.compile()
model.fit(containers.data(), batch_size=containers.ROWS, verbose=0)
for weights in zip(*smp.allgather(teacher.get_weights(), smp.WORLD)):
    np.testing.assert_array_equal(weights[0], weights[1])
print("the same in all ranks")
"""

NAMES = ["vae", "gan", "contrastive", "vae_predicted_first", "distillation", "ensemble"]
CONFIG = {"partitions": 2, "microbatches": 2}


@pytest.mark.parametrize("name", in_turn(NAMES, 3))
def test_two_ranks_with_a_partition_each(name):
    for result in check_ranks(SCRIPT, 2, CONFIG, args=[name]):
        assert f"equal {name}" in result.output


@pytest.mark.parametrize("name", in_turn(["vae", "contrastive", "gan"], 3))
def test_two_replicas_of_two_ranks(name):
    for result in check_ranks(SCRIPT, 4, CONFIG, args=[name]):
        assert f"equal {name}" in result.output


def test_files_checkpoints_and_callbacks(tmp_path):
    for result in check_ranks(FILES, 2, CONFIG, args=[tmp_path]):
        assert "files and callbacks are right" in result.output


def test_a_model_that_nobody_holds_is_the_same_in_all_ranks():
    results = check_ranks(STRANGER, 2, CONFIG)
    for result in results:
        assert "the same in all ranks" in result.output
    assert "`teacher = smp.DistributedModel.from_keras(teacher)`" in results[0].output
