"""One TensorFlow for all tests of a run: four logical CPU devices that overlap."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# A configuration in the environment of whoever runs the tests is not part of them, nor are
# their GPUs: expected devices and bit-equal numbers are those of the CPU.
for _name in [name for name in os.environ if name.startswith(("OPENSMP_", "SM_HP_MP_"))]:
    del os.environ[_name]
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gc  # noqa: E402
import signal  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402
from tensorflow.python.framework import ops  # noqa: E402

from opensmp import _private  # noqa: E402
from opensmp.api import init as bootstrap  # noqa: E402
from opensmp.distributed import world  # noqa: E402

from failures import keep_failures  # noqa: E402  # isort: skip
from longest import has_turn, is_long  # noqa: E402  # isort: skip

# A machine that has much else to do is no fault of a test.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

NUM_DEVICES = 4

# A shell lets what it runs in the background ignore Ctrl-C, and so would all its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration() for _ in range(NUM_DEVICES)],
)
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(NUM_DEVICES)


@pytest.fixture(autouse=True)
def _forget_the_world() -> Iterator[None]:
    """No test sees what another one configured."""
    yield
    bootstrap.shutdown()
    _private.take_pending_variables()  # of calls that failed


@pytest.fixture(autouse=True)
def _forget_gradients() -> Iterator[None]:
    """The graphs of a test go when it ends.

    Each `optimizer.apply_gradients` in a `tf.function` is a `tf.custom_gradient`, and TensorFlow
    keeps those, with the graph that they are of, for the life of the process.
    """
    registry = ops.gradient_registry._registry
    before = set(registry)
    yield
    for name in set(registry) - before:
        if name.startswith("CustomGradient-"):
            del registry[name]


@pytest.fixture(autouse=True)
def _forget_the_caching_device() -> Iterator[None]:
    """An error inside of `tf.map_fn` stays in its test.

    TensorFlow leaves a caching device in the scope of variables of the process then, with which no
    `tf.distribute` strategy can be entered any more.
    """
    yield
    tf.compat.v1.get_variable_scope()._caching_device = None


@pytest.fixture
def smp_init() -> Callable[[Mapping[str, Any] | None], world.World]:
    """`smp_init(config)`: smp.init, again if need be, and the world it made."""

    def init(config: Mapping[str, Any] | None = None) -> world.World:
        bootstrap.shutdown()
        bootstrap.init(config)
        return world.current()

    return init


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the names of failed tests where `scripts/tests_twice.py` asks for them."""
    keep_failures(config)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups, and -m for marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks long tests, and groups those that must stay together in one of several processes.

    Tests of a file share fixtures. The parity suite is one long file, whose layouts of a case
    share the reference of that case. A test that was named is run, long or not.
    """
    named = any("::" in argument for argument in config.args)
    for item in items:
        if is_long(item.nodeid) and not named:
            item.add_marker(pytest.mark.long)
            if not has_turn(item.nodeid):
                item.add_marker(pytest.mark.slow)
        file, _, name = item.nodeid.partition("::")
        if file.endswith("test_parity.py"):
            file += name.partition("-P")[0]
        item.add_marker(pytest.mark.xdist_group(file))


def pytest_collection_finish() -> None:
    """What the libraries and tests are made of stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()
