"""The list schedules `simple`, `interleaved` and `zero_bubble` of equal stages, as arrays.

The same simulation as `opensmp.compiler.schedule.list_scheduling`, with all devices at once. It is
for chains of one segment a device, in which each device runs the passes of a kind by ascending
microbatches, so that numbers of passes say all about what is ready.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.schedule.methods.breadth_first import passes as breadth_first
from opensmp.compiler.schedule.methods.zero_bubble import deferred_counts
from opensmp.compiler.schedule.regular.passes import BACKWARD, FORWARD, WEIGHTS, Passes
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline, RegularSchedule
from opensmp.compiler.schedule.regular.simulation import simulate_regular
from opensmp.errors import ScheduleError

_SAME_MOMENT = 1 + 1e-9
_TRANSFER_SHARE = 0.1
_NOTHING = -1


class _Rule(NamedTuple):
    """What a device prefers: backward passes, or the turns of 1F1B; and the weights that wait."""

    by_turns: bool
    deferred: int = 0


def list_regular(name: str, pipeline: RegularPipeline, active_microbatches: int) -> RegularSchedule:
    """Builds a list schedule, with the orders that the function of its name gives for the objects.

    Only with fewer microbatches in flight than devices may `zero_bubble` choose another one of its
    candidates: objects then wait for releases too, see `Schedule`.

    Args:
        name: `"simple"`, `"interleaved"` or `"zero_bubble"`.
        pipeline: Equal stages, one for each device.
        active_microbatches: Maximum number of microbatches in flight, >= 1; `simple` ignores it.
            Nothing but the orders keeps it, as there are no releases.

    Raises:
        ScheduleError: If the name is another one, `active_microbatches` is below 1, or devices have
            several pieces.
    """
    if name not in ("simple", "interleaved", "zero_bubble"):
        raise ScheduleError(
            f"list_regular: {name!r} is not a list schedule; choose 'simple', 'interleaved' or "
            "'zero_bubble', or give the generator of another one to RegularPipeline.schedule."
        )
    if pipeline.pieces > 1 or active_microbatches < 1:
        raise ScheduleError(
            f"list_regular: pieces={pipeline.pieces} must be 1 and active_microbatches="
            f"{active_microbatches} at least 1; schedule pipeline.graph() to have several pieces."
        )
    if name == "simple":
        return pipeline.schedule(name, breadth_first)
    rules = [_Rule(by_turns=False), _Rule(by_turns=True)]
    if name == "zero_bubble" and pipeline.is_split:
        everything = pipeline.num_microbatches
        counts, is_thorough = deferred_counts(
            everything, pipeline.num_devices, pipeline.num_actions, active_microbatches
        )
        rules = [rules[0], *(_Rule(by_turns=True, deferred=count) for count in counts)]
        rules += [_Rule(by_turns=False, deferred=everything)] * is_thorough
    transfer = _TRANSFER_SHARE * sum(pipeline.seconds) / (3 if pipeline.is_split else 2)
    best, least = None, np.inf
    for rule in rules:
        schedule = RegularSchedule(name, pipeline, _passes(pipeline, active_microbatches, rule))
        seconds = float(f"{simulate_regular(schedule, transfer).makespan_seconds:.9g}")
        if seconds < least:
            best, least = schedule, seconds
    assert best is not None
    return best


def _passes(pipeline: RegularPipeline, bound: int, rule: _Rule) -> tuple[Passes, ...]:
    """The passes of each device if all run by a rule, each as early as possible."""
    num_devices, num_microbatches = pipeline.num_devices, pipeline.num_microbatches
    kinds = 3 if pipeline.is_split else 2
    seconds = np.array(pipeline.seconds)
    each = np.arange(num_devices)
    ahead = 2 * (num_devices - 1 - each)
    ready = np.zeros((3, num_devices), dtype=np.int64)  # passes whose dependencies have run
    ready[FORWARD, 0] = num_microbatches
    started = np.zeros_like(ready)
    running = np.full(num_devices, _NOTHING)
    end = np.full(num_devices, np.inf)
    order = np.zeros((num_devices, kinds * num_microbatches), dtype=np.int8)
    length = np.zeros(num_devices, dtype=np.int64)
    passed = np.zeros(num_microbatches, dtype=np.int64)
    num_finished, now = 0, 0.0
    while True:
        ready[FORWARD, 0] = min(num_microbatches, num_finished + bound)
        kind = _choice(ready, started, ahead, num_microbatches, rule)
        begin = np.flatnonzero((running == _NOTHING) & (kind != _NOTHING))
        chosen = kind[begin]
        order[begin, length[begin]] = running[begin] = chosen
        length[begin] += 1
        started[chosen, begin] += 1
        end[begin] = now + seconds[chosen]
        first = end.min()
        if first == np.inf:
            break
        over = np.flatnonzero(end <= first * _SAME_MOMENT)
        now = float(end[over].max())
        ended = running[over]
        microbatch = started[ended, over] - 1
        running[over], end[over] = _NOTHING, np.inf
        _count(ready, ended, over)
        if not pipeline.is_split:
            ready[WEIGHTS] = 0
        np.add.at(passed, microbatch, 1)
        num_finished += int((passed[np.unique(microbatch)] == kinds * num_devices).sum())
    return tuple(_numbered(row) for row in order)


def _choice(
    ready: NDArray[np.int64],
    started: NDArray[np.int64],
    ahead: NDArray[np.int64],
    num_microbatches: int,
    rule: _Rule,
) -> NDArray[np.int64]:
    """The kind of the best ready pass of each device."""
    forward, backward, weights = ready > started
    forward_first = started[FORWARD] <= started[BACKWARD] + ahead if rule.by_turns else False
    best = np.where(
        backward & ~(forward & forward_first), BACKWARD, np.where(forward, FORWARD, _NOTHING)
    )
    waits = started[WEIGHTS] >= num_microbatches - rule.deferred
    return np.where(weights & (~waits | (best == _NOTHING)), WEIGHTS, best)


def _count(ready: NDArray[np.int64], ended: NDArray[np.int64], over: NDArray[np.int64]) -> None:
    """Counts what has become ready because passes of some devices have ended."""
    last = ready.shape[1] - 1
    forward, backward = over[ended == FORWARD], over[ended == BACKWARD]
    ready[FORWARD, forward[forward < last] + 1] += 1
    ready[BACKWARD, forward[forward == last]] += 1
    ready[BACKWARD, backward[backward > 0] - 1] += 1
    ready[WEIGHTS, backward] += 1


def _numbered(kinds: NDArray[np.int8]) -> Passes:
    """The passes of a device from their kinds: each kind by ascending microbatches."""
    passes = np.zeros((len(kinds), 3), dtype=np.int32)
    passes[:, 0] = kinds
    for kind in range(3):
        own = kinds == kind
        passes[own, 2] = np.arange(own.sum())
    return passes
