"""The settings that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass, field

from opensmp.compiler.plan.unit_graph import Machine
from opensmp.config import Config
from opensmp.config.pipelines import DEFAULT_PIPELINE


@dataclass(frozen=True)
class PlanSettings:
    """The inputs of a plan's costs besides the model.

    Attributes:
        microbatches: Microbatches per step.
        pipeline: Name of the schedule, a key of `opensmp.config.pipelines.PIPELINES`.
        active_microbatches: Maximum number of microbatches in flight; None for the default.
        optimize: Primary objective, `"memory"` or `"speed"`.
        contiguous: Whether each partition must be connected.
        machine: The devices.
        pieces: Pieces (interleaved stages) per partition, assigned round-robin.

    Example:
        >>> PlanSettings(microbatches=8, machine=Machine(memory_bytes=16 * 2**30))
        PlanSettings(microbatches=8, pipeline='interleaved', ...)
    """

    microbatches: int = 1
    pipeline: str = DEFAULT_PIPELINE
    active_microbatches: int | None = None
    optimize: str = "memory"
    contiguous: bool = True
    machine: Machine = field(default_factory=Machine)
    pieces: int = 1

    @classmethod
    def of(cls, config: Config, machine: Machine | None = None) -> PlanSettings:
        """Returns the settings of a configuration."""
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
