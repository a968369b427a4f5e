"""What a device runs, as an array of passes, and schedules that repeat one block of passes.

`Passes` is an int32 array of shape (number of passes, 3). Its columns are the kind (`FORWARD`,
`BACKWARD` or `WEIGHTS`), the piece of the device (0 for the first that a microbatch goes through)
and the microbatch. The functions that make schedules of equal stages return one array a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Passes = NDArray[np.int32]

FORWARD, BACKWARD, WEIGHTS = range(3)
KINDS_OF_PASSES = "FBW"


def listed(passes: Iterable[tuple[int, int, int]]) -> Passes:
    """Returns the array of passes (kind, piece, microbatch)."""
    return np.array(list(passes), dtype=np.int32).reshape(-1, 3)


class Turns(NamedTuple):
    """How a microbatch goes through a V of two pieces a device, in units of one pass.

    A building block as in Qi et al., "Pipeline Parallelism with Controllable Memory", 2024. Its
    passes start again every six units with the next microbatch; no two of a device may fall on the
    same unit, counted modulo six.

    Attributes:
        down: Units from device to device in the forward pass of the first pieces.
        up: The same for the forward pass of the second pieces.
        back_down: The same for the backward pass of the second pieces.
        back_up: The same for the backward pass of the first pieces.
        at_last: Units between the two forward passes of the last device.
        at_first: Units between the last forward and the first backward pass, on the first device.
        back_at_last: Units between the two backward passes of the last device.
    """

    down: int
    up: int
    back_down: int
    back_up: int
    at_last: int
    at_first: int
    back_at_last: int


_PERIOD = 6


def repeated(turns: Turns, num_devices: int, num_microbatches: int) -> list[Passes]:
    """Returns the passes of each device if the block is repeated for each microbatch.

    Only their order counts: devices run it without the gaps.
    """
    last = num_devices - 1
    found = []
    for device in range(num_devices):
        first_forward = turns.down * device
        second_forward = turns.down * last + turns.at_last + turns.up * (last - device)
        turned = turns.down * last + turns.at_last + turns.up * last + turns.at_first
        second_backward = turned + turns.back_down * device
        turned += turns.back_down * last + turns.back_at_last
        first_backward = turned + turns.back_up * (last - device)
        found.append(
            _repeated(
                (first_forward, second_forward), (first_backward, second_backward), num_microbatches
            )
        )
    return found


def _repeated(forward: Sequence[int], backward: Sequence[int], num_microbatches: int) -> Passes:
    """Passes of one device, from the first start of each piece's forward and backward pass."""
    taken = {start % _PERIOD for start in (*forward, *backward)}
    assert len(taken) == len(forward) + len(backward), "two passes at the same time"
    free = [unit for unit in range(_PERIOD) if unit not in taken]
    weights = min(
        (_after(backward, free), _after(backward, free[::-1])), key=sum
    )  # as soon after the backward passes as there is room
    starts = np.array([forward, backward, weights], dtype=np.int64)
    times = starts[:, :, np.newaxis] + _PERIOD * np.arange(num_microbatches)
    order = np.argsort(times, axis=None)
    return np.stack(np.unravel_index(order, times.shape), axis=1).astype(np.int32)


def _after(backward: Sequence[int], free: Sequence[int]) -> list[int]:
    return [
        start + 1 + (unit - start - 1) % _PERIOD for start, unit in zip(backward, free, strict=True)
    ]
