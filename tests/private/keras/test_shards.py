"""Canaries of optimizer state that is divided over replicas."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from opensmp import _private
from opensmp._private.keras.shards import is_slot
from opensmp.errors import ConfigError, ElsewhereError

OWN, OTHER = 0, 1


class OneOfTwo:
    """Every other variable is left to another replica; what is shared is only noted."""

    position = OWN

    def __init__(self):
        self.calls = []

    def divide(self, variables):
        for i, variable in enumerate(variables):
            if _private.updater_of(variable) is None:
                _private.set_updater(variable, (OWN, OTHER)[i % 2])
                _private.shed_slots(variable)

    def share(self, variables):
        self.calls.append([v.path for v in variables])

    def clip(self, gradients, places, num_all, clip_norm):
        self.calls.append((places, num_all, clip_norm))
        return [0.5 * gradient for gradient in gradients]


@pytest.fixture
def shards():
    _private.place_updates_with_variables()
    made = OneOfTwo()
    _private.shard_with(made)
    yield made
    _private.shard_with(None)


def variables(number=3):
    return [keras.Variable([1.0, 2.0], name=f"v{i}") for i in range(number)]


def update(optimizer, trained):
    """One update by gradients of 1, in a function."""

    @tf.function
    def run():
        optimizer.apply_gradients([(tf.ones([2]), variable) for variable in trained])

    run()


def slots(optimizer):
    return [slot for slot in optimizer.variables if len(slot.shape)]


@pytest.mark.parametrize("first", ["build", "apply"])
def test_shard_with(shards, first):
    trained = variables()
    optimizer = keras.optimizers.Adam(0.5)
    if first == "build":
        optimizer.build(trained)
    update(optimizer, trained)
    changed = [variable.numpy().tolist() != [1.0, 2.0] for variable in trained]
    assert changed == [True, False, True]
    of_other = [slot for slot in slots(optimizer) if _private.is_elsewhere(slot)]
    assert [slot.path.split("/")[-1] for slot in of_other] == ["v1_momentum", "v1_velocity"]
    assert set(map(tuple, shards.calls)) == {("v0", "v1", "v2")}
    assert int(optimizer.iterations) == 1


def test_shard_with__nothing_left_for_this_replica(shards):
    trained = variables(2)
    optimizer = keras.optimizers.Nadam(0.5)
    optimizer.build(trained)
    update(optimizer, trained[1:])
    assert [variable.numpy().tolist() for variable in trained] == [[1.0, 2.0]] * 2
    assert int(optimizer.iterations) == 1
    assert float(optimizer._u_product) != 1.0  # it belongs to no variable: all replicas have it


def test_shard_with__slots_made_before_are_given_up(shards):
    _private.shard_with(None)
    trained = variables(2)
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    optimizer.build(trained)
    assert not any(map(_private.is_elsewhere, slots(optimizer)))
    _private.shard_with(shards)
    update(optimizer, trained)
    assert [_private.is_elsewhere(slot) for slot in slots(optimizer)] == [False, True]


@pytest.mark.parametrize("how", ["eagerly", "in a function"])
def test_is_shard(shards, how):
    trained = variables(2)
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    optimizer.build(trained)
    own, other = slots(optimizer)
    assert [_private.is_shard(each) for each in (own, other, *trained)] == [
        True,
        True,
        False,
        False,
    ]
    assert all(map(is_slot, (own, other)))
    assert not is_slot(optimizer.iterations)

    def read():
        return tf.convert_to_tensor(other)

    with pytest.raises(ElsewhereError, match=r"v1_momentum of replica 1.*shard_optimizer_state"):
        read() if how == "eagerly" else tf.function(read)()
    other.assign([5.0, 5.0])  # as the other replica does, with its own memory
    _private.lend(other, np.array([3.0, 4.0], "float32"))
    assert other.numpy().tolist() == [3.0, 4.0]
    _private.take_back(other)
    assert _private.is_elsewhere(other)


def test_set_shard(shards):
    trained = variables(2)
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    optimizer.build(trained)
    own, other = slots(optimizer)
    _private.set_shard(own, False)
    assert not _private.is_shard(own)
    _private.take_in(other, np.array([3.0, 4.0], "float32"), "CPU:0")
    assert not _private.is_shard(other)
    assert other.numpy().tolist() == [3.0, 4.0]


def test_set_updater(shards):
    (variable,) = variables(1)
    assert _private.updater_of(variable) is None
    _private.set_updater(variable, OTHER)
    assert _private.updater_of(variable) == OTHER
    assert _private.is_left_to_another(variable)
    _private.shard_with(OneOfTwo())  # of another smp.init
    assert not _private.is_left_to_another(variable)


def test_updater_of(shards):
    stored = tf.Variable([1.0])
    _private.set_updater(stored, OWN)
    assert _private.updater_of(stored) == OWN


def test_is_left_to_another(shards):
    (variable,) = variables(1)
    assert not _private.is_left_to_another(variable)
    _private.set_updater(variable, OWN)
    assert not _private.is_left_to_another(variable)


@pytest.mark.parametrize("accumulated", [None, 2])
def test_shard_with__global_norm(shards, accumulated):
    """Of all gradients that are here; of sums, which are not, by the shards."""
    trained = variables(2)
    optimizer = keras.optimizers.SGD(
        1.0, global_clipnorm=1.0, gradient_accumulation_steps=accumulated
    )
    for _ in range(accumulated or 1):
        update(optimizer, trained)
    by = 0.5  # of four gradients of 1, the norm is 2; and `clip` above divides by as much
    assert trained[0].numpy().tolist() == [1.0 - by, 2.0 - by]
    clipped = [call for call in shards.calls if isinstance(call, tuple)]
    assert all(call == ([0], 2, 1.0) for call in clipped)
    assert bool(clipped) == bool(accumulated)


def test_shard_with__averages(shards):
    trained = variables(2)
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5)
    for _ in range(2):
        update(optimizer, trained)
    before = trained[0].numpy().tolist()
    optimizer.finalize_variable_values(trained)
    assert trained[0].numpy().tolist() != before
    assert shards.calls[-1] == ["v0", "v1"]
    with _private.averages_of_own(optimizer):
        assert [v.path for v in optimizer._trainable_variables] == ["v0"]
    assert shards.calls[-1] == ["v0", "v1"]
    assert len(optimizer._trainable_variables) == 2


def test_shard_with__every_optimizer_of_several(shards):
    kind = getattr(keras.optimizers, "MultiOptimizer", None)
    if kind is None:
        pytest.skip("this Keras has no MultiOptimizer")
    first, second = keras.optimizers.Adam(0.5), keras.optimizers.SGD(0.5, momentum=0.9)
    optimizer = kind(keras.optimizers.OptimizerMap(first, {"v0": second}))
    update(optimizer, trained := variables(4))
    assert shards.calls[-2:] == [["v0"], ["v1", "v2", "v3"]]
    assert sum(map(_private.is_elsewhere, slots(optimizer))) == 4
    assert [v.numpy().tolist() != [1.0, 2.0] for v in trained] == [True, False, True, False]


class Counts(keras.optimizers.SGD):
    """A user's optimizer, with state that belongs to no variable."""

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.count = self.add_variable((), name="count")

    def update_step(self, gradient, variable, learning_rate):
        self.count.assign_add(1.0)
        super().update_step(gradient, variable, learning_rate)


def test_shard_with__state_outside_of_slots_is_refused(shards):
    with pytest.raises(ConfigError, match=r"Counts.*count.*add_variable_from_reference"):
        update(Counts(0.5), variables())
