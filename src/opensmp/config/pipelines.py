"""The pipeline schedules by name, the values of the configuration key `pipeline`.

The function that builds a schedule has the schedule's name, in a module of this name in
`opensmp.compiler.schedule.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Placement = Literal["loop", "v"]
"""How several pieces of the model go to the partitions: in turn, or forth and back."""


class Pipeline(NamedTuple):
    """What the rest of the package must know about a schedule.

    Attributes:
        name: Name of the schedule, of its module and of the function in it.
        summary: The order of its passes, as a clause.
        holds_all: Whether all microbatches are in flight, whatever `active_microbatches` says.
        defers_weights: Whether the second half of backward passes, the actions W for weights, may
            run later than right after B. The other schedules split backward passes only to make the
            next partition wait less.
        pieces: How many pieces of the model each partition has; None for any number, as
            `pieces_per_partition` says.
        placement: Which pieces they are. With `"v"` the first partition has the first and the last
            piece.
        held: Of a schedule with an order of its own: the microbatches whose activations the fullest
            of so many partitions holds. None if `active_microbatches` says it.
        uses_costs: Whether it orders by the predicted times of the segments, instead of counting
            them as equal.
    """

    name: str
    summary: str
    holds_all: bool = False
    defers_weights: bool = False
    pieces: int | None = None
    placement: Placement = "loop"
    held: Callable[[int], int] | None = None
    uses_costs: bool = False


_ROWS = (
    Pipeline(
        "simple",
        "runs all forward passes, then all backward passes (GPipe)",
        holds_all=True,
    ),
    Pipeline(
        "interleaved",
        "runs a backward pass as soon as it is ready (1F1B)",
    ),
    Pipeline(
        "zero_bubble",
        "defers weight gradients to fill the bubble at the end",
        defers_weights=True,
    ),
    Pipeline(
        "zb_h2",
        "keeps twice as many microbatches in flight, and waits only for the first one",
        defers_weights=True,
        pieces=1,
        held=lambda partitions: 2 * partitions - 1,
    ),
    Pipeline(
        "breadth_first",
        "runs all microbatches through a piece before the next piece",
        holds_all=True,
    ),
    Pipeline(
        "zb_v",
        "goes forth and back through two pieces a partition (a V), with little bubble",
        defers_weights=True,
        pieces=2,
        placement="v",
        held=lambda partitions: partitions,
    ),
    Pipeline(
        "v_half",
        "is a V with half the activations of interleaved",
        defers_weights=True,
        pieces=2,
        placement="v",
        held=lambda partitions: partitions // 2 + 1,
    ),
    Pipeline(
        "v_min",
        "is a V with a third of the activations of interleaved",
        defers_weights=True,
        pieces=2,
        placement="v",
        held=lambda partitions: (partitions + 4) // 3,
    ),
    Pipeline(
        "dualpipe_v",
        "is a V that pairs forward and backward passes",
        defers_weights=True,
        pieces=2,
        placement="v",
        held=lambda partitions: partitions + 1,
    ),
    Pipeline(
        "auto",
        "takes the fastest of the others and of orders of its own, by predicted times",
        defers_weights=True,
        held=lambda partitions: most_in_flight(partitions),
        uses_costs=True,
    ),
)

PIPELINES: Mapping[str, Pipeline] = MappingProxyType({row.name: row for row in _ROWS})
"""All schedules, by name."""

DEFAULT_PIPELINE = "interleaved"

OwnPipeline = str | Callable[..., Any]
"""A schedule that a user has written: the path of a JSON file, or a function of a task graph."""

_OWN = Pipeline(
    "own",
    "is the order of a file or a function",
    defers_weights=True,
    uses_costs=True,
)


def row_of(pipeline: OwnPipeline) -> Pipeline:
    """Returns what must be known about a value of the key `pipeline`."""
    return PIPELINES.get(pipeline, _OWN) if isinstance(pipeline, str) else _OWN


def pipeline_name(pipeline: OwnPipeline) -> str:
    """Returns the name of a schedule, the path of its file or the name of its function."""
    if isinstance(pipeline, str):
        return pipeline
    named = pipeline if hasattr(pipeline, "__qualname__") else type(pipeline)
    return f"{named.__module__}.{named.__qualname__}"


def most_in_flight(partitions: int) -> int:
    """Returns the most microbatches that are in flight by default, if they need not all be.

    Two more than a pipeline of equal partitions needs, for partitions that are not equal.
    """
    return partitions + 2
