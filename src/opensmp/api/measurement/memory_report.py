"""`smp.memory_report`: the measured peak memory of each partition beside the predicted one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opensmp.compiler.format import format_bytes
from opensmp.compiler.plan.plan import Plan
from opensmp.distributed import world
from opensmp.distributed.collectives.objects import allgather_objects
from opensmp.distributed.world import World
from opensmp.errors import StepError
from opensmp.execution.models import registry
from opensmp.execution.profiling import peak_memory

ALLOCATOR = "allocator"
RESIDENT = "resident"

_HEADINGS = ("partition", "rank", "device", "predicted", "peak", "before", "measured by")
_MEASURED_BY = {ALLOCATOR: "allocator of the device", RESIDENT: "resident memory of the process"}


@dataclass(frozen=True)
class PartitionMemory:
    """The memory of one partition in one rank.

    Attributes:
        partition: Number of the partition.
        rank: Rank that runs it.
        device: Its logical device in that rank; empty if that rank has not told.
        predicted_bytes: Peak that the plans predict: variables, gradients, two slots of an
            optimizer for each weight, and activations in flight. None if a plan has no costs.
        peak_bytes: Measured peak so far; None if this rank does not know it.
        before_bytes: What of it was there before the model: the resident memory of the process at
            the end of `smp.init`; 0 on devices whose allocator counts.
        measured_by: `"allocator"`: TensorFlow's allocator of the device. `"resident"`: the resident
            memory of the whole process (VmHWM), with Python, TensorFlow and the graphs. Empty if
            not measured.
        shares: All partitions that `peak_bytes` is for: those of a process on CPU devices have one
            number.
    """

    partition: int
    rank: int
    device: str
    predicted_bytes: int | None
    peak_bytes: int | None
    before_bytes: int
    measured_by: str
    shares: tuple[int, ...]


@dataclass(frozen=True)
class MemoryReport:
    """The memory of all partitions; `print` shows it as a table.

    Attributes:
        partitions: One entry for each partition of each replica that is known, by rank.

    Example:
        ```python
        report = smp.memory_report()
        print(report)
        report.as_dict()["partitions"][0]["peak_bytes"]
        ```
    """

    partitions: tuple[PartitionMemory, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON accepts; numbers are bytes."""
        rows = [asdict(row) for row in self.partitions]
        return {"partitions": [{**row, "shares": list(row["shares"])} for row in rows]}

    def __str__(self) -> str:
        rows = [_HEADINGS, *map(_cells, self.partitions)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *_notes(self.partitions)])


def memory_report(gather: bool = False) -> MemoryReport:
    """Reports the peak memory of each partition, measured and predicted.

    On a GPU the peak is that of TensorFlow's allocator. The allocator of CPUs does not count, so
    there it is the largest resident memory of the process so far, which includes Python,
    TensorFlow, the graphs and buffers shared with other ranks; what was there at the end of
    `smp.init` is shown beside it. Not tested on GPUs yet.

    By default a rank does not wait for others, so that a single rank may call it. It then knows the
    prediction of all partitions of its replica, but the measured peaks of its own only.

    Args:
        gather: Whether to exchange the peaks, so that each rank has those of all. Then all ranks
            must call it.

    Returns:
        The report.

    Raises:
        StepError: No model has been partitioned since `smp.init`: nothing has run yet.
        NotInitializedError: Without `smp.init`.

    Example:
        ```python
        train_step(images, labels)
        print(smp.memory_report())
        ```
    """
    here = world.current("smp.memory_report")
    predicted = _predicted(here, registry.plans(here))
    rows = _own(here, predicted) if predicted else []
    if gather:
        ranks = here.group(world.WORLD)
        rows = [r for found in allgather_objects(rows, ranks, "smp.memory_report") for r in found]
    elif predicted:
        rows += _elsewhere(here, predicted)
    if not rows:
        raise StepError(
            "smp.memory_report: no DistributedModel has run since smp.init, so that there is "
            "nothing to report. Expected: a call after the first step. Received: a call before "
            "it. Call it after a step, fit, evaluate or predict."
        )
    return MemoryReport(tuple(sorted(rows, key=lambda row: (row.rank, row.partition))))


def _predicted(here: World, plans: Iterable[Plan]) -> list[int | None]:
    """The predicted peak of each partition, of all models together; empty without plans."""
    sums: list[int | None] = []
    for plan in plans:
        sums = sums or [0] * here.config.partitions
        if not plan.has_costs:
            return [None] * len(sums)
        peaks = plan.prediction.peak_bytes
        sums = [None if a is None else a + b for a, b in zip(sums, peaks, strict=True)]
    return sums


def _own(here: World, predicted: Sequence[int | None]) -> list[PartitionMemory]:
    """The partitions of this process, measured."""
    peaks = {p: peak_memory.peak_allocated_bytes(here.devices[p]) for p in here.my_partitions}
    rest = tuple(p for p, peak in peaks.items() if peak is None)
    resident = peak_memory.peak_resident_bytes()
    rows = []
    for partition, peak in peaks.items():
        counts = peak is not None
        rows.append(
            PartitionMemory(
                partition=partition,
                rank=here.rank,
                device=here.devices[partition],
                predicted_bytes=predicted[partition],
                peak_bytes=peak if counts else resident,
                before_bytes=0 if counts else here.resident_bytes,
                measured_by=ALLOCATOR if counts else RESIDENT,
                shares=(partition,) if counts else rest,
            )
        )
    return rows


def _elsewhere(here: World, predicted: Sequence[int | None]) -> list[PartitionMemory]:
    """The partitions of the other processes of this replica, as far as they are known here."""
    return [
        PartitionMemory(
            partition=partition,
            rank=rank,
            device="",
            predicted_bytes=predicted[partition],
            peak_bytes=None,
            before_bytes=0,
            measured_by="",
            shares=(partition,),
        )
        for position, rank in enumerate(here.mp_group)
        if rank != here.rank
        for partition in here.partitions_of(position)
    ]


def _cells(row: PartitionMemory) -> tuple[str, ...]:
    first = row.partition == row.shares[0]
    peak, before = "not measured here", "-"
    if row.peak_bytes is not None:
        peak = _size(row.peak_bytes) if first else f"with {row.shares[0]}"
        before = _size(row.before_bytes) if first else ""
    return (
        str(row.partition),
        str(row.rank),
        row.device.removeprefix("/device:") or "-",
        _size(row.predicted_bytes),
        peak,
        before,
        _MEASURED_BY.get(row.measured_by, "-"),
    )


def _size(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else format_bytes(num_bytes)


def _notes(rows: Sequence[PartitionMemory]) -> Iterator[str]:
    if any(row.measured_by == RESIDENT for row in rows):
        yield (
            "Resident memory includes Python, TensorFlow and the graphs, which are not predicted; "
            '"before" is what of it was there at the end of smp.init.'
        )
    if any(row.peak_bytes is None for row in rows):
        yield "Other ranks measure their own: call smp.memory_report(gather=True) in all ranks."
