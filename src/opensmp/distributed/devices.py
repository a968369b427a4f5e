"""Assigns a device to each partition, and creates logical devices that do not exist yet.

`assign` decides, from numbers alone. `prepare` is the only function with effects: logical CPU
devices and thread pools can be changed only before TensorFlow has run its first operation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import NoReturn

import tensorflow as tf

from opensmp.base.message_text import counted
from opensmp.config import Config
from opensmp.config.pipelines import pipeline_name
from opensmp.errors import AlreadyInitializedError, ConfigError

_logger = logging.getLogger("opensmp")


def count_gpus() -> int:
    """Number of logical GPUs that TensorFlow may use, without initialising TensorFlow."""
    # Listing logical devices would initialise TensorFlow, after which none can be created.
    return sum(
        len(tf.config.get_logical_device_configuration(gpu) or (None,))
        for gpu in tf.config.get_visible_devices("GPU")
    )


def assign(
    config: Config,
    num_gpus: int,
    own: Sequence[int] | None = None,
    local_rank: int = 0,
    local_size: int = 1,
) -> tuple[str, ...]:
    """Assigns a device to every partition.

    Processes of one machine share its GPUs. If this process sees enough GPUs for all of them, it
    takes its share by its local rank; otherwise all GPUs that it sees are its own, as when
    `CUDA_VISIBLE_DEVICES` is set for each process.

    Args:
        config: The configuration; its `devices` decides, or GPUs are preferred.
        num_gpus: Number of available logical GPUs.
        own: The partitions that this process owns; None for all. The others get `"/device:CPU:0"`,
            because nothing of them runs here.
        local_rank: Rank of this process among those of its machine.
        local_size: Number of processes of its machine.

    Returns:
        The logical device of each partition, such as `("/device:CPU:0", "/device:CPU:1")`.

    Raises:
        ConfigError: More GPUs are needed than there are.
    """
    mine = range(config.partitions) if own is None else own
    if isinstance(config.devices, tuple):
        names = {partition: config.devices[partition] for partition in mine}
    else:
        on_gpu = config.devices == "gpu" or (config.devices is None and num_gpus > 0)
        shared = on_gpu and num_gpus >= local_size * len(mine)
        first = local_rank * len(mine) if shared else 0
        kind = "GPU" if on_gpu else "CPU"
        names = {partition: f"{kind}:{first + index}" for index, partition in enumerate(mine)}
    missing = [
        name for name in names.values() if name.startswith("GPU:") and _index(name) >= num_gpus
    ]
    if missing:
        _refuse_gpus(config, num_gpus, missing)
    return tuple(
        f"/device:{names.get(partition, 'CPU:0')}" for partition in range(config.partitions)
    )


def _refuse_gpus(config: Config, num_gpus: int, missing: Sequence[str]) -> NoReturn:
    there = f"{num_gpus or 'no'} GPU{'s' * (num_gpus != 1)}"
    fewer = f"choose partitions={num_gpus} or fewer, or " if num_gpus else ""
    raise ConfigError(
        f"Config: partitions={config.partitions} with devices={config.devices!r} needs "
        f"{', '.join(missing)}, but TensorFlow sees {there}; {fewer}run on the CPU with "
        'smp.init({"devices": "cpu", ...}).'
    )


def prepare(
    devices: Sequence[str], local_size: int = 1, nests: bool = False, writes: bool = False
) -> None:
    """Creates the devices and configures TensorFlow to use them concurrently.

    `nests` says whether calls of functions wait for functions that they call; see `nested_calls`.
    `writes` says whether operations that read and write files shall run beside these calls.
    """
    cpus = [name for name in devices if name.startswith("/device:CPU:")]
    if cpus:
        _make_cpu_devices(1 + max(_index(name) for name in cpus), len(devices))
    if len(cpus) * local_size > 1:
        _share_threads(len(cpus), local_size, nests, writes)
    if len(cpus) < len(devices):
        _grow_gpu_memory()
    if not tf.config.get_soft_device_placement():
        # Some operations, such as those on strings, have no GPU kernel.
        _logger.info("soft device placement was off and is on now")
        tf.config.set_soft_device_placement(True)


def described(config: Config, devices: Sequence[str], size: int) -> str:
    """One line about what `smp.init` made, for the devices of this process's partitions."""
    names = [name.rpartition("device:")[2] for name in devices]
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"
    parts = [
        counted(config.partitions, "partition"),
        counted(config.microbatches, "microbatch"),
        f"schedule '{pipeline_name(config.pipeline)}'",
    ]
    if size > 1:
        parts.append(f"{size} processes")
    parts.append(f"on {shown}" + " in this process" * (size > 1))
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    if threads and "CPU" in shown:
        parts.append(counted(threads, "thread") + " for each operation")
    return ", ".join(parts)


def have_one_core_each(devices: Sequence[str]) -> bool:
    """Whether all partitions of this process are on CPUs and use one compute thread."""
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    return threads == 1 and all(name.startswith("/device:CPU:") for name in devices)


def nested_calls(devices: Sequence[str]) -> int:
    """How deep functions may call others if each partition runs its function in one thread.

    That thread waits for the function that is called, which runs in another one. Unless a thread is
    left when all partitions wait, they wait forever.

    Args:
        devices: Logical devices of this process's partitions, after `prepare`.
    """
    threads = tf.config.threading.get_inter_op_parallelism_threads() or _usable_cores()
    return max(0, (threads - 1) // len(devices))


def _make_cpu_devices(count: int, partitions: int) -> None:
    physical = tf.config.list_physical_devices("CPU")[0]
    configured = tf.config.get_logical_device_configuration(physical)
    if count <= len(configured or (None,)):
        return
    try:
        tf.config.set_logical_device_configuration(
            physical, [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
        )
    except RuntimeError as error:
        # TensorFlow is initialised already, so that listing logical devices has no side effect.
        there = len(tf.config.list_logical_devices("CPU"))
        if there >= count:
            return
        raise AlreadyInitializedError(
            f"smp.init: TensorFlow was already initialised with {there} CPU "
            f"device{'s' * (there != 1)}, but partitions={partitions} need {count}, up to "
            f"CPU:{count - 1}. Devices cannot be made after the first operation, variable or "
            "layer. Call smp.init before any of them, right after the imports; in a notebook "
            "restart the kernel and call smp.init in the first cell. With the devices that are "
            f"there, at most {there} partition{'s' * (there != 1)} can run."
        ) from error


def _share_threads(num_cpus: int, local_size: int, nests: bool, writes: bool) -> None:
    """Sizes TensorFlow's thread pools so that partitions on CPU devices overlap.

    Processes of one machine divide its cores. All CPU devices of a process share one pool per kind.
    With TensorFlow's defaults one operation of one partition spreads over all cores while the
    others wait; with the cores divided among the partitions they run concurrently.
    """
    threading = tf.config.threading
    intra = threading.get_intra_op_parallelism_threads()
    inter = threading.get_inter_op_parallelism_threads()
    try:
        if _is_ours("TF_NUM_INTRAOP_THREADS", intra):
            intra = max(1, _usable_cores() // (num_cpus * local_size))
            threading.set_intra_op_parallelism_threads(intra)
            _pool_sizes["TF_NUM_INTRAOP_THREADS"] = intra
        if _is_ours("TF_NUM_INTEROP_THREADS", inter):
            # One more than partitions if there are sends and receives to overlap, or functions
            # that partitions wait for.
            inter = num_cpus + 1 if local_size > 1 or nests else max(2, num_cpus)
            inter += writes
            threading.set_inter_op_parallelism_threads(inter)
            _pool_sizes["TF_NUM_INTEROP_THREADS"] = inter
    except RuntimeError:
        _logger.info(
            "TensorFlow was already initialised: its thread pools stay as they are, and "
            "partitions on the CPU may overlap less; call smp.init before the first operation"
        )


# Sizes set by an earlier smp.init, which the next one may replace.
_pool_sizes: dict[str, int] = {}


def _is_ours(variable: str, size: int) -> bool:
    """Whether the user has set this pool's size neither by a call nor by the variable."""
    return not os.environ.get(variable) and size in (0, _pool_sizes.get(variable, 0))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _grow_gpu_memory() -> None:
    """Lets GPU memory grow as needed instead of allocating all of it at once.

    TensorFlow requires the same setting on all GPUs, so unused ones get it as well. It refuses once
    it is initialised, and for GPUs divided into logical ones with memory limits; both cases leave
    the setting unchanged. Not tested on a GPU yet.
    """
    for gpu in tf.config.get_visible_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except (RuntimeError, ValueError) as error:
            _logger.info("GPU memory growth of %s stays as it is: %s", gpu.name, error)


def _index(name: str) -> int:
    return int(name.rsplit(":", 1)[1])
