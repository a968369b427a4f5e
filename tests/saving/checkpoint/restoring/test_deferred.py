from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp


@pytest.fixture
def path(smp_init, tmp_path):
    smp_init({"partitions": 1})
    layer = keras.layers.Dense(3)
    layer.build((1, 4))
    layer.bias.assign([1.0, 2.0, 3.0])
    return smp.CheckpointManager(tf.train.Checkpoint(layer=layer), tmp_path).save()


def waiting(path, units=3, **kwargs):
    layer = keras.layers.Dense(units)
    checkpoint = tf.train.Checkpoint(layer=layer)
    smp.CheckpointManager(checkpoint, "unused").restore(path, **kwargs)
    return layer, checkpoint


def test_a_layer_gets_its_values_when_it_is_built(path):
    layer, _ = waiting(path)
    layer.build((1, 4))
    np.testing.assert_array_equal(layer.bias, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("partial", [False, True])
def test_another_shape_is_told_when_the_layer_is_built(path, partial):
    layer, _ = waiting(path, units=5, partial=partial)
    with pytest.raises(smp.CheckpointError, match=r"\(4, 3\) float32 in the checkpoint, \(4, 5\)"):
        layer.build((1, 4))


def test_an_earlier_restore_of_the_same_objects_is_forgotten(smp_init, path, tmp_path):
    inputs = keras.Input((4,))
    plain = keras.Sequential([inputs, keras.layers.Dense(5)])
    model = smp.DistributedModel.from_keras(plain)
    model(tf.zeros([1, 4]))
    fits = smp.CheckpointManager(tf.train.Checkpoint(layer=model.layers[-1]), tmp_path / "b").save()

    class Late(smp.DistributedModel):
        def __init__(self):
            super().__init__()
            self.layer = keras.layers.Dense(5)

        def call(self, x):
            return self.layer(x)

    model = Late()
    wrong, right = (tf.train.Checkpoint(layer=model.layer) for _ in range(2))
    smp.CheckpointManager(wrong, "unused").restore(path)
    smp.CheckpointManager(right, "unused").restore(fits)
    model(tf.zeros([1, 4]))
    assert model.layer.kernel.shape == (4, 5)


def trained(optimizer, way, directory=None, built=False, **kwargs):
    """Two steps of a model, after the newest checkpoint is restored if there is one."""
    layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]
    model = smp.DistributedModel.from_keras(keras.Sequential(layers))
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    manager = smp.CheckpointManager(checkpoint, directory)
    if built:
        optimizer.build(model.trainable_variables)
    manager.restore(**kwargs)
    x, y = np.ones((4, 4), "float32"), np.ones((4, 2), "float32")
    if way == "fit":
        model.compile(optimizer, "mse")
        model.fit(x, y, epochs=2, verbose=0)
        return manager

    @smp.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    for _ in range(2):
        gradients = [each.accumulate() for each in forward_backward(x, y)]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    return manager


@pytest.mark.parametrize("way", ["fit", "loop"])
def test_another_optimizer_is_told_before_it_updates_anything(smp_init, tmp_path, way):
    smp_init({"partitions": 2, "microbatches": 2})
    trained(keras.optimizers.Adam(), way, tmp_path / "adam").save()
    trained(keras.optimizers.SGD(), way, tmp_path / "sgd").save()
    with pytest.raises(smp.CheckpointError, match="in the checkpoint, but not in the program"):
        trained(keras.optimizers.SGD(), way, tmp_path / "adam")
    with pytest.raises(smp.CheckpointError, match="are not in the checkpoint"):
        trained(keras.optimizers.Adam(), way, tmp_path / "sgd")
    trained(keras.optimizers.SGD(), way, tmp_path / "adam", partial=True)
    manager = trained(keras.optimizers.Adam(), way, tmp_path / "adam")
    assert int(manager.checkpoint.optimizer.iterations) == 4


FRESH = {
    "adam": lambda: keras.optimizers.Adam(0.1),
    "averages": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)),
}


@pytest.mark.parametrize(
    ("kind", "way", "built", "written_by"),
    [  # in a loop the last two are not what fit makes of them: it scales the loss, and averages
        ("adam", "fit", False, smp.CheckpointManager),
        ("adam", "fit", True, tf.train.CheckpointManager),
        ("adam", "loop", False, tf.train.CheckpointManager),
        ("adam", "loop", True, smp.CheckpointManager),
        ("averages", "fit", False, smp.CheckpointManager),
        ("loss scale", "fit", False, smp.CheckpointManager),
        ("loss scale", "fit", True, smp.CheckpointManager),
    ],
)
def test_training_goes_on_from_a_checkpoint_before_the_first_update(
    smp_init, tmp_path, kind, way, built, written_by
):
    make = FRESH[kind]
    smp_init({"partitions": 2, "microbatches": 2})
    keras.utils.set_random_seed(1)
    layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]
    model, optimizer = keras.Sequential(layers), make()
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    written_by(checkpoint, tmp_path, max_to_keep=1).save()
    model.compile(optimizer, "mse")
    model.fit(np.ones((4, 4), "float32"), np.ones((4, 2), "float32"), epochs=2, verbose=0)

    manager = trained(make(), way, tmp_path, built)
    for ours, plain in zip(manager.checkpoint.model.weights, model.weights, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-7)
    with pytest.raises(smp.CheckpointError, match="has made 2 updates"):
        manager.restore()
    manager.restore(partial=True)
    assert int(manager.checkpoint.optimizer.iterations) == 0
