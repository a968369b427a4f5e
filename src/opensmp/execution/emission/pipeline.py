"""Emits the calls of one step: every model call of every microbatch, in schedule order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.compiler.lowering.passes import Backward, Pass
from opensmp.compiler.lowering.program import Program, lower
from opensmp.compiler.lowering.segments import Segment
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.schedule.actions import Action, Schedule
from opensmp.compiler.schedule.pipelines import DEFERS_WEIGHTS, build
from opensmp.compiler.trace.differentiable import is_differentiable
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.trace import TracedGraph, call_inputs, call_signature
from opensmp.compiler.trace.variables import (
    is_keras,
    is_trainable,
    read_after_assignment,
    tf_variable,
)
from opensmp.distributed.watchdog.root_cause import Place, is_careful, note
from opensmp.distributed.world import World
from opensmp.errors import StepError
from opensmp.execution.autodiff.segment_gradients import (
    Emit,
    LateGradient,
    Saved,
    differentiable_call,
)
from opensmp.execution.context import Prepare, Prepared, as_current
from opensmp.execution.emission.emit_call import emit_call
from opensmp.execution.emission.finite_checks import FiniteChecks, is_wanted
from opensmp.execution.emission.task_graph import Task, impose, live_operations, task_graph
from opensmp.execution.emission.weight_gradient_batching import (
    Joined,
    SecondHalf,
    Sums,
    group_size,
    joinable,
)
from opensmp.execution.models.attributes import attributes
from opensmp.execution.multi_process.distribute import Traced, spread
from opensmp.execution.multi_process.remote_gradient import KeptBy
from opensmp.execution.multi_process.send_recv import without_bridges
from opensmp.execution.profiling.timestamps import Stamps

Op = Any
Tensor = Any
Gradient = Any

_NOTHING_TO_RUN = (
    "An smp.step function must call a smp.DistributedModel and return something that depends on "
    "the model's output. "
)
_NO_MODEL = (
    "No DistributedModel was called. Call one in the function and return, for example, the loss; "
    "smp.DistributedModel.from_keras(model) makes one of a Keras model."
)
_UNUSED = "The outputs are not used. Return, for example, the loss."
_FINISHED = (
    "A gradient was asked for through a call of a DistributedModel that was made outside of an "
    "smp.step function, by tf.gradients. Such a call is a forward pass alone. Expected: the call, "
    "and tf.gradients or a tf.GradientTape, in an smp.step function that returns the gradients."
)
_JACOBIAN = (
    "tape.{name} was called through DistributedModel '{model}', whose partitions are in several "
    "processes: TensorFlow computes all rows of a Jacobian by a loop over one, and what is sent "
    "between processes cannot be in it. Expected: one process; or tape.gradient once for each row, "
    "for example an smp.step function with one example per microbatch, whose gradients .stack() "
    "gives."
)


class Pipeline:
    """The calls of one step function under construction in the current graph.

    Args:
        world: The process' configuration and devices.
        num_microbatches: Number of microbatches.
        stamps: Notes when calls start and end; None leaves that out.
        joins: Whether the gradients of variables may be computed for several microbatches at
            once, for `sums`.
    """

    def __init__(
        self,
        world: World,
        num_microbatches: int,
        stamps: Stamps | None = None,
        joins: bool = False,
    ) -> None:
        self._world = world
        if len(world.mp_group) > 1:
            _private.check_sources()  # for `refuse_jacobian`
        self._num_microbatches = num_microbatches
        self._stamps = stamps
        self._checks = FiniteChecks(world) if is_wanted(world.config) else None
        self._group_size = group_size(num_microbatches, world.config) if joins else 1
        self._second_halves: dict[Action, SecondHalf] = {}
        self._graph = tf.compat.v1.get_default_graph()
        self._microbatch = 0
        self._calls = 0
        self._prepared: dict[Any, Prepared] = {}
        self._programs: dict[Any, Program] = {}
        self._attributes: dict[int, list[tuple[Any, int]]] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._tasks: dict[Action, Task] = {}
        self._state: dict[int, tuple[Any, Tensor]] = {}
        self._late: list[LateGradient] = []
        self._reads: dict[int, tuple[Any, Tensor]] = {}
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
        """Into how many microbatches a batch is divided."""
        return self._num_microbatches

    @property
    def tasks(self) -> Mapping[Action, Task]:
        """The calls emitted so far."""
        return self._tasks

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Makes this run the models while the user's function is traced."""
        with as_current(self), _private.automatic_control_dependencies():
            yield

    def start_microbatch(self, microbatch: int) -> None:
        """Tells that the model calls that follow belong to this microbatch."""
        self._microbatch, self._calls = microbatch, 0

    @property
    def _is_ordered(self) -> bool:
        """Whether calls are to be ordered or timed; else TensorFlow may optimise across them."""
        num_partitions = len(self._world.devices)
        return num_partitions > 1 or self._num_microbatches > 1 or self._stamps is not None

    def _device(self, partition: int) -> str:
        """Where the calls of a partition run; all in one place if the cause of an error is sought.

        Between devices, errors of those that wait may be reported before their cause.
        """
        return self._world.devices[0 if is_careful() else partition]

    @property
    def _wants_halves(self) -> bool:
        """Whether backward passes come in two halves.

        With several partitions always: the partition before needs the gradients of a segment's
        inputs, and should not wait until those of its weights are there as well.
        """
        alone = self._world.config.pipeline in DEFERS_WEIGHTS or self._group_size > 1
        return len(self._world.devices) > 1 or (self._is_ordered and alone)

    # --- running a model -----------------------------------------------------------

    def run(
        self, model: Any, prepare: Prepare, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        """Emits one call of a model for the current microbatch.

        Args:
            model: The model, to tell calls of different models apart.
            prepare: Traces and plans the model for such arguments.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            The model's output, and the losses that its layers added.
        """
        if tf.compat.v1.get_default_graph() is not self._graph:
            raise StepError(
                f"Model '{model.name}' was called inside a loop body, a branch or a nested "
                "tf.function of an smp.step function. A pipeline must see the call: call the "
                "model directly in the smp.step function, loop in Python, and take tf.function "
                "off the step function and its helpers."
            )
        call = Structure.of((args, dict(kwargs)))
        ordinal, self._calls = self._calls, self._calls + 1
        key = self._key(model, call, ordinal)
        if key not in self._prepared:
            self._prepared[key] = prepare(args, kwargs)
            self._note_attributes(model, key[-1])
        traced, plan, homes = self._prepared[key]
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
        # What goes on inside the model is what the caller must hold, to take gradients of it.
        outputs = [values[id(program.taps.get(id(t), t))] for t in traced.outputs]
        for output, mask, logits in zip(outputs, traced.masks, traced.logits, strict=True):
            if mask is not None:
                _private.set_mask(output, values[id(mask)])
            if logits is not None:
                _private.set_logits(output, values[id(logits)])
        losses = [values[id(loss)] for loss in traced.losses]
        return traced.output_structure.pack(outputs), losses

    def _key(self, model: Any, call: Structure, ordinal: int) -> tuple[Any, ...]:
        """Equal for two calls that one trace of the model can serve.

        Its last entry numbers what Python has set in the model: `model.temperature` may be another
        one in the next call of the step.
        """
        now, states = attributes(model), self._attributes.setdefault(id(model), [])
        known = [number for state, number in states if state == now]
        number = known[0] if known else len(states)
        if not known:
            states.append((now, number))
        return (id(model), call_signature(call), number)

    def _note_attributes(self, model: Any, number: int) -> None:
        """The call may set attributes as well: those that it leaves are no change."""
        self._attributes[id(model)].append((attributes(model), number))

    def _leaf_values(self, traced: TracedGraph, call: Structure, ordinal: int) -> dict[int, Tensor]:
        values = dict(zip(map(id, traced.inputs), call_inputs(call), strict=True))
        for leaf in traced.variables:
            self._variables[id(leaf.placeholder)] = leaf.variable
            state = self._state.get(id(leaf.variable))
            if state is None or is_trainable(leaf.variable):
                value = tf.convert_to_tensor(tf_variable(leaf.variable))
                self._reads[id(leaf.variable)] = leaf.variable, value
                if state is not None:
                    value = read_after_assignment(state[1], value)
            else:
                value = state[1]
            values[id(leaf.placeholder)] = value
        return values

    def _program(
        self,
        key: Any,
        traced: TracedGraph,
        plan: Plan,
        values: Mapping[int, Tensor],
        training: Any,
    ) -> Program:
        required, optional = self._leaves(traced, values, training)
        program_key = (key, frozenset(map(id, required)), frozenset(map(id, optional)))
        if program_key not in self._programs:
            with _private.lifted():
                self._programs[program_key] = lower(
                    traced,
                    plan,
                    required,
                    optional,
                    units=self._is_ordered,
                    split_backward=self._wants_halves,
                    joins=self._group_size > 1,
                    checks_finite=self._checks is not None,
                )
        return self._programs[program_key]

    def _leaves(
        self, traced: TracedGraph, values: Mapping[int, Tensor], training: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and variables whose gradients will be wanted, and may be wanted."""
        taped = _private.tape_is_active()
        wanted = training is not False
        required: list[Tensor] = []
        optional: list[Tensor] = []
        for leaf in traced.variables:
            if not is_differentiable(leaf.placeholder):
                continue
            if taped and not _private.is_watched(values[id(leaf.placeholder)]):
                continue
            frozen = is_keras(leaf.variable) and not is_trainable(leaf.variable)
            first_class = not frozen if taped else wanted and is_trainable(leaf.variable)
            (required if first_class else optional).append(leaf.placeholder)
        for placeholder in traced.inputs:
            if is_differentiable(placeholder):
                if not taped:
                    optional.append(placeholder)
                elif _private.is_watched(values[id(placeholder)]):
                    required.append(placeholder)
        return required, optional

    # --- emitting ------------------------------------------------------------------

    def _run_segment(
        self, program: Program, segment: Segment, ordinal: int, values: dict[int, Tensor]
    ) -> Op | None:
        """Emits the forward call of a segment and adds its outputs to `values`."""
        number = self._numbers.setdefault((ordinal, segment.index), len(self._numbers))
        microbatch = self._microbatch

        def emit(kind: str, what: Pass, args: Sequence[Tensor]) -> list[Tensor]:
            self._refuse_when_finished()
            self._refuse_jacobian(program.traced.name)
            action = self._action(kind, number, microbatch)
            function = what.function
            if isinstance(what, Backward) and self._is_open(action):
                function = program.open(what)
            results = self._emit(action, segment.partition, function, args)
            note(
                self._tasks[action].last.name,
                Place(kind, segment.partition, microbatch, program.layers(segment)),
            )
            if kind == "F" and segment.side_effects:
                self._done.append((segment.partition, results.pop()))
            if self._checks is not None:
                self._checks.note(action, program, segment, what, args, results)
            if kind == "W":
                assert isinstance(what, Backward)
                self._second_halves[action] = SecondHalf(action, program, what, args, results)
            return results

        forward = program.forward(segment)
        args = [values[id(t)] for t in forward.feeds]
        action = Action("F", number, microbatch)
        with tf.device(self._device(segment.partition)):
            results = self._call(program, segment, action, args, emit)
        values.update({id(t): v for t, v in zip(forward.outputs, results, strict=True)})
        if action not in self._tasks:
            return None
        call = self._tasks[action].last
        if segment.side_effects:
            self._side_effects.append(call)
        return call

    def _call(
        self, program: Program, segment: Segment, action: Action, args: Sequence[Tensor], emit: Emit
    ) -> list[Tensor]:
        """The outputs of a segment, made so that gradients through them can be taken."""
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
        """A gradient after the end would be a stand-in that nothing replaces."""
        if self.schedule is not None:
            raise StepError(_FINISHED)

    def _refuse_jacobian(self, model: str) -> None:
        if len(self._world.mp_group) > 1:
            _private.refuse_jacobian(
                lambda name: StepError(_JACOBIAN.format(name=name, model=model))
            )

    def _note_gradient(self, feed: Tensor, gradient: Any) -> None:
        """Remembers whose gradient it is, if the feed of a call is a variable."""
        if id(feed) in self._variables:
            self._gradients.append((self._variables[id(feed)], gradient))

    def _is_open(self, action: Action) -> bool:
        """Whether what a call gives is handed on while the call still computes.

        With the last microbatch the sum of a gradient is complete, and on its way to the other
        replicas while those of the layers before are computed.
        """
        is_last = action.kind in ("B", "W") and action.microbatch == self._num_microbatches - 1
        return is_last and self._world.sums_early and self._stamps is None

    def _action(self, kind: str, number: int, microbatch: int) -> Action:
        repeat = 0
        while (action := Action(kind, number, microbatch, repeat)) in self._tasks:
            repeat += 1
        return action

    def _emit(
        self,
        action: Action,
        partition: int,
        function: Any,
        args: Sequence[Tensor],
        microbatches: tuple[int, ...] = (),
    ) -> list[Tensor]:
        with tf.device(self._device(partition)):
            one_thread = self._world.one_core_each and not self._is_open(action)
            one_thread = one_thread or is_careful()
            emit = functools.partial(emit_call, function, args, f"smp_{action.text}", one_thread)
            if self._stamps is None:
                call, results = emit()
                first = last = call
            else:
                first, call, last, results = self._stamps.around(action, args, emit)
        ops = tuple(dict.fromkeys((first, call, last, *(t.op for t in results))))
        self._tasks[action] = Task(action, partition, first, last, ops, microbatches)
        return results

    # --- adding up ------------------------------------------------------------------

    def terms(
        self, rows: Sequence[Sequence[Gradient]], others: Sequence[Tensor] = ()
    ) -> list[list[Gradient] | None]:
        """Fewer terms for sums over microbatches: gradients that are computed for several at once.

        The gradients of single microbatches are then no longer part of the schedule; whoever
        reads them none the less has them computed apart.

        Args:
            rows: What is to be added up, for each sum.
            others: Further tensors that something reads.

        Returns:
            For each sum the terms that give the same; None where nothing is joined.
        """
        if self._group_size == 1 or not self._second_halves:
            return [None] * len(rows)
        others = [*others, *(value for _, value in self._state.values())]
        effects = self._side_effects + _side_effects(self._graph)
        sums = Sums(rows, self._second_halves.values(), others, effects)
        groups = joinable(self._second_halves, sums, self._group_size)
        joined = [self._join(group) for group in groups]
        return sums.terms(joined)

    def _join(self, group: Sequence[SecondHalf]) -> Joined:
        """Emits the second halves of a group as one call, and forgets the single ones."""
        first, last = group[0], group[-1]
        columns = list(zip(*(half.args for half in group), strict=True))
        is_shared = [all(t is column[0] for t in column) for column in columns]
        is_open = self._is_open(last.action)
        function = first.program.joint(first.weights, is_shared, len(group), is_open)
        args = [
            t
            for column, shared in zip(columns, is_shared, strict=True)
            for t in (column[:1] if shared else column)
        ]
        partition = self._tasks[last.action].partition
        for half in group:
            del self._tasks[half.action]
        microbatches = tuple(half.action.microbatch for half in group)
        results = self._emit(last.action, partition, function, args, microbatches)
        gradients = first.weights.gradient.pack(results)
        for feed, gradient in zip(first.weights.gradient.wrt, gradients, strict=True):
            if gradient is not None:
                self._note_gradient(feed, gradient)
        if self._checks is not None:
            self._checks.join(last.action, first.program, first.weights, results, microbatches)
        return Joined(tuple(group), tuple(gradients))

    # --- finishing -------------------------------------------------------------------

    def finish(self, results: Sequence[Tensor]) -> list[Tensor | KeptBy]:
        """Completes the graph: late gradients, the schedule, the new state.

        Args:
            results: Flat tensors that the step function returns.

        Returns:
            The tensors to return in their stead; for a gradient of a variable of another
            process, who keeps it.

        Raises:
            StepError: if no result depends on a DistributedModel.
        """
        results = list(results)
        side_effects = self._side_effects + _side_effects(self._graph)
        state = list(self._state.values())

        flags: list[Tensor] = []

        def roots() -> list[Op]:
            saved = (value for value, _ in self._saved)
            values = (*results, *(value for _, value in state), *flags, *saved)
            return [t.op for t in values] + side_effects

        live = self._compute_late_gradients(results, roots)
        if self._checks is not None:
            flags += self._checks.emit(live, self._tasks, self._device)
            live = live_operations(roots())
        spread_out = len(self._world.mp_group) > 1
        if spread_out:
            instead = without_bridges(live)
            results[:] = [instead.get(id(t), t) for t in results]
            state[:] = [(v, instead.get(id(value), value)) for v, value in state]
            self._gradients = [(v, _stand_in(g, instead)) for v, g in self._gradients]
            self._saved = [(instead.get(id(t), t), p) for t, p in self._saved]
            live = live_operations(roots())
        graph = task_graph(self._tasks.values(), live, len(self._world.devices))
        if not graph.device and not self._may_be_empty:
            raise StepError(_NOTHING_TO_RUN + (_UNUSED if self._tasks else _NO_MODEL))
        config = self._world.config
        self.schedule = build(config.pipeline, graph, config.active_microbatches)
        if spread_out:
            kept = spread(
                Traced(
                    live=live,
                    tasks=self._tasks,
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
        impose(self.schedule, self._tasks, self._world.my_partitions)
        looks = []
        if self._checks is not None:
            looks = self._checks.look(flags, self.schedule, self._graph.name)
        with tf.control_dependencies(looks):  # a bad step changes nothing
            for variable, value in state:
                tf_variable(variable).assign(value)
        done = looks + [
            self._read(partition, done)
            for partition, done in self._done
            if partition in self._world.my_partitions
        ]
        if done:
            with tf.control_dependencies(done):
                results = [t if isinstance(t, KeptBy) else _in_place(t) for t in results]
        return results

    def _read(self, partition: int, done: Tensor) -> Op:
        """Reads the zero that a call with side effects ends with, so that it is not dropped."""
        with tf.device(self._device(partition)):
            return tf.raw_ops.Assert(condition=tf.equal(done, 0), data=[done])

    def finish_nest(self, nest: Any) -> Any:
        """As `finish`, for a nest of tensors and other leaves."""
        structure = Structure.of(nest)
        return structure.pack(self.finish(structure.tensors))

    def _compute_late_gradients(
        self, results: list[Tensor], roots: Callable[[], list[Op]]
    ) -> list[Op]:
        """Replaces the placeholders of late gradients that something reads."""
        waiting = list(self._late)
        computed: dict[int, Tensor] = {}
        while True:
            live = live_operations(roots())
            alive = set(live)
            used = [g for g in waiting if any(p.op in alive for _, p in g.placeholders)]
            if not used:
                done = [g for g in self._late if g not in waiting]
                assert not any(p.op in alive for g in done for _, p in g.placeholders)
                return live
            for late in used:
                waiting.remove(late)
                for placeholder, gradient in late.compute(computed):
                    computed[id(placeholder)] = gradient
                    for consumer in placeholder.consumers():
                        for index, tensor in enumerate(consumer.inputs):
                            if tensor is placeholder:
                                _private.replace_input(consumer, index, gradient)
                    results[:] = [gradient if t is placeholder else t for t in results]


def _side_effects(graph: Any) -> list[Op]:
    """Operations of the user's own code that TensorFlow runs though nothing reads them."""
    return [
        op
        for op in graph.get_operations()
        if _private.is_stateful(op) and op.type not in ("ReadVariableOp", "Placeholder")
    ]


def _stand_in(gradient: Any, instead: Mapping[int, Tensor]) -> Any:
    """A gradient without the bridges that it went over."""
    if isinstance(gradient, tf.IndexedSlices):
        values, indices = _stand_in(gradient.values, instead), _stand_in(gradient.indices, instead)
        shape = gradient.dense_shape
        return tf.IndexedSlices(
            values, indices, None if shape is None else _stand_in(shape, instead)
        )
    return instead.get(id(gradient), gradient)


def _in_place(tensor: Tensor) -> Tensor:
    """An identity on the tensor's own device."""
    with tf.device(tensor.device):
        return tf.identity(tensor)
