from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from pretrained.sources import HEAD_BYTES, WAYS, X, Y, from_file, functional, pretrained
from processes import check_ranks
from turns import day

import opensmp as smp

TWO = {"partitions": 2, "microbatches": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pretrained")


def compiled(model):
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def trained(model, epochs=2):
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model


def assert_alike(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


SOURCES = ["keras", "h5", "saved_model"]
TODAY = day()


@pytest.mark.parametrize(("number", "way"), list(enumerate(WAYS)))
def test_today_it_is_used_in_every_way(smp_init, folder, number, way):
    check(smp_init, folder, way, SOURCES[(TODAY + number) % len(SOURCES)])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_way_of_using_it_is_cut_inside_and_trains_as_plain_keras(
    smp_init, folder, way, source
):
    check(smp_init, folder, way, source)


def check(smp_init, folder, way, source):
    smp_init({**TWO, "microbatches": 1})
    plain = compiled(WAYS[way](from_file(folder, source)))
    model = smp.DistributedModel.from_keras(compiled(WAYS[way](from_file(folder, source))))
    np.testing.assert_allclose(model(X), plain(X), rtol=1e-5, atol=1e-6)
    # Whatever is not the head is of the pretrained model: each partition has a part of it.
    assert all(row.parameter_bytes > HEAD_BYTES for row in model.plan.rows)
    trained(model)
    trained(plain)
    assert_alike(model.weights, plain.weights)
    np.testing.assert_allclose(model(X), plain(X), rtol=1e-4, atol=1e-5)


class TestFrozen:
    """What is frozen costs its forward pass and its weights, nothing else."""

    def made(self, layers=None):
        model = pretrained()
        if layers is None:
            model.trainable = False
        else:
            for name in layers:
                model.get_layer(name).trainable = False
        return compiled(functional(model))

    def test_weights_statistics_and_training_are_those_of_plain_keras(self, smp_init):
        smp_init({**TWO, "microbatches": 1})
        for layers in (None, ["one", "norm"], ["norm", "three"]):
            plain = self.made(layers)
            model = smp.DistributedModel.from_keras(self.made(layers))
            before = [np.asarray(v) for v in model.non_trainable_weights]
            trained(model)
            trained(plain)
            assert_alike(model.weights, plain.weights)
            for value, variable in zip(before, model.non_trainable_weights, strict=True):
                np.testing.assert_array_equal(value, variable)  # moving statistics among them

    def test_batch_normalization_stays_in_inference_mode(self, smp_init):
        smp_init(TWO)
        model = smp.DistributedModel.from_keras(self.made())

        @smp.step
        def forward(x):
            return model(x, training=True)

        np.testing.assert_allclose(forward(X).concat(), model(X), rtol=1e-5, atol=1e-6)

    def test_there_is_no_backward_pass_no_residual_and_no_slot(self, smp_init):
        smp_init(TWO)
        calls = {}
        for frozen in (False, True):
            base = pretrained()
            base.trainable = not frozen
            model = smp.DistributedModel.from_keras(compiled(functional(base)))

            @smp.step
            def backward(x, y, model=model):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
                return tape.gradient(loss, model.trainable_variables)

            x, y = tf.constant(X), tf.constant(Y)
            model(x)  # planned for training, whatever runs first
            graph = backward.get_concrete_function(x, y).graph
            calls[frozen] = {
                op.name.rsplit("smp_", 1)[1]: len(op.outputs)
                for op in graph.get_operations()
                if op.type == "PartitionedCall"
            }
        first = [name for name in calls[True] if name.startswith("0B")]
        assert first == []
        assert [name for name in calls[False] if name.startswith("0B")]
        assert calls[True]["0F0"] < calls[False]["0F0"]  # its outputs alone
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
        assert len(optimizer.variables) == 2 + 2 * 2  # two moments of the head's two weights
        head_device = model.get_layer("head").kernel.value.device
        assert {v.value.device for v in optimizer.variables[2:]} == {head_device}

    def test_the_planner_knows(self, smp_init):
        smp_init(TWO)
        model = smp.DistributedModel.from_keras(self.made())
        model(X)
        first = model.plan.rows[0]
        assert first.backward_seconds == 0
        assert first.backward_flops == 0
        assert first.state_bytes == 0
        last = model.plan.rows[1]
        assert last.backward_seconds > 0
        # Gradient and two moments of the head, nothing for the frozen layers beside it.
        assert last.state_bytes == 3 * HEAD_BYTES


def test_outputs_of_any_length_go_into_an_lstm(smp_init):
    smp_init(TWO)

    def base():
        keras.utils.set_random_seed(3)
        words = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(11, 8)(words)
        return keras.Model(words, keras.layers.Conv1D(8, 3, padding="same")(x))

    def outer(kind):
        class Outer(kind):
            def __init__(self):
                super().__init__()
                self.pretrained = base()
                self.pretrained.trainable = False
                keras.utils.set_random_seed(4)
                self.lstm = keras.layers.LSTM(6)
                self.dense = keras.layers.Dense(1)

            def call(self, words):
                return self.dense(self.lstm(self.pretrained(words)))

        return Outer()

    plain, model = outer(keras.Model), outer(smp.DistributedModel)
    rng = np.random.default_rng(0)
    for length in (4, 9, 4):
        words = rng.integers(0, 11, (4, length)).astype("int32")
        plain(words)
        model(words)
        for each in (model, plain):
            if not each.compiled:
                each.compile("sgd", "mse")
            each.train_on_batch(words, np.ones((4, 1), "float32"))
        np.testing.assert_allclose(model(words), plain(words), rtol=1e-4, atol=1e-6)
        assert_alike(model.trainable_weights, plain.trainable_weights)


SCRIPT = """
import hashlib
import keras, numpy as np
import opensmp as smp
from pretrained.sources import X, functional, pretrained

smp.init({"partitions": 1, "microbatches": 1})
base = pretrained()
if smp.rank():  # a worker whose copy is another one
    base.set_weights([weight + 1 for weight in base.get_weights()])
base.trainable = False
model = smp.DistributedModel.from_keras(functional(base))
model(X)
found = hashlib.sha256(b"".join(np.asarray(v).tobytes() for v in model.weights)).hexdigest()
digests = smp.allgather(found, smp.WORLD)
print(len(set(digests)), smp.dp_size())
"""


def test_all_workers_have_the_same_pretrained_weights():
    for result in check_ranks(SCRIPT, 2):
        assert result.lines[-1] == "1 2"
