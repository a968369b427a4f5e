from __future__ import annotations

import keras
import tensorflow as tf

from opensmp.saving.checkpoint.restoring.object_matching import Stored, difference, match
from opensmp.saving.checkpoint.restoring.reader import Files

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


class Two(keras.Model):
    def __init__(self, units=3, extra=False):
        super().__init__()
        self.a = keras.layers.Dense(4, name="a")
        self.b = keras.layers.Dense(units, name="b")
        if extra:
            self.c = keras.layers.Dense(1, name="c")

    def call(self, x):
        return [layer(x) for layer in (self.a, self.b, getattr(self, "c", self.b))]


def made(build=True, **kwargs):
    model = Two(**kwargs)
    optimizer = keras.optimizers.Adam()
    if build:
        model(tf.zeros([1, 5]))
        optimizer.build(model.trainable_variables)
    return tf.train.Checkpoint(model=model, optimizer=optimizer), model


def matching(checkpoint, path, model=None):
    files = Files(path)
    return match(checkpoint, files.object_graph, files.stored, model)


def saved(tmp_path, **kwargs):
    checkpoint, _ = made(**kwargs)
    return checkpoint.write(str(tmp_path / "c"))


def test_equal_objects_match_value_by_value(tmp_path):
    checkpoint, model = made()
    found = matching(checkpoint, saved(tmp_path))
    owners = dict(found.matches)
    assert owners[f"model/b/_kernel{VALUE}"] is model.b.kernel
    assert owners[f"optimizer/_iterations{VALUE}"] is checkpoint.optimizer.iterations
    assert found.fault(partial=False) is None
    assert (found.different, found.missing, found.unused, found.waiting) == ((),) * 4


def test_other_shapes_are_a_fault_also_of_a_partial_restore(tmp_path):
    checkpoint, _ = made(units=2)
    found = matching(checkpoint, saved(tmp_path))
    assert len(found.different) == 2 + 4  # kernel and bias, with two slots each
    assert "(5, 3) float32 in the checkpoint, (5, 2) float32 in" in found.fault(partial=True)


def test_variables_and_values_without_each_other_are_faults_unless_partial(tmp_path):
    small, large = saved(tmp_path), saved(tmp_path / "large", extra=True)
    found = matching(made(extra=True)[0], small)
    assert [line.partition(":")[0] for line in found.missing][:2] == [
        "model/c/_kernel",
        "model/c/bias",
    ]
    assert "are not in the checkpoint" in found.fault(partial=False)
    assert found.fault(partial=True) is None
    found = matching(made()[0], large)
    assert f"model/c/_kernel{VALUE} with shape (5, 1)" in found.unused
    assert found.fault(partial=True) is None


def test_values_wait_for_what_is_not_built(tmp_path):
    checkpoint, model = made(build=False)
    found = matching(checkpoint, saved(tmp_path))
    assert f"model/b/_kernel{VALUE}" in found.waiting
    assert found.hopeful
    assert found.fault(partial=False) is None
    model(tf.zeros([1, 5]))  # now the optimizer alone waits
    found = matching(checkpoint, saved(tmp_path))
    assert all(key.startswith("optimizer/") for key in found.waiting)
    assert not found.hopeful


def test_a_model_that_has_just_been_made_waits_for_nothing(tmp_path):
    large = saved(tmp_path, extra=True)
    checkpoint, model = made(build=False)
    for layer in (model.a, model.b):
        layer.build((1, 5))
    assert matching(checkpoint, large).fault(partial=False) is None
    fault = matching(checkpoint, large, model).fault(partial=False)
    assert f"model/c/_kernel{VALUE} with shape (5, 1)" in fault


def test_a_difference_shows_both_shapes_and_types():
    variable = keras.Variable([1.0, 2.0], name="v")
    assert difference(variable, Stored((2,), tf.float32)) is None
    text = difference(variable, Stored((2,), tf.float16))
    assert text == "(2,) float16 in the checkpoint, (2,) float32 in v"
    any_length = tf.Variable([1.0], shape=[None])
    assert difference(any_length, Stored((7,), tf.float32)) is None
