"""Finds the first non-finite value of a step, for `check_finite`.

Calls return a flag per layer activation or gradient that says whether it is finite; operations next
to calls for several microbatches compute the flags of theirs. At the end of a run, before results
are returned or state is assigned, a Python callback reads the flags and raises an error for the
first false one in schedule order. Each process of a replica receives all flags, so that all raise
the same error.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.lowering.finite_flags import (
    activation_name,
    finite_flags,
    layer_paths,
)
from opensmp.compiler.lowering.passes import Backward, Forward, Pass
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.schedule.actions import Action, Schedule
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.config import Config
from opensmp.distributed.world import World
from opensmp.errors import NonFiniteError
from opensmp.execution.emission.task_graph import Task

_HOST = "/device:CPU:0"
_NUM_SHOWN = 3

_calls_for = 0


def is_wanted(config: Config) -> bool:
    """Whether steps that are traced now are checked."""
    return config.check_finite or is_asked_for()


def is_asked_for() -> bool:
    """Whether a `checking` context is open."""
    return _calls_for > 0


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Context in which all steps are checked, regardless of the configuration."""
    global _calls_for
    _private.trace_apart_while(is_asked_for)
    _calls_for += 1
    try:
        yield
    finally:
        _calls_for -= 1


_Order = tuple[int, int]


class _Call(NamedTuple):
    """The values to check of an emitted call.

    Attributes:
        names: Descriptions of the values.
        order: For each value its place among those of the call: the first is named first.
        flags: For each value whether it is finite; None if they have yet to be computed from
            `tensors`.
        tensors: Gradients of several microbatches to check.
        microbatches: The microbatches that the call computes.
        is_backward: Whether the values are gradients.
    """

    names: Sequence[str]
    order: Sequence[_Order]
    flags: Tensor | None
    tensors: Sequence[Tensor]
    microbatches: tuple[int, ...]
    is_backward: bool


class Place(NamedTuple):
    """A value that is checked.

    Attributes:
        name: Its description.
        action: The action of the call that computes it.
        partition: The partition of the call.
        microbatches: The microbatches that it belongs to.
        order: Its place among the values of the call.
        rank: The rank of the process; None if there is only one process.
    """

    name: str
    action: Action
    partition: int
    microbatches: tuple[int, ...]
    order: _Order
    rank: int | None = None

    def __str__(self) -> str:
        first, last = self.microbatches[0], self.microbatches[-1]
        which = f"microbatch {first}"
        if len(self.microbatches) > 1:
            which = f"summed over microbatches {first} to {last}"
        where = "" if self.rank is None else f", rank {self.rank}"
        return f"{self.name}, in partition {self.partition}{where}, {which}"


class FiniteChecks:
    """The checks of one trace of a step."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._calls: dict[Action, _Call] = {}
        self._places: list[Place] = []
        self._names: dict[int, tuple[TracedGraph, _Names]] = {}

    # ------------------------------------------------------------------- while calls are emitted

    def note(
        self,
        action: Action,
        program: Program,
        what: Pass,
        results: list[Tensor],
    ) -> None:
        """Records an emitted call; pops its flags off `results`."""
        own = (action.microbatch,)
        if isinstance(what, Forward):
            if what.activations:
                names = [each.name for each in what.activations]
                order = [(0, i) for i in range(len(names))]
                self._calls[action] = _Call(names, order, results.pop(), (), own, False)
        elif what.looked_at:
            names, order = self._describe(program, what, what.looked_at)
            self._calls[action] = _Call(names, order, results.pop(), (), own, True)

    def join(
        self,
        action: Action,
        program: Program,
        weights: Backward,
        results: Sequence[Tensor],
        microbatches: tuple[int, ...],
    ) -> None:
        """Records a call that computes the gradients of several microbatches."""
        number = {id(t): i for i, t in enumerate(weights.gradient.flat)}
        checked = [t for t in weights.looked_at if id(t) in number]
        tensors = [results[number[id(t)]] for t in checked]
        if checked:
            names, order = self._describe(program, weights, checked)
            self._calls[action] = _Call(names, order, None, tensors, microbatches, True)

    def _describe(
        self, program: Program, what: Backward, tensors: Sequence[Tensor]
    ) -> tuple[list[str], list[_Order]]:
        """Descriptions of a pass's upstream gradients and gradients, and their backward order."""
        if id(program) not in self._names:
            self._names[id(program)] = (program.traced, _Names(program.traced))
        names = self._names[id(program)][1]
        model = program.traced.name
        described = {
            id(upstream): (
                f"the gradient of the loss with respect to an output of model '{model}'",
                (-1, 0),
            )
            for upstream in what.gradient.upstream
        }
        for wrt, gradient in zip(what.gradient.wrt, what.gradient.gradients, strict=True):
            values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
            described.setdefault(id(values), (names.of(wrt), names.order(wrt)))
        found = [described[id(t)] for t in tensors]
        return [name for name, _ in found], [order for _, order in found]

    # ------------------------------------------------------------------------ when all are there

    def emit(
        self, live: Collection[Op], tasks: Mapping[Action, Task], device: Callable[[int], str]
    ) -> list[Tensor]:
        """Emits the flags of the live calls; returns one float32 tensor per partition: 1 if finite.

        Leaves out gradients of a loss scaled by LossScaleOptimizer: they may overflow, and that
        optimizer skips such steps itself.
        """
        running, scaled = set(live), _private.scales_loss()
        parts: dict[int, list[Tensor]] = {}
        places: dict[int, list[Place]] = {}
        for action, call in self._calls.items():
            task = tasks.get(action)
            if task is None or task.last not in running or (scaled and call.is_backward):
                continue
            partition = task.partition
            with tf.control_dependencies(None), tf.device(device(partition)):
                flags = finite_flags(call.tensors) if call.flags is None else call.flags
            parts.setdefault(partition, []).append(flags)
            rank = None
            if self._world.size > 1:
                rank = self._world.mp_group[self._world.owner(partition)]
            places.setdefault(partition, []).extend(
                Place(name, action, partition, call.microbatches, order, rank)
                for name, order in zip(call.names, call.order, strict=True)
            )
        packed = []
        for partition in sorted(parts):
            with tf.control_dependencies(None), tf.device(device(partition)):
                packed.append(tf.cast(tf.concat(parts[partition], 0), tf.float32))
            self._places += places[partition]
        return packed

    def look(self, flags: Sequence[Tensor], schedule: Schedule, step: str) -> list[Tensor]:
        """Emits and returns operations that raise NonFiniteError if a flag of `emit` is false.

        They must complete before results are used.
        """
        if not flags:
            return []
        assert schedule.graph is not None
        start = simulate(schedule, schedule.graph).start
        places = self._places
        order = sorted(
            range(len(places)), key=lambda i: (start[places[i].action], places[i].order, i)
        )
        runs, name = 0, f"'{step}'"
        if step.startswith("smp_step_"):
            name = f"step '{step.removeprefix('smp_step_')}'"

        def raise_if_bad(each: Any) -> Any:
            nonlocal runs
            runs += 1
            if not each.all():
                bad = [places[i] for i in order if not each[i]]
                error = NonFiniteError(_message(bad, name, runs))
                _remember(error)
                raise error
            return np.int32(0)

        with tf.device(_HOST):
            together = tf.concat(list(flags), 0)
            return [_private.host_call(raise_if_bad, [together], tf.int32)]


class _Names:
    """Descriptions of a traced model's tensors for error messages."""

    def __init__(self, traced: TracedGraph) -> None:
        self._traced = traced
        self._variables = {id(leaf.placeholder): leaf.variable for leaf in traced.variables}
        self._inputs = {id(t): i for i, t in enumerate(traced.inputs)}
        self._layers = layer_paths(traced)
        self._number = {op: i for i, op in enumerate(traced.operations)}
        groups: dict[str, int] = {}
        self._group = {
            id(leaf.placeholder): groups.setdefault(_path(leaf.variable).rpartition("/")[0], i)
            for i, leaf in enumerate(traced.variables)
        }

    def of(self, wrt: Tensor) -> str:
        """Describes the gradient with respect to a tensor."""
        if id(wrt) in self._variables:
            return f"the gradient of variable '{_path(self._variables[id(wrt)])}'"
        if id(wrt) in self._inputs:
            model = self._traced.name
            return f"the gradient of input {self._inputs[id(wrt)]} of model '{model}'"
        layer = self._layers[self._number[wrt.op]]
        return f"the gradient of {activation_name(self._traced, layer)}"

    def order(self, wrt: Tensor) -> tuple[int, int]:
        """Sort key in backward order: variables, the last layer's first, then activations."""
        return (0, -self._group[id(wrt)]) if id(wrt) in self._group else (1, 0)


def _path(variable: Any) -> str:
    return str(getattr(variable, "path", variable.name))


def _message(bad: Sequence[Place], step: str, run: int) -> str:
    rest = [str(place) for place in bad[1 : _NUM_SHOWN + 1]]
    if len(bad) > _NUM_SHOWN + 1:
        rest.append(f"{len(bad) - _NUM_SHOWN - 1} more")
    more = f" After it: {'; '.join(rest)}." if rest else ""
    return (
        f"check_finite: in run {run} of {step}, the first value that is not finite (nan or "
        f"infinite) is {bad[0]}.{more} Expected: finite activations and gradients. The variables "
        "of the model are as before this run. Usual causes are wrong data, a learning rate that "
        "is too high, a division by zero, and the logarithm or the gradient of a square root of "
        "zero. Mend the cause, or go on with the next batch or from a checkpoint."
    )


# ----------------------------------------------------------------------------------- the error

_lock = threading.Lock()
_found: list[NonFiniteError] = []


def _remember(error: NonFiniteError) -> None:
    with _lock:
        _found.append(error)


def call(work: Callable[[], Any]) -> Any:
    """Calls `work`; if it fails because of a check, raises the check's NonFiniteError."""
    with _lock:
        _found.clear()
    try:
        return work()
    except tf.errors.OpError:
        with _lock:
            error = _found[0] if _found else None
            _found.clear()
        if error is None:
            raise
        raise error from None
