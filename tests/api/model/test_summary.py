"""The end of `model.summary()`: partition and device of each layer."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
from small import TWO_BY_TWO, Net, batch

import opensmp as smp
from opensmp.api.model.summary import partitions_text


def lines_of(model, **options):
    found = []
    model.summary(print_fn=lambda line, **_: found.append(line), **options)
    return "\n".join(found).splitlines()


def test_before_the_first_batch_it_says_what_is_not_known(smp_init):
    smp_init(TWO_BY_TWO)
    inputs = keras.Input((5,))
    model = smp.DistributedModel(inputs, keras.layers.Dense(3, name="top")(inputs))
    text = "\n".join(lines_of(model))
    assert "Total params: 18" in text
    assert "Partitions: 2. Which layer is in which is not known yet" in text


def test_each_layer_has_its_partition_and_device(smp_init):
    smp_init(TWO_BY_TWO)
    model = Net()
    model(batch(4))
    lines = [line.split() for line in lines_of(model)]
    assert ["Partitions:", "2"] in lines
    assert ["hidden", "0", "CPU:0"] in lines
    assert ["top", "1", "CPU:1"] in lines


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_layers_in_models_in_the_model(smp_init, kind):
    smp_init({"partitions": 2})
    inner = keras.Sequential(
        [keras.layers.Dense(64, name="one"), keras.layers.Dense(64, name="two")]
    )
    inner.name = "inner"
    if kind == "sequential":
        plain = keras.Sequential([keras.Input((64,)), inner, keras.layers.Dense(64, name="top")])
    else:
        inputs = keras.Input((64,), name="features")
        plain = keras.Model(inputs, keras.layers.Dense(64, name="top")(inner(inputs)))
    model = smp.DistributedModel.from_keras(plain)
    model.compile("sgd", "mse")
    x = np.ones((4, 64), "float32")
    model.fit(x, x, verbose=0)
    shown = lines_of(model)
    assert not any("└ one" in line for line in shown)
    nested = [line for line in lines_of(model, expand_nested=True) if "└" in line and "CPU" in line]
    assert [line.split()[1] for line in nested] == ["one", "two"]
    home = model.get_layer("inner").get_layer("one").kernel.value.device
    assert nested[0].split()[-1] == home.rpartition("device:")[2]
    ranged = lines_of(model, layer_range=["top", "top"])
    assert [line.split()[0] for line in ranged if "CPU" in line] == ["top"]


def test_a_layer_that_is_cut_names_all_its_partitions(smp_init):
    smp_init(TWO_BY_TWO)

    class Cut(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="cut")
            self.one, self.two = keras.layers.Dense(2), keras.layers.Dense(2)

        def call(self, x):
            with smp.partition(0):
                x = self.one(x)
            with smp.partition(1):
                return self.two(x)

    model = smp.DistributedModel.from_keras(keras.Sequential([keras.Input((5,)), Cut()]))
    model(batch(4))
    assert ["cut", "0,", "1", "CPU:0,", "CPU:1"] in [line.split() for line in lines_of(model)]


def test_in_several_processes_it_names_their_ranks(smp_init):
    here = smp_init(TWO_BY_TWO)
    model = Net()
    model(batch(4))
    second = dataclasses.replace(here, size=2, rank=1, mp_group=(0, 1))
    lines = [line.split() for line in partitions_text(model, model.plan, second).splitlines()]
    assert ["hidden", "0", "rank", "0"] in lines
    assert ["top", "1", "rank", "1", "CPU:1"] in lines
