"""The plan: which operation of a traced graph runs in which partition, and what it costs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.trace.layer_calls import MODEL, LayerCall
from opensmp.errors import PlanError

if TYPE_CHECKING:
    from opensmp.compiler.plan.cost_model import Prediction
    from opensmp.compiler.plan.report.explanation import Explanation
    from opensmp.compiler.plan.report.partition_stats import PartitionRow

Op = Any
LayerEntry = int | Mapping[str, int]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """An assignment of every operation of one traced graph to a partition.

    Attributes:
        model: Name of the model.
        num_partitions: Number of partitions; some may be empty.
        partition_of: Operation name to partition, for every operation that is not
            an input, a variable or a capture.
        calls: The layer calls of the model with their operations.
        settings: What the costs are for.
        source: Where the plan comes from: `"auto"`, `"manual"`, or a file's path.
        graph: The units with their costs, if they are known.
        make_graph: Computes them, if they are not; None where nobody can.

    Example:
        ```python
        model(x)
        print(model.plan)  # a table
        print(model.plan.explain())
        model.plan.plot("plan.svg")
        model.plan.save("plan.json")
        ```
    """

    model: str
    num_partitions: int
    partition_of: Mapping[str, int]
    calls: tuple[LayerCall, ...] = ()
    settings: PlanSettings = field(default_factory=PlanSettings)
    source: str = ""
    graph: CoarseGraph | None = None
    make_graph: Callable[[], CoarseGraph] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "partition_of", MappingProxyType(dict(self.partition_of)))

    # --- where things are --------------------------------------------------------------

    def partition(self, op: Op) -> int:
        """The partition that `op` runs in."""
        return self.partition_of[op.name]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of operations in each partition."""
        counts = Counter(self.partition_of.values())
        return tuple(counts[i] for i in range(self.num_partitions))

    @property
    def empty(self) -> tuple[int, ...]:
        """Partitions that nothing runs in."""
        return tuple(i for i, size in enumerate(self.sizes) if not size)

    @cached_property
    def layers(self) -> Mapping[str, LayerEntry]:
        """The plan by layers, in the order of their calls: label to partition.

        Listed are the outermost layers that lie in one partition as a whole. A layer that
        is cut has entries for the layers inside it; if its own operations are cut, its
        entry is a mapping from pieces to partitions. Where entries contain each other, the
        innermost counts; `*` is for all that has no other entry.
        """
        return MappingProxyType(_layers(self.calls, self.partition_of))

    # --- what it costs ------------------------------------------------------------------

    @cached_property
    def assignment(self) -> NDArray[np.int64]:
        """The partition of each unit of `graph`.

        A unit that is cut by hand counts for the partition of most of its operations.

        Raises:
            PlanError: If the plan has no costs.
        """
        result = []
        for operations in self.costs.operations:
            counts = Counter(self.partition_of[op] for op in operations if op in self.partition_of)
            result.append(min(counts, key=lambda p: (-counts[p], p), default=0))
        return np.array(result, dtype=np.int64)

    @cached_property
    def prediction(self) -> Prediction:
        """Predicted times and memory.

        Raises:
            PlanError: If the plan has no costs.
        """
        return self.predict(self.assignment)

    @cached_property
    def rows(self) -> tuple[PartitionRow, ...]:
        """One row of the plan's table per partition.

        Raises:
            PlanError: If the plan has no costs.
        """
        from opensmp.compiler.plan.report.partition_stats import partition_rows

        return partition_rows(self)

    def predict(self, assignment: NDArray[np.int64]) -> Prediction:
        """Times and memory of another assignment of the same units.

        Args:
            assignment: Partition of each unit of `graph`, int64.
        """
        from opensmp.compiler.plan.cost_model import evaluate

        settings = self.settings
        return evaluate(
            self.costs,
            assignment,
            self.num_partitions,
            settings.machine,
            settings.microbatches,
            pipeline=settings.pipeline,
            active_microbatches=settings.active_microbatches,
            monotone=False,
        )

    @cached_property
    def costs(self) -> CoarseGraph:
        """The units of the model with their costs.

        Raises:
            PlanError: If they are not known and cannot be computed.
        """
        if self.graph is not None:
            return self.graph
        if self.make_graph is not None:
            return self.make_graph()
        raise PlanError(
            f"Plan of '{self.model}': it says where operations go, but not what they cost. "
            "Expected: a plan of model.plan, of `opensmp plan`, or a file saved from one."
        )

    @property
    def has_costs(self) -> bool:
        """Whether the costs are known or can be computed."""
        return self.graph is not None or self.make_graph is not None

    # --- looking at it ------------------------------------------------------------------

    def explain(self) -> Explanation:
        """Says why the cuts are where they are, and what the next best ones would cost.

        Raises:
            PlanError: If the plan has no costs.

        Example:
            ```python
            print(model.plan.explain())
            ```
        """
        from opensmp.compiler.plan.report.explanation import explain

        return explain(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the plan: its partitions over the layers, what is cut, and the schedule.

        Args:
            path: File to write, SVG, PNG or PDF by its suffix; an existing one is replaced.

        Returns:
            A `matplotlib.figure.Figure`; a notebook shows it.

        Raises:
            PlanError: If the plan has no costs.

        Example:
            ```python
            model.plan.plot("plan.svg")
            ```
        """
        from opensmp.compiler.plan.report.picture import draw_plan

        return draw_plan(self, path)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{i}: {n} operations" for i, n in enumerate(self.sizes))
        return f"Plan of {self.model} over {self.num_partitions} partitions ({sizes})"

    def __str__(self) -> str:
        if not self.has_costs:
            return repr(self)
        from opensmp.compiler.plan.report.table import plan_text

        return plan_text(self)

    # --- keeping it ---------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; see `opensmp.compiler.plan.serialization.plan_file`."""
        from opensmp.compiler.plan.serialization.plan_file import to_json

        return to_json(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as a JSON file that can be edited and used again.

        Args:
            path: File to write; an existing one is replaced.

        Example:
            ```python
            model.plan.save("plan.json")
            # the next run: smp.init({"partitions": 2, "plan": "plan.json"})
            ```
        """
        from opensmp.compiler.plan.serialization.plan_file import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan from a file written by `save`, edited or not.

        Args:
            path: The file.

        Raises:
            PlanError: If it cannot be read or has faults; all of them are listed.

        Example:
            ```python
            print(Plan.load("plan.json"))
            ```
        """
        from opensmp.compiler.plan.serialization.plan_file import load

        return load(path)


def _layers(calls: Sequence[LayerCall], partition_of: Mapping[str, int]) -> dict[str, LayerEntry]:
    inside: dict[str, set[int]] = {}  # partitions of a call and of all calls inside it
    own: dict[str, dict[str, int]] = {}
    for call in calls:
        own[call.label] = {p.name: partition_of[p.operations[0]] for p in call.pieces}
        label = call.label
        while label:
            inside.setdefault(label, set()).update(own[call.label].values())
            label = label.rpartition("/")[0]
    entries: dict[str, LayerEntry] = {}
    for call in calls:
        label, pieces = call.label, own[call.label]
        covered = _parent_entry(label, entries)
        if covered is not None and len(inside[covered]) == 1:
            continue  # a layer around it lies in one partition
        if label != MODEL and len(inside[label]) == 1:
            (entries[label],) = inside[label]
        elif len(set(pieces.values())) > 1:
            entries[label] = pieces
        elif pieces:
            entries[label] = next(iter(pieces.values()))
    return entries


def _parent_entry(label: str, entries: Mapping[str, LayerEntry]) -> str | None:
    while label := label.rpartition("/")[0]:
        if label in entries:
            return label
    return None
