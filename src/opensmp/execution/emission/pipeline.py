"""Emits the calls of one step: each model call of each microbatch, ordered by the schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Gradient, Op, Tensor
from opensmp.compiler.lowering.passes import Backward, Forward, Pass, RecomputePass
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.lowering.segments import Segment
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.report.segment_seconds import segment_seconds
from opensmp.compiler.schedule.actions import Action, Schedule
from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.trace import TracedGraph, call_inputs
from opensmp.compiler.trace.variables import (
    is_trainable,
    read_after_assignment,
    tf_variable,
)
from opensmp.config.pipelines import row_of
from opensmp.distributed.watchdog.root_cause import Place, note
from opensmp.distributed.world import World
from opensmp.execution.autodiff.segment_gradients import (
    Emit,
    LateGradient,
    Saved,
    differentiable_call,
    release_trace,
)
from opensmp.execution.context import Prepare, as_current
from opensmp.execution.emission.emitted_calls import EmittedCalls
from opensmp.execution.emission.finite_checks import FiniteChecks, is_wanted
from opensmp.execution.emission.gradient_sums import GradientSums
from opensmp.execution.emission.late_gradients import (
    compute_late_gradients,
    in_place,
    read_zero,
    side_effects_of,
    without_bridge,
)
from opensmp.execution.emission.model_traces import ModelTraces, wanted_leaves
from opensmp.execution.emission.refusals import (
    called_in_another_graph,
    finished,
    nothing_to_run,
    refuse_jacobian,
)
from opensmp.execution.emission.task_graph import (
    Task,
    add_schedule_edges,
    live_operations,
    task_graph,
)
from opensmp.execution.emission.variable_reads import VariableReads
from opensmp.execution.emission.weight_gradient_batching import (
    Sums,
    WeightGradientPass,
    group_size,
)
from opensmp.execution.memory.offload import Offload, Offloaded
from opensmp.execution.memory.recompute_choice import RecomputeChoice
from opensmp.execution.multi_process.distribute import Traced, on_several_machines, partition_step
from opensmp.execution.multi_process.remote_gradient import OwnedBy
from opensmp.execution.multi_process.send_recv import without_bridges
from opensmp.execution.profiling.timestamps import Stamps
from opensmp.execution.profiling.tuning.step_times import training_was_traced


class Pipeline:
    """Builds the calls of one step function in the current graph.

    Args:
        world: The process' configuration and devices.
        num_microbatches: Number of microbatches.
        stamps: Records the start and end of calls; None records nothing.
        joins: Whether calls may compute sums of weight gradients over microbatches; see `terms`.
        traces: Traces of the models' calls that already exist.
    """

    def __init__(
        self,
        world: World,
        num_microbatches: int,
        stamps: Stamps | None = None,
        joins: bool = False,
        traces: ModelTraces | None = None,
    ) -> None:
        self._world = world
        if len(world.mp_group) > 1:
            _private.check_sources()  # required by `refuse_jacobian`
        self._num_microbatches = num_microbatches
        self._emitted = EmittedCalls(world, num_microbatches, stamps)
        self._checks = FiniteChecks(world) if is_wanted(world.config) else None
        self._sums = joins and num_microbatches > 1
        self._recompute = RecomputeChoice(world.config)
        self._offload = Offload(world, self._emitted.device)
        self._offloaded: dict[int, Offloaded] = {}  # by id of a saved tensor
        self._group_size = group_size(num_microbatches, world.config) if joins else 1
        self._weight_passes: dict[Action, WeightGradientPass] = {}
        self._graph = tf.compat.v1.get_default_graph()
        self._microbatch = 0
        self._calls = 0
        self._traces = traces or ModelTraces()
        self._numbers: dict[tuple[int, int], int] = {}
        self._seconds: dict[int, tuple[float, float] | None] = {}  # if the schedule asks
        self._state: dict[int, tuple[Any, Tensor]] = {}
        self._late: list[LateGradient] = []
        self._reads: dict[int, tuple[Any, Tensor]] = {}
        self._variable_reads = VariableReads()
        self._homes: dict[int, int] = {}
        self._variables: dict[int, Any] = {}
        self._gradients: list[tuple[Any, Any]] = []
        self._side_effects: list[Op] = []
        self._done: list[tuple[int, Tensor]] = []
        self._saved: list[tuple[Tensor, int]] = []
        self._placed: dict[Op, int] = {}
        self._may_be_empty = False
        self.schedule: Schedule | None = None

    @property
    def num_microbatches(self) -> int:
        """Number of microbatches per batch."""
        return self._num_microbatches

    @property
    def tasks(self) -> Mapping[Action, Task]:
        """The calls emitted so far."""
        return self._emitted.tasks

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Makes this the runner of model calls while the user's function is traced."""
        with as_current(self), _private.automatic_control_dependencies():
            yield

    def start_microbatch(self, microbatch: int) -> None:
        """Assigns the model calls that follow to this microbatch."""
        self._microbatch, self._calls = microbatch, 0

    @property
    def _wants_halves(self) -> bool:
        """Whether backward passes are split into an input-gradient and a weight-gradient pass.

        Always with several partitions: the preceding partition needs the input gradients, and
        should not wait for the weight gradients.
        """
        deferred = row_of(self._world.config.pipeline).defers_weights
        alone = deferred or self._group_size > 1
        return len(self._world.devices) > 1 or (self._emitted.is_ordered and alone)

    # --- running a model -----------------------------------------------------------

    def run(
        self, model: Any, prepare: Prepare, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        """Emits one call of a model for the current microbatch.

        Returns the model's output, and the losses that its layers added.
        """
        if tf.compat.v1.get_default_graph() is not self._graph:
            raise called_in_another_graph(model.name)
        call = Structure.of((args, dict(kwargs)))
        ordinal, self._calls = self._calls, self._calls + 1
        key = self._key(model, call, ordinal)
        traced, plan, homes, _ = self._traces.prepared(key, model, lambda: prepare(args, kwargs))
        self._homes.update(homes)
        values = self._leaf_values(traced, call, ordinal)
        program = self._program(key, traced, plan, values, kwargs.get("training"))
        emitted: dict[int, Op | None] = {}
        for segment in program.segments:
            after = [emitted[index] for index in segment.after]
            with tf.control_dependencies([op for op in after if op is not None]):
                emitted[segment.index] = self._run_segment(program, segment, ordinal, values)
        for variable, value in traced.updates:
            self._state[id(variable)] = (variable, values[id(value)])
        # The caller must get the tensors that the model itself continues with, to take gradients
        # with respect to them.
        outputs = [values[id(program.taps.get(id(t), t))] for t in traced.outputs]
        for output, mask, logits in zip(outputs, traced.masks, traced.logits, strict=True):
            if mask is not None:
                _private.set_mask(output, values[id(mask)])
            if logits is not None:
                _private.set_logits(output, values[id(logits)])
        losses = [values[id(loss)] for loss in traced.losses]
        return traced.output_structure.pack(outputs), losses

    def _leaf_values(self, traced: TracedGraph, call: Structure, ordinal: int) -> dict[int, Tensor]:
        values = dict(zip(map(id, traced.inputs), call_inputs(call), strict=True))
        for leaf in traced.variables:
            self._variables[id(leaf.placeholder)] = leaf.variable
            state = self._state.get(id(leaf.variable))
            if state is None or is_trainable(leaf.variable):
                value = self._variable_reads.value(leaf.variable)
                self._reads[id(leaf.variable)] = leaf.variable, value
                if state is not None:
                    value = read_after_assignment(state[1], value)
            else:
                value = state[1]
            values[id(leaf.placeholder)] = value
        return values

    def _key(self, model: Any, call: Structure, ordinal: int) -> tuple[Any, ...]:
        """Cache key of a call's trace; `ordinal` numbers the calls of a microbatch."""
        return self._traces.key(model, call)

    def _leaves(
        self, traced: TracedGraph, values: Mapping[int, Tensor], training: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves whose gradients will be used, and those for which they may be."""
        return wanted_leaves(traced, values, training)

    def _program(
        self,
        key: Any,
        traced: TracedGraph,
        plan: Plan,
        values: Mapping[int, Tensor],
        training: Any,
    ) -> Program:
        required, optional = self._leaves(traced, values, training)

        def make() -> Program:
            return Program(
                traced,
                plan,
                required,
                optional,
                units=self._emitted.is_ordered,
                split_backward=self._wants_halves,
                joins=self._group_size > 1,
                checks_finite=self._checks is not None,
                recompute=policy,
            )

        policy = self._recompute.policy(plan, self._microbatch)
        return self._recompute.noted(self._traces.program((key, policy), required, optional, make))

    # --- emitting ------------------------------------------------------------------

    def _run_segment(
        self, program: Program, segment: Segment, ordinal: int, values: dict[int, Tensor]
    ) -> Op | None:
        """Emits a segment's forward call and adds its outputs to `values`.

        Returns the call's operation; None if no forward call was emitted.
        """
        number = self._numbers.setdefault((ordinal, segment.index), len(self._numbers))
        if number not in self._seconds and row_of(self._world.config.pipeline).uses_costs:
            names = (op.name for op in segment.operations)
            self._seconds[number] = segment_seconds(program.plan, names)
        microbatch = self._microbatch

        def emit(kind: str, what: Pass | RecomputePass, args: Sequence[Tensor]) -> list[Tensor]:
            self._refuse_when_finished()
            if len(self._world.mp_group) > 1:
                refuse_jacobian(program.traced.name)
            if isinstance(what, RecomputePass):
                action = self._emitted.action("B", number, microbatch)
                partition = segment.partition
                results = self._emitted.emit_before(action, partition, what.function, args)
                place = Place("B", partition, microbatch, program.layers(segment))
                note(results[0].op.name, place)
                return results
            action = self._emitted.action(kind, number, microbatch)
            function = what.function
            if isinstance(what, Backward) and self._emitted.is_open(action):
                function = program.open(what)
            results = self._emitted.emit(action, segment.partition, function, args)
            if isinstance(what, Forward):
                results = what.kept(results)
            place = Place(kind, segment.partition, microbatch, program.layers(segment))
            note(self._emitted.tasks[action].last.name, place)
            if kind == "F" and segment.side_effects:
                self._done.append((segment.partition, results.pop()))
            if self._checks is not None:
                self._checks.note(action, program, what, results)
            if kind in ("B", "W") and isinstance(what, Backward) and what.weights is None:
                self._weight_passes[action] = WeightGradientPass(
                    action, program, what, args, results, place
                )
            return results

        forward = program.forward(segment)
        args = [values[id(t)] for t in forward.feeds]
        action = Action("F", number, microbatch)
        with tf.device(self._emitted.device(segment.partition)):
            results = self._call(program, segment, action, args, emit)
        values.update({id(t): v for t, v in zip(forward.outputs, results, strict=True)})
        if action not in self._emitted.tasks:
            return None
        call = self._emitted.tasks[action].last
        if segment.side_effects:
            self._side_effects.append(call)
        return call

    def _call(
        self, program: Program, segment: Segment, action: Action, args: Sequence[Tensor], emit: Emit
    ) -> list[Tensor]:
        """Runs a segment; gradients can be taken through the returned outputs."""
        forward = program.forward(segment)
        if not any(program.is_required(t) or program.is_optional(t) for t in forward.feeds):
            return emit("F", forward, args)[: len(forward.outputs)]
        return self._differentiable(program, segment, args, emit)

    def _differentiable(
        self,
        program: Program,
        segment: Segment,
        args: Sequence[Tensor],
        emit: Emit,
        saved: Saved | None = None,
    ) -> list[Tensor]:
        return differentiable_call(
            program, segment, args, emit, self._note_late, self._note_gradient, saved
        )

    def _note_late(self, late: LateGradient) -> None:
        self._refuse_when_finished()
        self._late.append(late)

    def _refuse_when_finished(self) -> None:
        """Raises an error after `finish`, when a gradient placeholder would never be replaced."""
        if self.schedule is not None:
            raise finished()

    def _note_gradient(self, feed: Tensor, gradient: Any) -> None:
        """Records the gradient if the feed of a call is a variable."""
        if id(feed) in self._variables:
            self._gradients.append((self._variables[id(feed)], gradient))

    # --- adding up ------------------------------------------------------------------

    def terms(
        self, rows: Sequence[Sequence[Gradient]], others: Sequence[Tensor] = ()
    ) -> list[list[Gradient] | None]:
        """Replaces the terms of sums over microbatches by sums that calls compute themselves.

        Gradients of single microbatches in such a sum leave the schedule. If something reads them
        all the same, they are computed separately. None stands for sums that keep their terms.
        """
        if not self._sums or not self._weight_passes:
            return [None] * len(rows)
        others = [*others, *(value for _, value in self._state.values())]
        effects = self._side_effects + side_effects_of(self._graph)
        sums = Sums(rows, self._weight_passes.values(), others, effects)
        replaced = GradientSums(self._emitted, self._checks, self._note_gradient)
        return replaced.replace(self._weight_passes, sums, self._group_size)

    # --- finishing -------------------------------------------------------------------

    def finish(self, results: Sequence[Tensor]) -> list[Tensor | OwnedBy]:
        """Completes the graph: late gradients, schedule, control edges and state assignments.

        Returns the tensors to return for `results`; for gradients of variables of other processes,
        an `OwnedBy` that names the owner.
        """
        results = list(results)
        self._recompute.check()
        side_effects = self._side_effects + side_effects_of(self._graph)
        state = list(self._state.values())

        flags: list[Tensor] = []

        def roots() -> list[Op]:
            saved = (value for value, _ in self._saved)
            values = (*results, *(value for _, value in state), *flags, *saved)
            return [t.op for t in values] + side_effects

        live = compute_late_gradients(self._late, results, roots)
        if self._checks is not None:
            flags += self._checks.emit(live, self._emitted.tasks, self._emitted.device)
            live = live_operations(roots())
        spread_out = len(self._world.mp_group) > 1
        if spread_out:
            instead = without_bridges(live)
            results[:] = [instead.get(id(t), t) for t in results]
            state[:] = [(v, instead.get(id(value), value)) for v, value in state]
            self._gradients = [(v, without_bridge(g, instead)) for v, g in self._gradients]
            self._saved = [(instead.get(id(t), t), p) for t, p in self._saved]
            live = live_operations(roots())
        graph = task_graph(
            self._emitted.tasks.values(), live, len(self._world.devices), self._seconds
        )
        if not graph.device and not self._may_be_empty:
            raise nothing_to_run(bool(self._emitted.tasks))
        if any(action.kind == "B" for action in graph.device):
            training_was_traced(self._world, self._traces.calls)
        config = self._world.config
        far = on_several_machines(self._world)
        self.schedule = build(config.pipeline, graph, config.active_microbatches, hides_latency=far)
        if spread_out:
            kept = partition_step(
                Traced(
                    live=live,
                    tasks=self._emitted.tasks,
                    is_open=self._emitted.is_open,
                    schedule=self.schedule,
                    results=results,
                    state=state,
                    reads=list(self._reads.values()),
                    homes=self._homes,
                    gradients=self._gradients,
                    everywhere=flags,
                    saved=self._saved,
                    placed=self._placed,
                ),
                self._world,
                f"the step {self._graph.name}",
            )
            results, state, flags = kept.results, kept.state, kept.everywhere
            self._saved = kept.saved
            _private.must_run(self._graph, kept.must_run)
        add_schedule_edges(self.schedule, self._emitted.tasks, self._world.my_partitions)
        if self._offload.is_wanted:
            made = [t for t in results if not isinstance(t, OwnedBy)]
            values = (*made, *flags, *(value for _, value in state))
            self._offloaded = self._offload.insert(
                self.schedule,
                self._emitted.tasks,
                self._saved,
                [t.op for t in values] + side_effects,
            )
        looks = []
        if self._checks is not None:
            looks = self._checks.look(flags, self.schedule, self._graph.name)
        with tf.control_dependencies(looks):  # a failed check must leave the state unchanged
            for variable, value in state:
                tf_variable(variable).assign(value)
        own = [each for each in self._done if each[0] in self._world.my_partitions]
        done = looks + [read_zero(done, self._emitted.device(part)) for part, done in own]
        if done:
            with tf.control_dependencies(done):
                results = [t if isinstance(t, OwnedBy) else in_place(t) for t in results]
        return results

    def release(self) -> None:
        """Frees what only the trace needed: traces and programs, and the graphs of functions."""
        release_trace(self._graph, self._traces.graphs)

    def finish_nest(self, nest: Any) -> Any:
        """Like `finish`, for a nest of tensors and other leaves."""
        structure = Structure.of(nest)
        return structure.pack(self.finish(structure.tensors))
