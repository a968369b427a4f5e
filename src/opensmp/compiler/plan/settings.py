"""The settings that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opensmp.base.message_text import counted
from opensmp.compiler.cluster.machine import machine_of
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.compiler.schedule.regular.orders import (
    held_activations,
    is_regular,
    regular_order,
)
from opensmp.config import Config
from opensmp.config import offload as offloading
from opensmp.config.device import FLOAT32
from opensmp.config.pipelines import (
    DEFAULT_PIPELINE,
    PIPELINES,
    OwnPipeline,
    most_in_flight,
    pipeline_name,
)
from opensmp.config.recompute import NONE, Setting, as_dict

_MOST_SCHEDULED = 256  # partitions up to which the schedule says what each of them holds


@dataclass(frozen=True)
class PlanSettings:
    """The inputs of a plan's costs besides the model.

    Attributes:
        microbatches: Microbatches per step.
        pipeline: Name of the schedule, a key of `opensmp.config.pipelines.PIPELINES`.
        active_microbatches: Maximum number of microbatches in flight, unless the schedule
            keeps all; None for as few as keep the partitions busy.
        optimize: `"speed"` minimizes the step time. `"memory"` minimizes the peak of the fullest
            device and, among plans within 2 % of that, the step time.
        contiguous: Whether each partition must be connected (within each component, if the graph
            itself is not connected). Dropped if no such plan is found that fits the memory.
        machine: The devices; no partition exceeds their memory.
        pieces: Pieces (interleaved stages) per partition, unless the schedule says how many.
        recompute: What backward passes compute again, as in the configuration. `"auto"` recomputes
            in the partitions that would not fit the memory otherwise.
        offload: What partitions keep elsewhere, as in the configuration.
        own: A schedule of a user's own, which a step runs in place of `pipeline`. Files do not
            have it.
    """

    microbatches: int = 1
    pipeline: str = DEFAULT_PIPELINE
    active_microbatches: int | None = None
    optimize: str = "memory"
    contiguous: bool = True
    machine: Machine = field(default_factory=Machine)
    pieces: int = 1
    recompute: Setting = NONE
    offload: offloading.Setting = offloading.NONE
    own: OwnPipeline | None = None

    @property
    def scheduled(self) -> OwnPipeline:
        """The schedule that a step runs."""
        return self.pipeline if self.own is None else self.own

    @property
    def pieces_per_partition(self) -> int:
        """Number of pieces of each partition: that of the schedule, or else `pieces`."""
        return PIPELINES[self.pipeline].pieces or self.pieces

    def partition_of_stage(
        self, stages: NDArray[np.int64], num_partitions: int
    ) -> NDArray[np.int64]:
        """Returns the partitions of stages that are numbered in model order.

        Round-robin, as in Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
        Clusters Using Megatron-LM", SC 2021, section 2.2; or back and forth for a schedule of a V.
        """
        piece, place = np.divmod(stages, num_partitions)
        back = (PIPELINES[self.pipeline].placement == "v") & (piece % 2 == 1)
        return np.where(back, num_partitions - 1 - place, place)

    def microbatches_in_flight(self, num_partitions: int) -> int:
        """Returns the maximum number of microbatches whose residuals a device holds at once."""
        row = PIPELINES[self.pipeline]
        active = self.active_microbatches
        if self.own is not None:  # it may hold all
            return self.microbatches if active is None else min(self.microbatches, active)
        if row.holds_all:
            return self.microbatches
        if row.held is not None:
            held = row.held(num_partitions)
            return min(self.microbatches, held if active is None else min(held, active))
        if active is None:
            # A chain of equal partitions needs as many microbatches as there are partitions, and
            # up to two more if weight gradients wait or microbatches return to a partition.
            returns = row.defers_weights or self.pieces_per_partition > 1
            active = most_in_flight(num_partitions) if returns else num_partitions
        return min(self.microbatches, active)

    def microbatches_held(self, num_partitions: int) -> NDArray[np.int64]:
        """Returns the most microbatches whose residuals each partition holds at once.

        Those of the schedule of equal stages, where it can be made in little time; otherwise, and
        for an order of a user's own, as many as are in flight.
        """
        most = self.microbatches_in_flight(num_partitions)
        name, pieces = self.pipeline, self.pieces_per_partition
        row, active = PIPELINES[name], self.active_microbatches
        # A fixed order with fewer microbatches in flight is made by list; so are several pieces.
        is_bound = row.held is not None and active is not None and active < self.microbatches
        is_known = self.own is None and not is_bound and (row.pieces is not None or pieces == 1)
        # Enough for a steady state.
        count = min(self.microbatches, 3 * num_partitions + 2)
        if (
            not is_known
            or row.holds_all
            or num_partitions > _MOST_SCHEDULED
            or not is_regular(name, pieces, num_partitions, count)
        ):
            return np.full(num_partitions, most, dtype=np.int64)
        active = None if row.held is not None else min(most, count)
        held = _held(name, num_partitions, count, pieces, active)
        return np.minimum(np.array(held, dtype=np.int64), most)

    def microbatches_resident(self, num_partitions: int) -> NDArray[np.int64]:
        """Returns of how many microbatches each partition has the residuals in its memory."""
        return self.resident_of(self.microbatches_held(num_partitions))

    def resident_of(self, held: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns of how many of the microbatches held the residuals are in memory."""
        away = [offloading.offloads_residuals(self.offload, p) for p in range(len(held))]
        return np.where(away, np.minimum(held, offloading.MOST_RESIDENT), held)

    def microbatches_in_memory(self, num_partitions: int, partition: int | None = None) -> int:
        """Returns of how many microbatches in flight the residuals are in a device's memory.

        Args:
            num_partitions: Number of partitions.
            partition: The partition; None for an upper bound that holds for each of them.
        """
        if partition is not None:
            return int(self.microbatches_resident(num_partitions)[partition])
        held = self.microbatches_in_flight(num_partitions)
        is_away = self.offload in (offloading.RESIDUALS, offloading.ALL)
        return min(held, offloading.MOST_RESIDENT) if is_away else held

    @property
    def offloads_all_slots(self) -> bool:
        """Whether all partitions offload the optimizer's state."""
        return self.offload in (offloading.OPTIMIZER, offloading.ALL)

    @classmethod
    def of(
        cls, config: Config, machine: Machine | None = None, precision: str = FLOAT32
    ) -> PlanSettings:
        """Returns the settings of a configuration.

        Args:
            config: The configuration.
            machine: The devices, as far as the key `device` does not say.
            precision: Dtype of matrix products; see `opensmp.compiler.costs.precision`.
        """
        name = pipeline_name(config.pipeline)
        return cls(
            microbatches=config.microbatches,
            # An order of a user's own is known only for the tasks of a step.
            pipeline=name if name in PIPELINES else DEFAULT_PIPELINE,
            own=None if name in PIPELINES else config.pipeline,
            active_microbatches=config.active_microbatches,
            optimize=config.optimize,
            contiguous=config.contiguous,
            machine=machine_of(config.device, machine, precision),
            pieces=config.pieces_per_partition,
            recompute=config.recompute,
            offload=config.offload,
        )

    def __str__(self) -> str:
        count = counted(self.microbatches, "microbatch")
        again = "" if self.recompute == NONE else f", recompute {as_dict(self.recompute)!r}"
        away = offloading.as_dict(self.offload)
        away = "" if away == offloading.NONE else f", offload {away!r}"
        name = pipeline_name(self.scheduled)
        return f"{count}, pipeline {name!r}, optimize {self.optimize!r}{again}{away}"


@lru_cache(maxsize=256)
def _held(
    name: str, partitions: int, microbatches: int, pieces: int, active: int | None
) -> tuple[int, ...]:
    """Returns the most microbatches that each partition holds in the schedule of equal stages."""
    order = regular_order(name, partitions, microbatches, pieces, True, active)
    return tuple((-(-held_activations(order).sum(axis=1) // pieces)).tolist())
