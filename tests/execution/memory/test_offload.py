"""Training with offloaded residuals: the same bits, in whatever way the steps run."""

from __future__ import annotations

import logging
import os
from typing import Any

import keras
import numpy as np
import pytest
import recomputing
import tensorflow as tf
from processes import check_ranks
from recomputing import assert_equal, by_fit, by_own_step, by_step, trained, twice
from turns import in_turn

import opensmp as smp
from opensmp.distributed import world
from opensmp.execution.memory import offload, offload_places
from opensmp.execution.memory.offload_places import spill_file
from opensmp.execution.memory.spill_file import Spill


@pytest.fixture
def reads(monkeypatch):
    """Lets tensors of all sizes be offloaded; the numbers of copies that were written and read."""
    count = {"written": 0, "read": 0}
    write, read = Spill.write, Spill.read

    def counted_write(spill: Spill, value: Any) -> Any:
        count["written"] += spill.num_reads != 0
        return write(spill, value)

    def counted_read(spill: Spill, *args: Any) -> Any:
        count["read"] += 1
        return read(spill, *args)

    monkeypatch.setattr(Spill, "write", counted_write)
    monkeypatch.setattr(Spill, "read", counted_read)
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    return count


def check(reads: Any, folder: Any, name: str, way: Any = by_step, **config: Any) -> None:
    """Compares with a run that offloads nothing; what was written is read, and then free."""
    config = {"pipeline": "simple", "microbatches": 4, "recompute": "none", **config}
    recompute = config.pop("recompute")
    none = trained(name, recompute, way, **config)
    assert reads == {"written": 0, "read": 0}
    found = trained(name, recompute, way, offload="residuals", offload_folder=folder, **config)
    assert_equal(found, none, f"{name} {config}")
    assert reads["read"] >= reads["written"] > 0
    assert spill_file(world.current("this test")).used_bytes == 0
    assert os.listdir(folder) == []


WAYS = {
    "step, none": (by_step, "none"),
    "step, selective": (by_step, "selective"),
    "fit, none": (by_fit, "none"),
    "own step, none": (by_own_step, "none"),
    "own step, selective": (by_own_step, "selective"),
    "twice, selective": (twice, "selective"),
}


@pytest.mark.parametrize("case", in_turn(WAYS, 3))
def test_all_bits_are_equal_in_every_kind_of_step(reads, tmp_path, case):
    way, recompute = WAYS[case]
    check(reads, tmp_path, "drawing", way, recompute=recompute)


@pytest.mark.parametrize("name", in_turn(["normalized", "attending", "looping"], 3))
def test_state_random_numbers_and_loops_stay(reads, tmp_path, name):
    check(reads, tmp_path, name, recompute="full" if name == "looping" else "none")


@pytest.mark.parametrize(
    "config",
    in_turn(
        [
            {"pipeline": "interleaved", "partitions": 4, "microbatches": 8},
            {"pipeline": "zero_bubble", "partitions": 4, "microbatches": 8},
            {"optimize": "speed"},
            {"check_finite": True},
            {"pieces_per_partition": 2},
            {"partitions": 1},
        ],
        3,
    ),
)
def test_all_bits_are_equal_with_every_schedule(reads, tmp_path, config):
    check(reads, tmp_path, "drawing", **config)


def test_all_bits_are_equal_in_low_precision(reads, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        check(reads, tmp_path, "attending")
    finally:
        keras.config.set_dtype_policy("float32")


def test_all_bits_are_equal_through_the_memory_of_the_host(monkeypatch):
    """As on an accelerator; here both are the same memory."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    for module in (offload, offload_places):
        monkeypatch.setattr(module, "on_cpu_device", lambda device: False)
    for way in (by_step, by_own_step):
        config = {"pipeline": "simple", "microbatches": 4}
        none = trained("drawing", "none", way, **config)
        assert_equal(trained("drawing", "none", way, offload="residuals", **config), none, "")


def test_one_partition_of_several_may_offload(reads, tmp_path):
    config = {"pipeline": "simple", "microbatches": 4}
    none = trained("drawing", "none", **config)
    counts = []
    for setting in ("residuals", {0: "residuals"}, {1: "residuals", 0: "none"}):
        found = trained("drawing", "none", offload=setting, offload_folder=tmp_path, **config)
        assert_equal(found, none, str(setting))
        counts.append(reads["read"])
        reads["read"] = 0
    assert 0 < counts[1] < counts[0]
    assert counts[0] == counts[1] + counts[2]


def test_several_models_and_a_timeline_are_as_without(reads, tmp_path):
    def losses(**config: Any) -> Any:
        smp.shutdown()
        smp.init({"partitions": 2, "microbatches": 4, "pipeline": "simple", **config})
        keras.utils.set_random_seed(0)
        made = [
            smp.DistributedModel.from_keras(recomputing.drawing()),
            smp.DistributedModel.from_keras(keras.Sequential([keras.layers.Dense(3)])),
        ]
        x, y = recomputing.data_for(recomputing.drawing())

        @smp.step
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((made[1](made[0](x, training=True)) - 1.0) ** 2)
            return tape.gradient(loss, [v for m in made for v in m.trainable_variables])

        run = tf.function(lambda x, y: [g.reduce_mean() for g in step(x, y)])
        with smp.record_timeline():
            first = run(tf.constant(x), tf.constant(y))
        return [np.asarray(g) for g in [*first, *run(tf.constant(x), tf.constant(y))]]

    tf.random.set_seed(1)
    none = losses()
    tf.random.set_seed(1)
    assert_equal(losses(offload="residuals", offload_folder=tmp_path), none, "two models")
    assert reads["read"] > 0


def test_a_gradient_may_be_taken_twice(reads, tmp_path):
    """By a persistent tape, over a call with the whole batch; then copies stay for a while."""

    class Twice(recomputing.OwnStep):
        def train_step(self, data: Any) -> Any:
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
                other = 2.0 * loss
            sums = [
                a + b
                for a, b in zip(
                    tape.gradient(loss, self.trainable_variables),
                    tape.gradient(other, self.trainable_variables),
                    strict=True,
                )
            ]
            self.optimizer.apply_gradients(zip(sums, self.trainable_variables, strict=True))
            return {"own": loss}

    def run(**config: Any) -> list[Any]:
        smp.shutdown()
        smp.init({"partitions": 2, "microbatches": 4, **config})
        keras.utils.set_random_seed(0)
        made = recomputing.drawing()
        x, y = recomputing.data_for(made)
        model = Twice(made)
        return [np.asarray(by_fit(model, x, y)), *map(np.asarray, model.variables)]

    none = run()
    assert_equal(run(offload="residuals", offload_folder=tmp_path), none, "twice")
    assert reads["read"] == 2 * reads["written"] > 0


def test_too_few_microbatches_are_told(reads, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="opensmp"):
        trained("drawing", "none", offload="residuals", offload_folder=tmp_path)
    assert "hold the residuals of 2 microbatches at most at once" in caplog.text
    assert reads == {"written": 0, "read": 0}


def dense() -> keras.Model:
    x = inputs = keras.Input((12,))
    for _ in range(4):
        x = keras.layers.Dense(12, activation="tanh")(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def test_a_full_disk_is_an_error_with_a_name_and_training_goes_on_after_it(
    reads, tmp_path, monkeypatch
):
    # Nothing random, of which the run that fails would draw.
    monkeypatch.setitem(recomputing.MODELS, "dense", dense)
    none = trained("dense", "none", pipeline="simple", microbatches=4)
    write = os.pwrite
    full = [True]

    def pwrite(*args: Any) -> int:
        if full.pop() if full else False:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)

    def twice_if_it_fails(model: Any, x: Any, y: Any) -> list[Any]:
        with pytest.raises(tf.errors.OpError, match=r"No space left on device\. Make room there"):
            by_step(model, x, y)
        return by_step(model, x, y)

    config = {"offload": "residuals", "offload_folder": tmp_path}
    found = trained("dense", "none", twice_if_it_fails, pipeline="simple", microbatches=4, **config)
    assert_equal(found, none, "after an error")
    assert reads["read"] > 0


# ------------------------------------------------------------------------------- processes


SCRIPT = """
import os, sys, tempfile
import recomputing
from recomputing import assert_equal, by_fit, by_own_step, by_step, trained
from opensmp.distributed import world
from opensmp.execution.memory import offload
from opensmp.execution.memory.offload_places import spill_file

offload.LEAST_BYTES = 1
folder = tempfile.mkdtemp()
for name, way, recompute, config in [
    ("drawing", by_step, "none", {}),
    ("normalized", by_fit, "selective", {"transport": "collective"}),
    ("drawing", by_own_step, "none", {"check_finite": True}),
]:
    config = {"pipeline": "simple", "microbatches": 4, **config}
    none = trained(name, recompute, way, **config)
    found = trained(name, recompute, way, offload="residuals", offload_folder=folder, **config)
    assert_equal(found, none, name)
    file = spill_file(world.current("this test"))
    assert file.num_bytes > 0 == file.used_bytes, (name, file.num_bytes, file.used_bytes)
    assert os.listdir(folder) == []
os.rmdir(folder)
print("EQUAL", flush=True)
"""


def test_two_ranks_have_equal_bits():
    for result in check_ranks(SCRIPT, 2, seconds=500):
        assert "EQUAL" in result.output
