"""Layers of a split model in other models: the numbers of plain Keras, wherever they lie."""

from __future__ import annotations

import pathlib

import keras
import numpy as np
import pytest
from parity.rotation import part_of_today
from processes import check_ranks
from training.reused import PROGRAMS, body, check, compiled, data, fit
from turns import in_turn

import opensmp as smp

SCRIPT = str(pathlib.Path(__file__).with_name("reused.py"))

# Number of processes, partitions.
WORLDS = {"pipeline": (2, 2), "hybrid": (4, 2)}

TODAY = {"pipeline": ["head", "configured_again", "quantized"], "hybrid": ["chain"]}
"""What runs every day in several processes, with one program more, another every day."""

NUM_ALONE = 3


def check_world(world: str, names: list[str]) -> None:
    processes, partitions = WORLDS[world]
    config = {"partitions": partitions, "microbatches": 2}
    for result in check_ranks(SCRIPT, processes, config, args=names, seconds=600):
        done = [line for line in result.lines if line.endswith(" equal")]
        assert done == [f"{name} equal" for name in names]


@pytest.mark.parametrize("world", in_turn(WORLDS, len(WORLDS)))
def test_several_processes_give_the_numbers_of_plain_keras(world):
    others = [(name, world) for name in PROGRAMS if name not in TODAY[world]]
    check_world(world, [*TODAY[world], *(name for name, _ in part_of_today(others, 1))])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_several_processes_give_the_numbers_of_plain_keras_in_all_programs(world):
    check_world(world, list(PROGRAMS))


@pytest.mark.parametrize("name", part_of_today(list(PROGRAMS), NUM_ALONE))
def test_todays_programs_give_the_numbers_of_plain_keras(name):
    smp.init({"partitions": 2, "microbatches": 2})
    check(PROGRAMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_gives_the_numbers_of_plain_keras(name):
    smp.init({"partitions": 2, "microbatches": 2})
    check(PROGRAMS[name])


def test_a_plain_base_that_has_run_sees_what_a_split_model_has_trained():
    smp.init({"partitions": 2, "microbatches": 2})
    base = compiled(body())
    fit(base)
    base.predict(data(), verbose=0)
    outputs = keras.layers.Dense(2)(base.get_layer("h3").output)
    fit(compiled(smp.DistributedModel.from_keras(keras.Model(base.input, outputs))))
    np.testing.assert_allclose(base.predict(data(), verbose=0), base(data()), 1e-6, 1e-6)


REFUSED = """
import keras, numpy as np, pytest, tensorflow as tf
import opensmp as smp
from opensmp.errors import ElsewhereError, StepError
smp.init()
from training.reused import body, trained, data, pictures, images, heat, state
base = trained(smp.DistributedModel.from_keras)
part = keras.Model(base.input, [base.get_layer("h3").output, base.output], name="part")
part.compile("sgd", "mse")
before = [np.array(w) for w in base.get_weights()]
for run in (
    lambda: part(tf.constant(data())),
    lambda: part.predict(data(), verbose=0),
    lambda: part.evaluate(data(), verbose=0),
    lambda: part.fit(data(), [data(), data()], verbose=0),
    lambda: part.quantize("int8"),
):
    with pytest.raises(ElsewhereError) as found:
        run()
    for text in ("of rank", "smp.DistributedModel.from_keras("):
        assert text in str(found.value), found.value
    print(found.value, flush=True)
with pytest.raises(StepError, match="gptq.*to_keras.*Nothing was changed"):
    base.quantize("gptq")
for one, other in zip(before, base.get_weights(), strict=True):
    np.testing.assert_array_equal(one, other)

part = smp.DistributedModel.from_keras(part)
with tf.GradientTape() as tape, pytest.raises(StepError, match="smp.step"):
    part(tf.constant(data()))

class Container(keras.Model):  # what it calls is split, it is not
    def __init__(self):
        super().__init__()
        self.inner = base

    def call(self, x):
        return self.inner(x)

found = Container().predict(data(), verbose=0)
np.testing.assert_array_equal(found, base.predict(data(), verbose=0))

class Cam(keras.Model):
    def __init__(self):
        super().__init__()
        self.part = part

    def call(self, x):
        return self.part(x)

    def train_step(self, x):
        heat(self, x)
        return {}

cam = smp.DistributedModel.from_keras(Cam())
cam.compile("sgd")
with pytest.raises(StepError, match="with respect to an output.*smp.step"):
    cam.fit(data(), batch_size=4, verbose=0)
print("refused", flush=True)
"""


def test_what_cannot_run_is_refused_by_name_before_anything_is_changed():
    for result in check_ranks(REFUSED, 2, {"partitions": 2, "microbatches": 2}):
        assert result.lines[-1] == "refused"
