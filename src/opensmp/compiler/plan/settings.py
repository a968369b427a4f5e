"""What a plan was made for."""

from __future__ import annotations

from dataclasses import dataclass, field

from opensmp.compiler.plan.unit_graph import Machine
from opensmp.config import Config


@dataclass(frozen=True)
class PlanSettings:
    """What the costs of a plan depend on besides the model.

    Attributes:
        microbatches: Microbatches of a step.
        pipeline: Name of the schedule, a key of `opensmp.compiler.schedule.pipelines.PIPELINES`.
        active_microbatches: Most microbatches in flight; None leaves it to the schedule.
        optimize: What comes first, `"memory"` or `"speed"`.
        contiguous: Whether each partition must be one connected piece.
        machine: The devices.
        pieces: Pieces of the model for each partition, which take them by turns.

    Example:
        >>> PlanSettings(microbatches=8, machine=Machine(memory_bytes=16 * 2**30))
        PlanSettings(microbatches=8, pipeline='interleaved', ...)
    """

    microbatches: int = 1
    pipeline: str = "interleaved"
    active_microbatches: int | None = None
    optimize: str = "memory"
    contiguous: bool = True
    machine: Machine = field(default_factory=Machine)
    pieces: int = 1

    @classmethod
    def of(cls, config: Config, machine: Machine | None = None) -> PlanSettings:
        """The settings that a configuration asks for."""
        return cls(
            microbatches=config.microbatches,
            pipeline=config.pipeline,
            active_microbatches=config.active_microbatches,
            optimize=config.optimize,
            contiguous=config.contiguous,
            machine=machine or Machine(),
            pieces=config.pieces_per_partition,
        )

    def __str__(self) -> str:
        count = "1 microbatch" if self.microbatches == 1 else f"{self.microbatches} microbatches"
        return f"{count}, pipeline {self.pipeline!r}, optimize {self.optimize!r}"
