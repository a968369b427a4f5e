"""How a model is run: what `smp.init` would be given, and what describes runs of other systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opensmp.base.message_text import counted, shown
from opensmp.config import offload as offloading
from opensmp.config import recompute as recomputing
from opensmp.config.faults import contradictions
from opensmp.config.keys import KEYS
from opensmp.config.kinds import is_count
from opensmp.config.pipelines import DEFAULT_PIPELINE, OwnPipeline, pipeline_name, row_of
from opensmp.config.sources import Given
from opensmp.errors import PlanError

_MOST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Run:
    """A way to train a model on a cluster.

    Attributes:
        partitions: Partitions of a replica.
        replicas: Copies of the model, which sum up their gradients.
        microbatches: Microbatches of a replica's part of the batch.
        pipeline: A schedule, as the key `pipeline`.
        pieces: Pieces of each partition, as `pieces_per_partition`; a V always has two.
        active_microbatches: Most microbatches in flight; None for as many as equal stages need.
        recompute: What backward passes compute again, as the key `recompute`.
        offload: What is kept in the memory of the host, as the key `offload`.
        shard_optimizer_state: Whether each replica keeps a part of the optimizer's state.
        overlap_all_reduce: Whether gradients are summed up while the last microbatch is still in
            its backward pass. This library does it afterwards.
        placement_strategy: `"cluster"` or `"spread"`, as the key.
        split_backward: Whether gradients of inputs leave before those of the weights are computed,
            as in this library; False for other systems.
        blocking_transfers: Whether a device computes nothing while it sends, as in Megatron-LM's
            1F1B; False where transfers overlap with other passes.
        tensor_parallel: Devices that share each partition, as in Megatron-LM. This library has no
            tensor parallelism: it is for comparisons with runs of others.

    Raises:
        PlanError: If a value is invalid, or two contradict each other; the message lists all.
    """

    partitions: int = 1
    replicas: int = 1
    microbatches: int = 1
    pipeline: OwnPipeline = DEFAULT_PIPELINE
    pieces: int = 1
    active_microbatches: int | None = None
    recompute: recomputing.Setting = recomputing.NONE
    offload: offloading.Setting = offloading.NONE
    shard_optimizer_state: bool = False
    overlap_all_reduce: bool = False
    placement_strategy: str = "cluster"
    split_backward: bool = True
    blocking_transfers: bool = False
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        faults = [
            f"{name} is an integer from 1 to {_MOST}; received {shown(value)}"
            for name in ("replicas", "tensor_parallel")
            for value in [getattr(self, name)]
            if not is_count(value, _MOST)
        ]
        keys = {
            "partitions": self.partitions,
            "microbatches": self.microbatches,
            "pipeline": self.pipeline,
            "pieces_per_partition": self.pieces,
            "active_microbatches": self.active_microbatches,
            "shard_optimizer_state": self.shard_optimizer_state,
            "placement_strategy": self.placement_strategy,
            "recompute": self.recompute,
            "offload": self.offload,
        }
        given: dict[str, Given] = {}
        for name, value in keys.items():
            try:
                given[name] = Given(name, KEYS[name].kind.check(value), "simulation")
            except ValueError as error:
                hint = f"; {error}" if str(error) else ""
                faults.append(
                    f"{name} is {KEYS[name].kind.accepted}; received {shown(value)}{hint}"
                )
        faults += contradictions(given)
        if faults:
            raise PlanError(f"Simulation: {'; '.join(faults)}.")
        for name in ("recompute", "offload"):
            object.__setattr__(self, name, given[name].value)
        wanted = row_of(self.pipeline).pieces
        if wanted is not None:
            object.__setattr__(self, "pieces", wanted)

    @property
    def num_segments(self) -> int:
        """Segments of the model, several for each partition if it has several pieces."""
        return self.partitions * self.pieces

    def settings(self, active: int | None = None) -> dict[str, Any]:
        """Returns the keys for `smp.init` that differ from their defaults."""
        keys: dict[str, Any] = {
            "partitions": self.partitions,
            "microbatches": self.microbatches,
            "pipeline": pipeline_name(self.pipeline),
        }
        row = row_of(self.pipeline)
        if self.pieces > 1 and row.pieces is None:
            keys["pieces_per_partition"] = self.pieces
        if self.active_microbatches is not None:
            keys["active_microbatches"] = self.active_microbatches
        elif active is not None and row.held is None and not row.holds_all:
            keys["active_microbatches"] = active
        if self.recompute != recomputing.NONE:
            keys["recompute"] = recomputing.as_dict(self.recompute)
        if self.offload != offloading.NONE:
            keys["offload"] = offloading.as_dict(self.offload)
        if self.shard_optimizer_state:
            keys["shard_optimizer_state"] = True
        if self.placement_strategy != "cluster":
            keys["placement_strategy"] = self.placement_strategy
        return keys

    def __str__(self) -> str:
        words = [counted(self.partitions, "partition")]
        if self.pieces > 1:
            words[0] += f" of {self.pieces} pieces"
        if self.tensor_parallel > 1:
            words.append(f"{self.tensor_parallel} devices each")
        words += [counted(self.replicas, "replica"), counted(self.microbatches, "microbatch")]
        words.append(f"pipeline {pipeline_name(self.pipeline)!r}")
        if self.recompute != recomputing.NONE:
            words.append(f"recompute {recomputing.as_dict(self.recompute)}")
        words += ["offload"] * (self.offload != offloading.NONE)
        words += ["sharded optimizer state"] * self.shard_optimizer_state
        return ", ".join(words)
