"""The plan: assigns each operation of a traced graph to a partition, with predicted costs."""

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

from opensmp.base import notebook
from opensmp.base.message_text import counted
from opensmp.base.types import Op
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.trace.layer_calls import MODEL, LayerCall
from opensmp.config.device import FLOAT32
from opensmp.errors import PlanError

if TYPE_CHECKING:
    from opensmp.compiler.cluster.cluster import Cluster
    from opensmp.compiler.plan.cost_model import Prediction
    from opensmp.compiler.plan.report.explanation import Explanation
    from opensmp.compiler.plan.report.partition_stats import PartitionRow
    from opensmp.compiler.simulation.step import SimulatedStep

LayerEntry = int | Mapping[str, int]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """An assignment of every operation of one traced graph to a partition.

    Attributes:
        model: Name of the model.
        num_partitions: Number of partitions; some may be empty.
        partition_of: Maps operation names to partitions, for every operation that is not an input,
            a variable or a capture.
        calls: The layer calls of the model with their operations.
        settings: The settings that the costs are predicted for.
        source: Origin of the plan: `"auto"`, `"manual"`, or the path of a file.
        graph: The units with their costs, if they are known.
        make_graph: Computes `graph` on demand if it is unknown; None if that is impossible.

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

    # --- placement ----------------------------------------------------------------------

    def partition(self, op: Op) -> int:
        """Returns the partition of an operation."""
        return self.partition_of[op.name]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of operations in each partition."""
        counts = Counter(self.partition_of.values())
        return tuple(counts[i] for i in range(self.num_partitions))

    @property
    def empty(self) -> tuple[int, ...]:
        """Partitions without operations."""
        return tuple(i for i, size in enumerate(self.sizes) if not size)

    @cached_property
    def layers(self) -> Mapping[str, LayerEntry]:
        """The plan by layers, in the order of their calls: label to partition.

        It lists the outermost layers that lie entirely in one partition. A layer that is cut has
        entries for the layers inside it; if its own operations are cut, its entry is a mapping from
        pieces to partitions. If entries are nested, the innermost applies; `*` applies to
        everything without another entry.
        """
        return MappingProxyType(_layers(self.calls, self.partition_of))

    # --- costs --------------------------------------------------------------------------

    @cached_property
    def assignment(self) -> NDArray[np.int64]:
        """The partition of each unit of `graph`.

        A unit that a manual plan cuts counts for the partition of most of its operations.

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
        """Predicts times and memory of another assignment of the same units.

        Args:
            assignment: Partition of each unit of `graph`, int64.
        """
        from opensmp.compiler.plan.cost_model import evaluate

        return evaluate(
            self.costs,
            assignment,
            self.num_partitions,
            self.settings,
            monotone=False,
            by_schedule=True,
        )

    @cached_property
    def costs(self) -> CoarseGraph:
        """The units of the model with their costs.

        Raises:
            PlanError: If they are neither known nor computable.
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

    # --- simulation ---------------------------------------------------------------------

    def simulate(
        self, cluster: Cluster | None = None, *, precision: str = FLOAT32, **run: Any
    ) -> SimulatedStep:
        """Predicts a step on a cluster that need not be at hand.

        Args:
            cluster: The devices and links, an `smp.Cluster`; None for devices as those that the
                plan is for.
            precision: Dtype of matrix products, on which the speed of known devices depends.
            **run: How the model is run: `replicas` (1 by default), `microbatches`, `pipeline`,
                `active_microbatches`, `recompute`, `offload`, `shard_optimizer_state`,
                `placement_strategy` and `overlap_all_reduce`; see
                `opensmp.compiler.simulation.run.Run`. By default as the plan is made for. Other
                numbers of microbatches have microbatches of the same size.

        Returns:
            Its time, memory and bubble, and what bounds it; print it.

        Raises:
            PlanError: If the plan has no costs, or an argument is wrong; the message lists all.

        Example:
            ```python
            print(model.plan.simulate(smp.Cluster(2, 4, device="a100"), replicas=2))
            ```
        """
        from opensmp.compiler.simulation.plan_step import of_plan, simulate_plan

        return simulate_plan(self, cluster, of_plan(self, run), precision)

    # --- reports ------------------------------------------------------------------------

    def explain(self) -> Explanation:
        """Explains the position of the cuts and predicts the costs of the best alternatives.

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
        """Draws the plan: its layers by partition, the cut tensors, the costs, and the schedule.

        Args:
            path: File to write, as SVG, PNG or PDF by its suffix; an existing file is replaced.

        Returns:
            A `matplotlib.figure.Figure`, which notebooks display.

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
        sizes = ", ".join(f"{i}: {counted(n, 'operation')}" for i, n in enumerate(self.sizes))
        return f"Plan of {self.model} over {counted(self.num_partitions, 'partition')} ({sizes})"

    def __str__(self) -> str:
        if not self.has_costs:
            return repr(self)
        from opensmp.compiler.plan.report.table import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        """What a notebook shows of the plan."""
        if not self.has_costs:
            return notebook.preformatted(repr(self))
        from opensmp.compiler.plan.report.table import plan_html

        return plan_html(self)

    # --- serialization ------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values; see `opensmp.compiler.plan.serialization.plan_file`."""
        from opensmp.compiler.plan.serialization.plan_file import to_json

        return to_json(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a JSON file that can be edited and reused.

        Args:
            path: File to write; an existing file is replaced.

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
        """Reads a plan from a file written by `save`, possibly edited.

        Args:
            path: The file.

        Returns:
            The plan.

        Raises:
            PlanError: If the file cannot be read or has faults; all of them are listed.

        Example:
            ```python
            print(Plan.load("plan.json"))
            ```
        """
        from opensmp.compiler.plan.serialization.plan_file import load

        return load(path)


def _layers(calls: Sequence[LayerCall], partition_of: Mapping[str, int]) -> dict[str, LayerEntry]:
    """Returns the entries of `Plan.layers`."""
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
            continue  # an enclosing layer lies in one partition
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
