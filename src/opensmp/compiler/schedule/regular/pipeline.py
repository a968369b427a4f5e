"""A pipeline of equal stages and its schedules, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.regular.passes import KINDS_OF_PASSES, WEIGHTS, Passes
from opensmp.config.pipelines import Placement
from opensmp.errors import ScheduleError

Generator = Callable[[int, int, int], Sequence[Passes]]
"""Makes the passes of each device from the numbers of devices, microbatches and pieces."""


@dataclass(frozen=True)
class RegularPipeline:
    """A chain of segments that all take the same time, several on each device.

    Attributes:
        num_devices: Number of devices, >= 1.
        num_microbatches: Number of microbatches, >= 1.
        pieces: Segments of each device, >= 1.
        placement: `"loop"` deals the segments to the devices in turn. `"v"` goes back with every
            second piece, so that of two pieces the first device has the first and the last segment.
        seconds: Time of a forward pass, of a backward pass and of the weight gradients of a
            segment. If the last one is 0, a backward pass computes the weight gradients too.

    Raises:
        ScheduleError: If a number is below 1, or a time is negative.

    Example:
        >>> pipeline = RegularPipeline(num_devices=2, num_microbatches=4, pieces=2, placement="v")
        >>> pipeline.device_of_segment.tolist()
        [0, 1, 1, 0]
    """

    num_devices: int
    num_microbatches: int
    pieces: int = 1
    placement: Placement = "loop"
    seconds: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if min(self.num_devices, self.num_microbatches, self.pieces) < 1 or min(self.seconds) < 0:
            raise ScheduleError(
                f"RegularPipeline: num_devices={self.num_devices}, num_microbatches="
                f"{self.num_microbatches} and pieces={self.pieces} must be at least 1, and "
                f"seconds={self.seconds} not negative."
            )

    @property
    def num_segments(self) -> int:
        """Number of segments on all devices."""
        return self.num_devices * self.pieces

    @property
    def is_split(self) -> bool:
        """Whether weight gradients are passes of their own."""
        return self.seconds[WEIGHTS] > 0

    @property
    def num_actions(self) -> int:
        """Number of actions of a step."""
        return self.num_segments * self.num_microbatches * (3 if self.is_split else 2)

    @cached_property
    def device_of_segment(self) -> NDArray[np.int64]:
        """The device of each segment, shape (segments,)."""
        segments = np.arange(self.num_segments)
        piece, device = np.divmod(segments, self.num_devices)
        back = (self.placement == "v") & (piece % 2 == 1)
        return np.where(back, self.num_devices - 1 - device, device)

    def segment(self, device: int, piece: NDArray[np.int32]) -> NDArray[np.int64]:
        """The segments of a device, by its pieces."""
        back = (self.placement == "v") & (piece % 2 == 1)
        place = np.where(back, self.num_devices - 1 - device, device)
        return piece.astype(np.int64) * self.num_devices + place

    def numbers(self, device: int, passes: Passes) -> NDArray[np.int64]:
        """A number for each pass, as if all were in an array (kind, segment, microbatch)."""
        segment = self.segment(device, passes[:, 1])
        return (passes[:, 0] * self.num_segments + segment) * self.num_microbatches + passes[:, 2]

    def schedule(self, name: str, generator: Generator) -> RegularSchedule:
        """Makes a schedule; weight gradients are left out if they are no passes of their own."""
        passes = generator(self.num_devices, self.num_microbatches, self.pieces)
        if not self.is_split:
            passes = [each[each[:, 0] != WEIGHTS] for each in passes]
        return RegularSchedule(name, self, tuple(passes))

    def graph(self) -> TaskGraph:
        """The same tasks as objects."""
        device: dict[Action, int] = {}
        needs: dict[Action, frozenset[Action]] = {}
        seconds: dict[Action, float] = {}
        for segment, home in enumerate(self.device_of_segment.tolist()):
            for m in range(self.num_microbatches):
                forward, backward, weights = (Action(k, segment, m) for k in KINDS_OF_PASSES)
                needs[forward] = frozenset({Action("F", segment - 1, m)} if segment else ())
                needs[backward] = frozenset({forward})
                if segment + 1 < self.num_segments:
                    needs[backward] |= {Action("B", segment + 1, m)}
                if self.is_split:
                    needs[weights] = frozenset({backward})
                for action, duration in zip(
                    (forward, backward, weights), self.seconds, strict=True
                ):
                    if action in needs:
                        device[action], seconds[action] = home, duration
        return TaskGraph(device, needs, seconds, self.num_devices)


@dataclass(frozen=True, eq=False)
class RegularSchedule:
    """The passes of each device of a regular pipeline.

    Attributes:
        name: Name of the schedule.
        pipeline: What it schedules.
        passes: The passes of each device, in its order.
    """

    name: str
    pipeline: RegularPipeline
    passes: tuple[Passes, ...]

    @property
    def segments_of_pieces(self) -> NDArray[np.int64]:
        """The segment of each piece of each device, shape (devices, pieces)."""
        pieces = np.arange(self.pipeline.pieces, dtype=np.int32)
        devices = range(self.pipeline.num_devices)
        return np.stack([self.pipeline.segment(device, pieces) for device in devices])

    def schedule(self) -> Schedule:
        """The same schedule as objects."""
        return Schedule(
            self.name,
            tuple(
                tuple(
                    Action(KINDS_OF_PASSES[kind], segment, microbatch)
                    for (kind, _, microbatch), segment in zip(
                        passes.tolist(),
                        self.pipeline.segment(device, passes[:, 1]).tolist(),
                        strict=True,
                    )
                )
                for device, passes in enumerate(self.passes)
            ),
        )
