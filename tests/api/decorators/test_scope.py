from __future__ import annotations

import keras
import pytest
import tensorflow as tf
from saving.sample_models import X, functional, same

import opensmp as smp
from opensmp.errors import ConfigError


def device_of(model):
    return model.weights[0].value.device


def test_a_function_keeps_its_name_its_documentation_and_its_arguments():
    @smp.scope("CPU:1")
    def make(units: int, *, compiled: bool = False) -> keras.Model:
        """Makes a model."""
        return functional(compiled, units)

    assert (make.__name__, make.__doc__) == ("make", "Makes a model.")
    assert device_of(make(7)).endswith("CPU:1")
    assert make(7, compiled=True).compiled


def test_a_strategy_or_several_devices_give_mirrored_variables():
    names = ["CPU:0", "CPU:1"]
    for where in (names, tf.distribute.MirroredStrategy(names)):
        model = smp.scope(where)(functional)()
        assert len(model.weights[0].value.values) == 2


def test_the_machine_decides_when_nothing_is_said(smp_init, monkeypatch):
    assert type(smp.scope()(functional)()) is type(functional())  # one CPU: as it is
    cpus = tf.config.list_logical_devices("CPU")
    with monkeypatch.context() as patch:  # a machine with two accelerators
        patch.setattr(tf.config, "list_logical_devices", lambda kind=None: cpus[:2])
        assert len(smp.scope()(functional)().weights[0].value.values) == 2
    smp_init({"partitions": 2, "microbatches": 2})
    model = smp.scope()(functional)()
    assert isinstance(model, smp.DistributedModel)
    model(X)
    assert len({v.value.device for v in model.weights}) == 2


def test_it_works_without_parentheses_and_as_a_context():
    @smp.scope
    def make():
        return functional(False)

    assert make.__name__ == "make"
    same(make().weights, functional(False).weights)
    with smp.scope("CPU:2"):
        assert device_of(functional(False)).endswith("CPU:2")
    assert device_of(functional(False)).endswith("CPU:0")


def test_inside_of_a_strategy_it_changes_nothing():
    strategy = tf.distribute.OneDeviceStrategy("CPU:3")
    with strategy.scope():
        assert device_of(smp.scope()(functional)()).endswith("CPU:3")


@pytest.mark.parametrize("where", [3, [], ["CPU:0", 1]])
def test_what_is_no_place_is_refused(where):
    with pytest.raises(ConfigError, match=r"smp.scope: expected nothing, .* received"):
        smp.scope(where)


def test_a_device_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"GPU:7 is not a device .* it has CPU:0, CPU:1"):
        smp.scope(["CPU:0", "GPU:7"])
