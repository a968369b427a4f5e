from __future__ import annotations

import keras
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.compiler.cluster.machine import MATMUL_SHARE, assumptions, machine_of, rate
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.config import Config


def test_a_name_gives_all_numbers_and_a_dict_only_its_own():
    named = machine_of("a100", precision="bfloat16")
    assert named.flops_per_second == MATMUL_SHARE * 312e12
    assert (named.memory_bytes, named.bytes_per_second) == (80 * 10**9, 2.039e12)
    base = Machine(operation_seconds=7.0)
    some = machine_of((("memory", 5),), base)
    assert some == Machine(operation_seconds=7.0, memory_bytes=5)
    assert machine_of(None, base) is base


def test_settings_have_the_machine_of_the_configuration():
    settings = PlanSettings.of(Config(2, device="t4"), precision="float16")
    assert settings.machine == machine_of("t4", precision="float16")
    assert PlanSettings.of(Config(2)).machine == Machine()


def test_what_is_assumed_is_said():
    line = assumptions(machine_of("h100", precision="bfloat16"))
    assert line == (
        "assumed: 772 TFLOP/s, 3.35 TB/s of memory bandwidth, 74.5 GiB of memory; 5 µs an "
        "operation; transfers 5 µs + 360 GB/s"
    )
    assert "memory without limit" in assumptions(Machine())
    assert [rate(x, "B/s") for x in (1, 999.9, 2e15)] == ["1 B/s", "1 kB/s", "2 PB/s"]


def _built(init, device):
    init({"partitions": 2, "microbatches": 2, "device": device})
    model = smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input([64]), *(keras.layers.Dense(64) for _ in range(4))])
    )
    model(tf.zeros([4, 64]))
    return model


def test_plans_of_a_run_keep_to_the_memory_of_the_device(smp_init):
    assert max(_built(smp_init, {"memory": "1MiB"}).plan.prediction.peak_bytes) < 2**20


def test_a_run_that_does_not_fit_the_device_is_refused(smp_init):
    with pytest.raises(smp.PlanError, match=r"fits into 50 KiB per device"):
        _built(smp_init, {"memory": "50KiB"})


def test_devices_multiply_in_the_precision_of_the_model(smp_init):
    smp_init({"partitions": 2, "device": "a100"})
    layers = [keras.layers.Dense(64, dtype="mixed_bfloat16") for _ in range(2)]
    model = smp.DistributedModel.from_keras(keras.Sequential([keras.Input([64]), *layers]))
    model(tf.zeros([4, 64]))
    assert model.plan.settings.machine == machine_of("a100", precision="bfloat16")
