"""The part of the zoo that a run of the test suite takes: another one every day."""

from __future__ import annotations

import os

from turns import day
from zoo.entry import Entry
from zoo.models import by_size

# Not OPENSMP_...: variables of that name are configuration of the library.
VARIABLE = "ZOO_ROTATION"
ROTATION = int(os.environ.get(VARIABLE) or day())


def rotating(rotation: int) -> list[Entry]:
    """A small backbone and a small application; all have had their turn after some days.

    Args:
        rotation: Number of the part; any integer.
    """
    small = by_size("small")
    backbones = [entry for entry in small if entry.family == "keras_hub"]
    applications = [entry for entry in small if entry.family == "keras.applications"]
    return [backbones[rotation % len(backbones)], applications[rotation % len(applications)]]
