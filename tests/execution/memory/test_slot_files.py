"""Training with the optimizer's state in files: the same bits, in whatever way the steps run."""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np
import pytest
import recomputing
import tensorflow as tf
from helpers import run_python
from processes import check_ranks
from recomputing import assert_equal

import opensmp as smp
from opensmp import _private
from opensmp.errors import StepError
from opensmp.execution.memory import slot_files
from opensmp.execution.memory.slot_files import Mapping


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Lets slots of all sizes be offloaded."""
    monkeypatch.setattr(slot_files, "LEAST_BYTES", 1)
    yield
    _private.keep_slots_with(None)


def embedded() -> keras.Model:
    """An embedding, whose gradients are sparse, and dense layers."""
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(11, 4)(inputs))
    x = keras.layers.Dense(8, activation="tanh")(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return random.integers(0, 11, (24, 5)), random.integers(0, 3, 24)


def by_fit(model: Any, optimizer: Any, **options: Any) -> None:
    model.compile(optimizer, LOSS, **options)
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)


def by_step(model: Any, optimizer: Any) -> None:
    @smp.step
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables)

    @tf.function
    def train(x, y):
        found = [each.accumulate() for each in gradients(x, y)]
        optimizer.apply_gradients(zip(found, model.trainable_variables, strict=True))

    x, y = data()
    for i in range(0, 24, 8):
        train(tf.constant(x[i : i + 8]), tf.constant(y[i : i + 8]))


def by_eager_updates(model: Any, optimizer: Any) -> None:
    @smp.step
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables)

    x, y = data()
    for i in range(0, 24, 8):
        found = [g.accumulate() for g in gradients(tf.constant(x[i : i + 8]), y[i : i + 8])]
        optimizer.apply_gradients(zip(found, model.trainable_variables, strict=True))


def trained(way: Any, make: Any, folder: Any, offload: Any = "optimizer", **config: Any) -> Any:
    """The split model and its optimizer after some steps."""
    smp.shutdown()
    away = {} if offload == "none" else {"offload": offload, "offload_folder": folder}
    smp.init({"partitions": 2, "microbatches": 4, **away, **config})
    keras.utils.set_random_seed(0)
    model, optimizer = smp.DistributedModel.from_keras(embedded()), make()
    way(model, optimizer)
    return model, optimizer


def in_files(optimizer: Any) -> list[bool]:
    """For each variable of an optimizer that has a file: whether its value is in it."""
    stored = [variable._value for variable in optimizer.variables]
    return [
        each._smp_mapping.holds(each.value()) for each in stored if hasattr(each, "_smp_mapping")
    ]


def values(model: Any, optimizer: Any) -> list[Any]:
    return [np.asarray(v) for v in [*model.variables, *optimizer.variables]]


MADE = {
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "averages": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    "accumulated": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "factors": lambda: keras.optimizers.Adafactor(0.01),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.1),
}
SLOTS = {"Adam": 10, "momentum": 5, "averages": 15, "accumulated": 15, "scaled": 10, "Ftrl": 10}


@pytest.mark.parametrize("way", [by_fit, by_step])
@pytest.mark.parametrize("name", MADE)
def test_all_bits_are_equal_with_every_kind_of_optimizer(tmp_path, name, way):
    if name == "scaled" and way is by_step:
        pytest.skip("a loop would have to scale its loss")
    found = trained(way, MADE[name], tmp_path)
    kept = in_files(found[1])
    assert kept
    assert all(kept)
    assert len(kept) == SLOTS.get(name, len(kept))
    assert_equal(values(*found), values(*trained(way, MADE[name], tmp_path, "none")), name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("way", "options"),
    [(by_eager_updates, {}), (by_fit, {"steps_per_execution": 3}), (by_fit, {"run_eagerly": True})],
)
def test_all_bits_are_equal_in_loops_and_without_functions(tmp_path, way, options):
    def run(model, optimizer):
        way(model, optimizer, **options)

    found = trained(run, MADE["Adam"], tmp_path)
    assert in_files(found[1]) == [True] * 10
    assert_equal(values(*found), values(*trained(run, MADE["Adam"], tmp_path, "none")), "")


def test_low_precision_has_the_same_bits(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    try:
        found = trained(by_fit, MADE["Adam"], tmp_path)
        assert in_files(found[1]) == [True] * 10
        assert_equal(values(*found), values(*trained(by_fit, MADE["Adam"], tmp_path, "none")), "")
    finally:
        keras.config.set_dtype_policy("float32")


def test_one_partition_of_several_may_offload(tmp_path):
    found = trained(by_fit, MADE["Adam"], tmp_path, {1: "optimizer"})
    kept = [v for v in found[1].variables if hasattr(v._value, "_smp_mapping")]
    assert {v._value.device[-5:] for v in kept} == {"CPU:1"}
    assert 0 < len(kept) < 10


def test_all_offloads_residuals_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr("opensmp.execution.memory.offload.LEAST_BYTES", 1)
    config = {"pipeline": "simple"}
    none = recomputing.trained("attending", "none", recomputing.by_fit, **config)
    config |= {"offload": "all", "offload_folder": str(tmp_path)}
    assert_equal(recomputing.trained("attending", "none", recomputing.by_fit, **config), none, "")


def test_state_that_was_loaded_goes_back_into_its_file(tmp_path):
    """Saved, restored and trained on: with and without offloading, in turns."""
    model, _ = trained(by_fit, MADE["Adam"], tmp_path, "none")
    model.save(tmp_path / "model.keras")
    for offload in ("optimizer", "none"):
        smp.shutdown()
        away = {} if offload == "none" else {"offload": offload, "offload_folder": str(tmp_path)}
        smp.init({"partitions": 2, "microbatches": 4, **away})
        again = smp.load_model(tmp_path / "model.keras")
        x, y = data()
        again.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        kept = in_files(again.optimizer)
        assert kept == [True] * 10 * (offload != "none")
        state = values(again, again.optimizer)
        if offload == "optimizer":
            first = state
            checkpoint = tf.train.Checkpoint(model=again, optimizer=again.optimizer)
            manager = smp.CheckpointManager(checkpoint, str(tmp_path / "checkpoints"))
            manager.save()
            again.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
            further = values(again, again.optimizer)
            manager.restore()
            assert_equal(values(again, again.optimizer), first, "restored")
            again.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
            assert_equal(values(again, again.optimizer), further, "trained on")
            assert in_files(again.optimizer) == [True] * 10
    assert_equal(state, first, "loaded")


def test_small_slots_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(slot_files, "LEAST_BYTES", 1 << 10)
    _, optimizer = trained(by_fit, MADE["Adam"], tmp_path)
    assert in_files(optimizer) == []


PEAK = """
import os

import keras
import numpy as np

import opensmp as smp

away = {"offload": "optimizer", "offload_folder": os.environ["FOLDER"]}
config = {} if os.environ["HOW"] == "none" else away
smp.init({"partitions": 2, "microbatches": 4, **config})
layers = [keras.layers.Dense(2048, activation="relu") for _ in range(8)]
model = smp.DistributedModel.from_keras(keras.Sequential([keras.Input([2048]), *layers]))
model.compile(keras.optimizers.Adam(1e-4), "mse")
x = np.ones([64, 2048], "float32")
model.fit(x, x, batch_size=16, epochs=2, verbose=0)
with open("/proc/self/status") as file:
    print("PEAK", 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1]))
"""


def test_less_memory_is_needed(tmp_path):
    """The slots are 256 MiB; those of one variable a partition are in memory."""
    peaks = {}
    for how in ("none", "optimizer"):
        result = run_python(PEAK, {"HOW": how, "FOLDER": str(tmp_path)})
        peaks[how] = int(result.stdout.rsplit("PEAK", 1)[1])
    assert peaks["none"] - peaks["optimizer"] > 100 << 20


def test_a_full_disk_is_an_error_by_name(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StepError, match=r"4096 bytes of an optimizer's state.*No space left"):
        Mapping(str(tmp_path), 4096)
    assert os.listdir(tmp_path) == []


def test_slots_of_an_accelerator_lie_on_the_host(monkeypatch, tmp_path):
    """Its device is a CPU here, which the keeper takes for an accelerator."""
    monkeypatch.setattr(slot_files, "on_cpu_device", lambda device: "CPU:1" not in device)
    model, optimizer = trained(by_fit, MADE["Adam"], tmp_path, {1: "optimizer"})
    homes = {v.path.replace("/", "_"): v._value.device[-5:] for v in model.trainable_variables}
    assert set(homes.values()) == {"CPU:0", "CPU:1"}
    slots = [v for v in optimizer.variables if v.shape.rank]
    assert {v._value.device[-5:] for v in slots} == {"CPU:0"}
    none = trained(by_fit, MADE["Adam"], tmp_path, "none")
    assert_equal(values(model, optimizer), values(*none), "")


IN_RANKS = """
import sys

import numpy as np
from execution.memory import test_slot_files as here
from recomputing import assert_equal

from opensmp import _private
from opensmp.execution.memory import slot_files

slot_files.LEAST_BYTES = 1
found = []
for offload in ("none", "optimizer"):
    config = {"shard_optimizer_state": sys.argv[2] == "True"}
    model, optimizer = here.trained(
        here.by_fit, here.MADE["Adam"], sys.argv[1], offload, **config
    )
    mine = [*model.variables, *optimizer.variables]
    found.append([np.asarray(v) for v in mine if not _private.is_elsewhere(v)])
kept = here.in_files(optimizer)
assert all(kept) and (kept or sys.argv[2] == "True"), kept
assert_equal(found[1], found[0], "")
"""


@pytest.mark.parametrize(("ranks", "shards"), [(2, False), (4, True)])
def test_all_bits_are_equal_in_ranks(tmp_path, ranks, shards):
    check_ranks(IN_RANKS, ranks, args=(tmp_path, shards))
