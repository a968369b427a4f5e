"""Canaries of optimizers."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from opensmp import _private
from opensmp._private.keras import optimizers


@pytest.mark.parametrize("first", ["build", "give up"])
def test_optimizers_leave_out_what_is_elsewhere(first):
    _private.place_updates_with_variables()
    layer = keras.layers.Dense(2)
    layer.build([1, 3])
    optimizer = keras.optimizers.Adam(0.5, use_ema=True, ema_overwrite_frequency=1)
    if first == "build":
        optimizer.build(layer.trainable_variables)
    _private.give_up(layer.kernel, "kernel")
    nothing = tf.IndexedSlices(tf.zeros([0, 2]), tf.zeros([0], tf.int32), [3, 2])
    optimizer.apply_gradients(zip([nothing, tf.ones([2])], layer.trainable_variables, strict=True))
    assert layer.bias.numpy().tolist() == pytest.approx([-0.5, -0.5], rel=1e-4)
    slots = [slot for slot in optimizer.variables if "kernel" in slot.path]
    assert len(slots) == 3
    assert all(map(_private.is_elsewhere, slots))
    optimizer.apply_gradients([(nothing, layer.kernel)])
    assert int(optimizer.iterations) == 2


def test_slots_move_with_their_variable():
    _private.place_updates_with_variables()
    variable = keras.Variable([1.0, 2.0])
    optimizer = keras.optimizers.SGD(momentum=0.9)
    optimizer.build([variable])
    _private.move_to(variable, "CPU:1")
    assert optimizer.variables[-1].value.device.endswith("CPU:1")


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1),
        keras.optimizers.Adam(0.1, use_ema=True, clipnorm=1.0),
        keras.optimizers.Adam(0.1, clipvalue=1.0),
        keras.optimizers.Adam(0.1, global_clipnorm=1.0),
    ],
    ids=["momentum and decay", "average and norm", "value", "global norm"],
)
def test_place_updates_with_variables(optimizer):
    _private.place_updates_with_variables()
    _private.place_updates_with_variables()  # changes nothing a second time
    variables = []
    for i in range(3):
        with tf.device(f"CPU:{i}"):
            variables.append(keras.Variable([1.0] * (i + 2)))

    @tf.function
    def run():
        gradients = []
        for i, variable in enumerate(variables):
            with tf.device(f"CPU:{i}"):
                gradients.append(2.0 * tf.identity(variable.value))
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    run()
    for slot in optimizer.variables:
        if slot.shape.rank if hasattr(slot.shape, "rank") else len(slot.shape):
            assert slot.value.device.endswith(f"CPU:{slot.shape[0] - 2}"), slot.path
    for op in run.get_concrete_function().graph.get_operations():
        lengths = {t.shape[0] for t in op.outputs if t.shape.rank == 1 and t.shape[0] in (2, 3, 4)}
        if lengths and op.type in (
            "Mul",
            "AddV2",
            "Sqrt",
            "AssignVariableOp",
            "AssignSubVariableOp",
        ):
            if optimizer.global_clipnorm and not op.device:
                continue  # a norm over all gradients has no one place
            assert op.device.endswith(f"CPU:{lengths.pop() - 2}"), op.name


@pytest.mark.parametrize("steps", [None, 2])
def test_clip_with__optimizer_hands_over_its_gradients_and_their_places(steps):
    _private.place_updates_with_variables()
    calls = []

    def clip(gradients, places, num_all, clip_norm):
        calls.append((places, num_all, clip_norm))
        return [gradient * 0.5 for gradient in gradients]

    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=3.0, gradient_accumulation_steps=steps)
    here, unused, elsewhere = (keras.Variable([1.0, 2.0]) for _ in range(3))
    _private.give_up(elsewhere, "another rank")
    optimizer.build([here, unused, elsewhere])
    _private.clip_with(clip)
    try:
        for _ in range(steps or 1):
            gradients = [tf.constant([1.0, 1.0]), None, tf.constant([1.0, 1.0])]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Keras tells that a gradient is None
                optimizer.apply(gradients, [here, unused, elsewhere])
        for _ in range(steps or 1):
            optimizer.apply([tf.constant([1.0, 1.0])], [elsewhere])
    finally:
        _private.clip_with(None)
    assert calls == [([0], 2, 3.0), ([], 1, 3.0)]
    assert here.numpy().tolist() == [0.5, 1.5]


class TestPlaceUpdatesOfOtherOptimizers:
    """What `place_updates_with_variables` does to optimizers that do something of their own."""

    def test_factors_of_adafactor_are_slots(self):
        _private.place_updates_with_variables()
        with tf.device("CPU:2"):
            variable = keras.Variable(np.ones((3, 4), "float32"))
        optimizer = keras.optimizers.Adafactor()
        optimizer.build([variable])
        slots = [v for v in optimizer.variables if v.shape in ((3,), (4,), (3, 4))]
        assert len(slots) == 3
        assert {v.value.device[-5:] for v in slots} == {"CPU:2"}
        _private.give_up(variable, "another rank")
        assert all(map(_private.is_elsewhere, slots))

    @pytest.mark.skipif(
        not hasattr(keras.optimizers, "ScheduleFreeAdamW"),
        reason="Keras has ScheduleFreeAdamW since 3.14",
    )
    def test_average_of_schedule_free_begins_at_the_weights(self):
        _private.place_updates_with_variables()
        here, away = keras.Variable(3.0), keras.Variable(4.0)
        _private.give_up(away, "another rank")
        optimizer = keras.optimizers.ScheduleFreeAdamW()
        optimizer.build([here, away])
        momenta = [v for v in optimizer.variables if "momentum" in v.path]
        assert float(momenta[0].value) == 3.0
        assert _private.is_elsewhere(momenta[1])

    def test_a_loss_is_scaled_by_the_scale_of_the_moment(self):
        _private.place_updates_with_variables()
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=8.0)
        variable = keras.Variable(1.0)
        scaled = tf.function(lambda: optimizer.scale_loss(tf.constant(1.0)))
        assert float(scaled()) == 8.0
        optimizer.apply([tf.constant(np.inf)], [variable])
        assert float(scaled()) == 4.0 == float(optimizer.dynamic_scale)
        assert float(variable) == 1.0


def test_agree_on_finite_with():
    _private.place_updates_with_variables()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=2.0)
    variable = keras.Variable(1.0)
    none_here = tf.IndexedSlices(tf.zeros([0, 2]), tf.zeros([0], tf.int32), tf.constant([3, 2]))
    seen = []

    def agree(finite):
        seen.append(bool(finite))
        return tf.constant(False)

    _private.agree_on_finite_with(agree)
    try:
        optimizer.apply([tf.constant(1.0)], [variable])
        assert not optimizer.check_finite([none_here])
    finally:
        _private.agree_on_finite_with(None)
    assert seen == [True, True]
    assert float(variable) == 1.0
    assert float(optimizer.dynamic_scale) == 1.0


def test_scales_loss():
    _private.place_updates_with_variables()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    seen = []

    def look(x):
        seen.append(_private.scales_loss())
        return x

    for _ in range(2):  # one function says nothing of the next
        inner, seen[:] = tf.function(look), []
        tf.function(lambda x, inner=inner: inner(optimizer.scale_loss(look(x))))(tf.constant(1.0))
        assert seen == [False, True]
        assert not _private.scales_loss()


@pytest.mark.parametrize("scaled", [False, True])
def test_check_gradients_with(scaled, monkeypatch):
    _private.place_updates_with_variables()
    monkeypatch.setattr(_private.keras.optimizers, "_check_gradients", None)
    variable = keras.Variable([1.0, 2.0])
    given = []
    _private.check_gradients_with(lambda grads, variables: given.append((grads, variables)))
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=1.0)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    gradient = tf.ones([2])
    optimizer.apply_gradients([(gradient, variable)])
    grads, variables = given[0]
    assert grads[0] is gradient  # as it was given, before it is scaled or clipped
    assert not variables if scaled else variables[0] is variable


@pytest.mark.parametrize("where", ["eager", "function"])
def test_before_updates(where, monkeypatch):
    _private.place_updates_with_variables()
    monkeypatch.setattr(_private.keras.optimizers, "_before_updates", None)
    seen = []
    variable = keras.Variable([1.0, 2.0])

    def look(optimizer):
        slots = len([slot for slot in optimizer.variables if slot.shape == (2,)])
        with tf.init_scope():
            seen.append((optimizer.built, slots, variable.numpy().tolist()))

    _private.before_updates(look)
    optimizer = keras.optimizers.Adam(1.0)

    def update():
        optimizer.apply_gradients([(tf.ones([2]), variable)])

    (update if where == "eager" else tf.function(update))()
    # A function is traced again after one that has made variables.
    assert set(map(str, seen)) == {str((True, 2, [1.0, 2.0]))}
    assert variable.numpy().tolist() == pytest.approx([0.0, 1.0], abs=1e-5)


def test_leave_to_others(monkeypatch):
    """LossScaleOptimizer looks at the gradients of this process only."""
    _private.place_updates_with_variables()
    monkeypatch.setattr(optimizers, "_is_kept_elsewhere", None)
    monkeypatch.setattr(optimizers, "_agree_on_finite", lambda finite: finite)
    here, away = tf.constant([1.0]), tf.constant([float("nan")])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    assert not optimizer.check_finite([here, away])
    _private.leave_to_others(lambda gradient: gradient is away)
    assert optimizer.check_finite([here, away])
