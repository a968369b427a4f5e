"""Where partitions offload to: what is refused, and what is told."""

from __future__ import annotations

import logging
import os

import pytest

import opensmp as smp
from opensmp.errors import ConfigError


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"offload": "residuals"}, '"offload_folder": "/path/to/folder"'),
        ({"offload": {1: "residuals"}}, "partition 1 is on /device:CPU:1"),
        ({"offload": "residuals", "offload_folder": "/nowhere"}, "No such file or directory"),
        ({"offload": "residuals", "offload_folder": "/proc"}, "no file can be written"),
    ],
)
def test_what_is_not_possible_is_refused(keys, message):
    smp.shutdown()
    with pytest.raises(ConfigError, match=message):
        smp.init({"partitions": 2, "microbatches": 4, **keys})
    assert not smp.is_initialized()


def test_a_folder_in_memory_is_told(caplog):
    smp.shutdown()
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no folder in memory here")
    with caplog.at_level(logging.WARNING, logger="opensmp"):
        smp.init({"partitions": 2, "offload": "residuals", "offload_folder": "/dev/shm"})
    assert "'/dev/shm' is in memory (tmpfs)" in caplog.text
