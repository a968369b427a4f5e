"""Schedules by name for pipelines of any size, as arrays where that is possible."""

from __future__ import annotations

import importlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.schedule.regular.list_scheduling import list_regular
from opensmp.compiler.schedule.regular.passes import BACKWARD, FORWARD, WEIGHTS, Passes, listed
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline, RegularSchedule
from opensmp.config.pipelines import PIPELINES

_BY_LIST = ("simple", "interleaved", "zero_bubble")
_MOST_KEPT = 256


def is_regular(name: str, pieces: int, partitions: int, microbatches: int) -> bool:
    """Whether a schedule can be made as arrays."""
    if name == "interleaved" and pieces > 1:
        return microbatches % partitions == 0
    return name in PIPELINES and name != "auto" and (name not in _BY_LIST or pieces == 1)


@lru_cache(maxsize=_MOST_KEPT)
def regular_order(
    name: str, partitions: int, microbatches: int, pieces: int, is_split: bool, active: int | None
) -> RegularSchedule:
    """Returns the order of a schedule for equal stages.

    Args:
        name: A schedule for which `is_regular` holds.
        partitions: Number of devices.
        microbatches: Number of microbatches.
        pieces: Segments of each device.
        is_split: Whether weight gradients are passes of their own.
        active: Most microbatches in flight of the schedules that ask for it; None for as many as
            equal stages need.
    """
    row = PIPELINES[name]
    seconds = (1.0, 1.0, 1.0) if is_split else (1.0, 2.0, 0.0)
    pipeline = RegularPipeline(partitions, microbatches, pieces, row.placement, seconds)
    if name == "interleaved" and pieces > 1:
        return pipeline.schedule(name, looped)
    if name in _BY_LIST:
        needed = partitions + 2 if row.defers_weights else partitions
        return list_regular(name, pipeline, max(1, active or min(needed, microbatches)))
    module = importlib.import_module(f"opensmp.compiler.schedule.methods.{name}")
    return pipeline.schedule(name, module.passes)


def looped(num_devices: int, num_microbatches: int, pieces: int) -> list[Passes]:
    """Interleaved 1F1B of several pieces a device, for microbatches in groups of one per device.

    The order of Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters
    Using Megatron-LM", SC 2021, section 2.2: device d of P runs 2 (P - d - 1) + (pieces - 1) P
    forward passes ahead, then a forward and a backward pass in turn.
    """
    groups = range(0, num_microbatches, num_devices)
    turns = [
        (piece, microbatch)
        for first in groups
        for piece in range(pieces)
        for microbatch in range(first, min(first + num_devices, num_microbatches))
    ]
    found = []
    for device in range(num_devices):
        ahead = min(len(turns), 2 * (num_devices - device - 1) + (pieces - 1) * num_devices)
        rows = [(FORWARD, *turn) for turn in turns[:ahead]]
        for number, (piece, microbatch) in enumerate(turns):
            if ahead + number < len(turns):
                rows.append((FORWARD, *turns[ahead + number]))
            back = pieces - 1 - piece
            rows += [(BACKWARD, back, microbatch), (WEIGHTS, back, microbatch)]
        found.append(listed(rows))
    return found


def held_activations(schedule: RegularSchedule) -> NDArray[np.int64]:
    """Returns the most forward results that each device holds at once, by piece.

    Shape (devices, pieces): what there is of each piece when all pieces together are most. A result
    is held until the last pass of its segment for its microbatch; the order alone says it.
    """
    pieces = schedule.pipeline.pieces
    last = WEIGHTS if schedule.pipeline.is_split else BACKWARD
    found = np.zeros((len(schedule.passes), pieces), dtype=np.int64)
    for device, passes in enumerate(schedule.passes):
        change = (passes[:, 0] == FORWARD).astype(np.int64)
        change[1:] -= passes[:-1, 0] == last  # free once the pass has ended
        by_piece = np.zeros((len(passes), pieces), dtype=np.int64)
        begins = passes[:, 0] == FORWARD
        by_piece[np.flatnonzero(begins), passes[begins, 1]] = 1
        ends = np.flatnonzero(passes[:-1, 0] == last)
        by_piece[ends + 1, passes[ends, 1]] -= 1
        held = np.cumsum(by_piece, axis=0)
        found[device] = held[int(held.sum(axis=1).argmax())]
    return found
