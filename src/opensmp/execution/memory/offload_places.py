"""Where partitions offload to: checked when a run starts, opened when a step is traced."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from opensmp.config import Config
from opensmp.config.faults import raise_all
from opensmp.config.offload import NONE, level_of
from opensmp.distributed.world import World
from opensmp.execution.memory.spill_file import SpillFile

_logger = logging.getLogger("opensmp")

_IN_MEMORY = ("tmpfs", "ramfs")


def check_offload(config: Config, devices: Sequence[str], own: Sequence[int]) -> None:
    """Raises if the partitions of this process cannot offload as configured.

    Args:
        config: The configuration.
        devices: The device of each partition.
        own: The partitions of this process.

    Raises:
        ConfigError: Partitions on CPUs have no folder, or it cannot be used.
    """
    offloading = [p for p in own if level_of(config.offload, p) != NONE]
    faults = []
    on_cpu = [p for p in offloading if on_cpu_device(devices[p])]
    if on_cpu and config.offload_folder is None:
        faults.append(
            f"offload: partition {on_cpu[0]} is on {devices[on_cpu[0]]}, whose memory is that of "
            "the host, so that nothing is gained by moving anything there. Name a folder on a "
            'disk with "offload_folder": "/path/to/folder", or set "offload" to "none"'
        )
    elif on_cpu:
        faults += _faults_of(str(config.offload_folder))
    raise_all(faults)


def on_cpu_device(device: str) -> bool:
    """Whether a device is a CPU."""
    return "CPU:" in device


def uses_files(config: Config, devices: Sequence[str], own: Sequence[int]) -> bool:
    """Whether a partition of this process offloads to files."""
    return any(level_of(config.offload, p) != NONE and on_cpu_device(devices[p]) for p in own)


_opened: tuple[World, SpillFile] | None = None


def spill_file(world: World) -> SpillFile:
    """The file of this process, for all steps since `smp.init`."""
    global _opened
    if _opened is None or _opened[0] is not world:
        _opened = world, SpillFile(str(world.config.offload_folder))
    return _opened[1]


def _faults_of(folder: str) -> list[str]:
    """What speaks against a folder; warns if it is in memory."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"opensmp")
    except OSError as error:
        return [
            f"offload_folder: no file can be written in '{folder}' ({error.strerror}). Expected: "
            "an existing folder on a disk that this process may write to"
        ]
    kind = _file_system(folder)
    if kind in _IN_MEMORY:
        _logger.warning(
            "offload_folder '%s' is in memory (%s), so that offloading saves none; choose a folder "
            "on a disk",
            folder,
            kind,
        )
    return []


def _file_system(folder: str) -> str:
    """Type of the file system of a folder, in Linux; otherwise empty."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        device = os.stat(folder).st_dev
    except OSError:
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        words = line.split(" ")
        if words[2] == number:
            return words[words.index("-") + 1]
    return ""
