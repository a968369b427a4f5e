"""Warns of a step whose partitions mostly wait for each other, with the number to set."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import keras

from opensmp.base.divisors import divisors
from opensmp.compiler.plan.plan import Plan
from opensmp.distributed.world import World
from opensmp.execution.context import Prepared

_logger = logging.getLogger("opensmp")

# Huang et al., "GPipe", NeurIPS 2019, section 2.3: with at least four times as many microbatches as
# partitions, the bubble is negligible.
_PER_PARTITION = 4
_LEAST_ROWS = 2
_LEAST_GAIN = 1.1
_SHORT_SECONDS = 1e-3
"""Passes that are shorter take as long with fewer rows: what they cost is starting operations."""

_told: weakref.WeakSet[World] = weakref.WeakSet()


def warn_of_one_microbatch(world: World, calls: Sequence[Prepared]) -> None:
    """Warns once per configuration if a training step has one microbatch by default only."""
    config = world.config
    is_default = config.microbatches == 1 and "microbatches" not in config.given
    if not is_default or config.partitions == 1 or world.rank or not calls or world in _told:
        return
    _told.add(world)
    call = max(calls, key=_seconds)
    rows = _rows(call)
    if rows is not None and rows < 2 * _LEAST_ROWS:
        return
    wanted = _PER_PARTITION * config.partitions
    number = wanted if rows is None else _most(rows, wanted)
    costs = _Costs.of(call.plan)
    if costs.gain(number or wanted) < _LEAST_GAIN:
        return
    _logger.warning(_text(costs, rows, number, wanted, call))


class _Costs(NamedTuple):
    """Seconds of one microbatch, or any unit of time: over all partitions, and in the slowest."""

    partitions: int
    total: float
    slowest: float
    known: bool = False

    @classmethod
    def of(cls, plan: Plan) -> _Costs:
        """Those that an automatic plan predicts; otherwise of equal partitions."""
        count = plan.num_partitions
        # Those of other plans would have to be computed.
        stages = plan.prediction.stage_seconds if plan.source == "auto" and plan.has_costs else ()
        if not sum(stages):
            return cls(count, float(count), 1.0)
        return cls(count, sum(stages), max(stages), True)

    def gain(self, microbatches: int) -> float:
        """How many times as fast as with one microbatch; see `evaluate` of the cost model."""
        return microbatches * self.total / (self.total + (microbatches - 1) * self.slowest)

    def bubble(self, microbatches: int) -> float:
        """Idle share of all partitions."""
        return 1 - self.gain(microbatches) / self.partitions


def _text(costs: _Costs, rows: int | None, number: int | None, wanted: int, call: Prepared) -> str:
    chosen = number or wanted
    if rows is None:
        fit = f"the batch must be divisible by {chosen}"
    elif number is None:
        fit = f"the {rows} rows of this batch are not divisible by it: use batches that are"
    else:
        fit = f"it divides the {rows} rows of the batch"
    normal = next(
        (s.layer.name for s in call.traced.spans if _normalises(s.layer)),
        None,
    )
    note = "" if normal is None else f" Layer '{normal}' then normalises each microbatch by itself."
    speed = f" and steps up to {costs.gain(chosen):.1f} times as fast"
    if costs.known and costs.slowest / chosen < _SHORT_SECONDS:
        speed = "; steps as short as those of this model may get no faster by it"
    return (
        f"{costs.partitions} partitions and 1 microbatch: the partitions work one after the other, "
        f"and are idle {100 * costs.bubble(1):.0f} % of the time (the bubble). Add "
        f'"microbatches": {chosen} to smp.init for a predicted bubble of '
        f"{100 * costs.bubble(chosen):.0f} %{speed}; "
        f'{fit}.{note} To keep one, and without this warning, write "microbatches": 1.'
    )


def _normalises(layer: object) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def _seconds(call: Prepared) -> float:
    costs = _Costs.of(call.plan)
    return costs.total if call.plan.source == "auto" else 0.0


def _rows(call: Prepared) -> int | None:
    """Rows of a batch, if they are known while the step is traced."""
    shapes = (tensor.shape for tensor in call.traced.inputs)
    return next((shape[0] for shape in shapes if shape.rank), None)


def _most(rows: int, most: int) -> int | None:
    """The largest number of microbatches up to `most` that have equal and enough rows."""
    fit = [n for n in divisors(rows) if 1 < n <= most and rows // n >= _LEAST_ROWS]
    return max(fit, default=None)
