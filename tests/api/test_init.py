from __future__ import annotations

import logging

import pytest
import tensorflow as tf
from helpers import output_of, run_python

from opensmp.api import init
from opensmp.config import Config
from opensmp.distributed import devices, world
from opensmp.errors import AlreadyInitializedError, ConfigError, ScheduleError

# ---------------------------------------------------------------- in the process of the tests


def test_init_makes_one_world_and_returns_nothing(caplog):
    with caplog.at_level(logging.DEBUG, logger="opensmp"):
        assert init.init({"partitions": 2, "microbatches": 4}) is None
    made = world.current()
    assert made.config == Config(partitions=2, microbatches=4)
    assert made.devices == ("/device:CPU:0", "/device:CPU:1")
    assert (made.rank, made.size) == (0, 1)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "INFO",
            "2 partitions, 4 microbatches, schedule 'interleaved', on CPU:0, CPU:1, 1 thread for "
            "each operation",
        ),
        ("DEBUG", f"initialised: {made.config}; partitions on /device:CPU:0, /device:CPU:1"),
    ]


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        ({"partitions": 1}, 1, "1 partition, 1 microbatch, schedule 'interleaved', on CPU:0"),
        (
            {"partitions": 12, "microbatches": 24, "pipeline": "mine.json"},
            1,
            "12 partitions, 24 microbatches, schedule 'mine.json', on CPU:0 to CPU:11",
        ),
        (
            {"partitions": 2, "pipeline": "simple"},
            4,
            "2 partitions, 1 microbatch, schedule 'simple', 4 processes, on GPU:0 in this process",
        ),
    ],
)
def test_the_line_of_init_says_what_it_made(config, size, expected):
    made = Config(**config)
    kind, own = ("GPU", 1) if size > 1 else ("CPU", made.partitions)
    names = [f"/device:{kind}:{index}" for index in range(own)]
    line = devices.described(made, names, size)
    assert line.removesuffix(", 1 thread for each operation") == expected


def test_lines_are_printed_where_a_program_has_no_handlers():
    done = run_python("import opensmp as smp; smp.init({'partitions': 2, 'microbatches': 2})")
    assert (done.returncode, done.stdout) == (0, "")
    assert "opensmp info: 2 partitions, 2 microbatches, schedule 'interleaved', on CPU:0" in (
        done.stderr
    )
    quiet = run_python("import opensmp as smp; smp.init({'partitions': 2})", {"OPENSMP_LOG": "off"})
    assert (quiet.returncode, "opensmp" in quiet.stderr) == (0, False)


def test_init_without_arguments_has_one_partition(smp_init):
    assert smp_init().devices == ("/device:CPU:0",)


def test_init_reads_the_environment(smp_init, monkeypatch):
    monkeypatch.setenv("SM_HP_MP_PARAMETERS", '{"partitions": 3, "microbatches": 2}')
    monkeypatch.setenv("OPENSMP_MICROBATCHES", "6")
    config = smp_init().config
    assert (config.partitions, config.microbatches) == (3, 6)


def test_explicit_devices_are_used_in_their_order(smp_init):
    made = smp_init({"devices": ["CPU:3", "CPU:1"]})
    assert made.devices == ("/device:CPU:3", "/device:CPU:1")


def test_second_init_names_the_first_configuration_and_shutdown():
    init.init({"partitions": 2})
    with pytest.raises(AlreadyInitializedError) as caught:
        init.init({"partitions": 3})
    assert f"Received first: {Config(partitions=2)}" in str(caught.value)
    assert "smp.shutdown()" in str(caught.value)
    assert world.current().config.partitions == 2


def test_init_works_again_after_shutdown():
    init.init({"partitions": 4})
    init.shutdown()
    init.init({"partitions": 2})
    assert len(world.current().devices) == 2


def test_shutdown_without_init_does_nothing():
    init.shutdown()
    assert not world.is_initialized()


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"partitions": "2", "microbatches": 0}, ConfigError),
        ({"partitions": 2, "devices": "gpu"}, ConfigError),
        ({"partitions": 64}, AlreadyInitializedError),
    ],
)
def test_failed_init_leaves_nothing_behind(config, error):
    tf.config.list_logical_devices()  # 64 partitions come too late for what has begun
    with pytest.raises(error):
        init.init(config)
    assert not world.is_initialized()
    init.init({"partitions": 2})


def test_launcher_of_one_process_is_no_launcher(smp_init, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert smp_init({"partitions": 2}).size == 1


def test_process_of_a_launcher_must_call_init_before_tensorflow(monkeypatch):
    tf.constant(1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(AlreadyInitializedError, match="can no longer join the other 1"):
        init.init()
    assert not world.is_initialized()


def test_flags_of_the_launcher_are_stronger_than_variables(smp_init, monkeypatch):
    monkeypatch.setenv("OPENSMP_RUN_FLAGS", '{"microbatches": 3}')
    monkeypatch.setenv("OPENSMP_MICROBATCHES", "5")
    assert smp_init({"partitions": 2}).config.microbatches == 3
    assert smp_init({"partitions": 2, "microbatches": 4}).config.microbatches == 4


# ------------------------------------------------------------------- assignment, pure numbers


@pytest.mark.parametrize(
    ("config", "num_gpus", "expected"),
    [
        (Config(partitions=2), 0, ["CPU:0", "CPU:1"]),
        (Config(partitions=2), 2, ["GPU:0", "GPU:1"]),
        (Config(partitions=2), 4, ["GPU:0", "GPU:1"]),
        (Config(partitions=2, devices="gpu"), 2, ["GPU:0", "GPU:1"]),
        (Config(partitions=2, devices="cpu"), 2, ["CPU:0", "CPU:1"]),
        (Config(partitions=2, devices=("CPU:0", "GPU:1")), 2, ["CPU:0", "GPU:1"]),
    ],
)
def test_gpus_come_first_unless_the_cpu_is_asked_for(config, num_gpus, expected):
    assert devices.assign(config, num_gpus) == tuple(f"/device:{name}" for name in expected)


@pytest.mark.parametrize(
    ("config", "num_gpus", "parts"),
    [
        (
            Config(partitions=4),
            2,
            ["partitions=4", "sees 2 GPUs", "needs GPU:2, GPU:3", "choose partitions=2 or fewer"],
        ),
        (Config(partitions=2), 1, ["partitions=2", "sees 1 GPU;", "choose partitions=1 or fewer"]),
        (Config(partitions=1, devices="gpu"), 0, ["sees no GPUs", "devices='gpu'"]),
        (Config(partitions=1, devices=("GPU:3",)), 2, ["needs GPU:3", "sees 2 GPUs"]),
    ],
)
def test_too_few_gpus_is_an_error_that_names_both_numbers_and_the_choices(config, num_gpus, parts):
    with pytest.raises(ConfigError) as caught:
        devices.assign(config, num_gpus)
    for part in [*parts, 'smp.init({"devices": "cpu", ...})']:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "expected"),
    [
        (0, 1, ["CPU:0", "CPU:0", "CPU:0", "CPU:1"]),
        (2, 1, ["CPU:0", "CPU:0", "GPU:0", "GPU:1"]),  # its own, by CUDA_VISIBLE_DEVICES
        (4, 1, ["CPU:0", "CPU:0", "GPU:2", "GPU:3"]),  # all of the machine
        (4, 0, ["CPU:0", "CPU:0", "GPU:0", "GPU:1"]),
    ],
)
def test_process_uses_devices_for_its_own_partitions_alone(num_gpus, local_rank, expected):
    assigned = devices.assign(
        Config(partitions=4), num_gpus, own=(2, 3), local_rank=local_rank, local_size=2
    )
    assert assigned == tuple(f"/device:{name}" for name in expected)


# -------------------------------------------------------------------------- fresh TensorFlow

PREAMBLE = """
import tensorflow as tf
from opensmp.api import init as bootstrap
from opensmp.distributed import devices, world
threading = tf.config.threading
def pools():
    return (threading.get_intra_op_parallelism_threads(),
            threading.get_inter_op_parallelism_threads())
"""


def test_fresh_tensorflow_gets_the_devices_and_pools_that_the_partitions_need():
    out = output_of(
        PREAMBLE
        + """
devices._usable_cores = lambda: 8
bootstrap.init({"partitions": 2})
print(pools())
bootstrap.shutdown()
bootstrap.init({"partitions": 3})  # nothing has run yet: more devices can still be made
print(pools())
print(len(tf.config.list_logical_devices("CPU")))
for device in world.current().devices:
    with tf.device(device):
        print(tf.Variable(1.0).device)
"""
    )
    job = "/job:localhost/replica:0/task:0/device:CPU:"
    assert out.split("\n") == ["(4, 2)", "(2, 3)", "3", f"{job}0", f"{job}1", f"{job}2"]


def test_one_partition_leaves_the_defaults_of_tensorflow_alone():
    out = output_of(
        PREAMBLE
        + """
bootstrap.init()
print(pools(), len(tf.config.list_logical_devices("CPU")))
"""
    )
    assert out == "(0, 0) 1"


def test_a_schedule_file_that_is_not_there_is_refused_by_init(smp_init):
    with pytest.raises(ScheduleError, match=r"'no\.json' of the key pipeline cannot be read"):
        smp_init({"partitions": 2, "microbatches": 2, "pipeline": "no.json"})
    assert not world.is_initialized()


def test_faulty_configuration_makes_no_devices():
    out = output_of(
        PREAMBLE
        + """
for config in ({"partitions": 4, "pipeline": "x"}, {"partitions": 4, "devices": "gpu"}):
    try:
        bootstrap.init(config)
    except ValueError as error:
        print(type(error).__name__)
print(pools(), len(tf.config.list_logical_devices("CPU")), world.is_initialized())
"""
    )
    assert out.split("\n") == ["ConfigError", "ConfigError", "(0, 0) 1 False"]


def test_thread_pools_that_the_user_set_stay():
    out = output_of(
        PREAMBLE
        + """
threading.set_intra_op_parallelism_threads(3)
bootstrap.init({"partitions": 2})
print(pools())
""",
        env={"TF_NUM_INTEROP_THREADS": "5"},
    )
    assert out == "(3, 0)"


def test_tensorflow_used_too_early_is_an_error_that_says_how_to_mend_it():
    out = output_of(
        PREAMBLE
        + """
tf.constant(1)
try:
    bootstrap.init({"partitions": 2})
except Exception as error:
    print(type(error).__name__, error)
print(world.is_initialized())
bootstrap.init({"partitions": 1})
print(world.current().devices)
"""
    )
    message, after, device = out.split("\n")
    assert message.startswith("AlreadyInitializedError smp.init: TensorFlow was already")
    for part in [
        "initialised with 1 CPU device, but partitions=2 need 2",
        "Call smp.init before",
        "restart the kernel",
        "at most 1 partition can run",
    ]:
        assert part in message
    assert after == "False"
    assert device == "('/device:CPU:0',)"


def test_devices_that_the_user_made_are_used():
    out = output_of(
        PREAMBLE
        + """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
import sys
logging.getLogger().handlers[0].setStream(sys.stdout)
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
tf.config.set_soft_device_placement(False)
tf.constant(1)
bootstrap.init({"partitions": 2})
print(world.current().devices, tf.config.get_soft_device_placement())
"""
    )
    assert "opensmp INFO TensorFlow was already initialised: its thread pools stay" in out
    assert "opensmp INFO 2 partitions, 1 microbatch, " in out
    assert out.split("\n")[-1] == "('/device:CPU:0', '/device:CPU:1') True"


def test_values_of_two_partitions_live_on_their_devices():
    out = output_of(
        PREAMBLE
        + """
bootstrap.init({"partitions": 2})
value = tf.eye(3) * 2.0
for device in world.current().devices:
    with tf.device(device):
        value = tf.matmul(value, value)
    print(value.device[-5:], float(value[0, 0]))
"""
    )
    assert out.split("\n") == ["CPU:0 4.0", "CPU:1 16.0"]


def test_an_equal_configuration_is_another_one():
    out = output_of(
        """
import keras, numpy as np
import opensmp as smp
from opensmp.distributed import world
smp.init({"partitions": 2})
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)])
model = smp.DistributedModel.from_keras(model)
x = np.ones((2, 4), "float32")
before = np.array(model(x))
first = model.plan
smp.shutdown()
smp.init({"partitions": 2})
same = (before == np.array(model(x))).all()
print(same, model.plan is not first, model._smp_partitions.is_done(world.current()))
"""
    )
    assert out.splitlines()[-1] == "True True True"
