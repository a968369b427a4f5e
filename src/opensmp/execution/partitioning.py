"""Partitions a model: traces a call, plans it and places the variables."""

from __future__ import annotations

import functools
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.message_text import counted
from opensmp.base.progress import Clock, phase, say
from opensmp.compiler.costs.precision import precision_of
from opensmp.compiler.format import format_bytes
from opensmp.compiler.plan.methods.auto import auto_plan
from opensmp.compiler.plan.methods.build import warn_of_empty
from opensmp.compiler.plan.methods.colocation import beside, in_one_place
from opensmp.compiler.plan.methods.imbalance import warn_of_imbalance
from opensmp.compiler.plan.methods.manual import manual_plan
from opensmp.compiler.plan.methods.match import Places, fit, follow, follow_twin
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import PROCESSES
from opensmp.compiler.plan.variable_placement import variable_homes
from opensmp.compiler.trace.intermediate_outputs import taps
from opensmp.compiler.trace.trace import TracedGraph, trace
from opensmp.compiler.trace.variables import is_keras, tf_dtype
from opensmp.config import Config, offload, recompute
from opensmp.distributed.collectives.variable_moves import copy_variables, move_between_ranks
from opensmp.distributed.world import World
from opensmp.execution.context import Prepared
from opensmp.execution.models.hooks import run_checks
from opensmp.execution.models.layer_calls import calls_left
from opensmp.execution.models.shared_layers import trace_anew
from opensmp.execution.variables.early_reads import note_placing
from opensmp.execution.variables.known_placement import known_homes, note_homes, placed_before
from opensmp.execution.variables.placement import mark_copies, place

_logger = logging.getLogger("opensmp")


class Partitioning:
    """The partitioning of one model, kept for all input shapes and modes that it is called with.

    Args:
        model: The model.
        forward: The model's plain call.
        holders: Returns the models that contain it.
        is_part: Whether it is a part of such a model rather than a model of its own.
        is_leaf: Whether it is a single layer, which is not divided.

    Attributes:
        tapped: Positions of the last call's outputs from which other tensors are computed.
        loss_layers: Maps the number of losses of a call to the layers that add them. Kept here
            because Keras would track the layers if they were an attribute of the model.
    """

    def __init__(
        self,
        model: Any,
        forward: Callable[..., Any],
        holders: Callable[[], Iterable[Any]] = tuple,
        is_part: bool = False,
        is_leaf: bool = False,
    ) -> None:
        self._model = weakref.ref(model)
        self._name = model.name
        self._forward = forward
        self._holders = holders
        self._is_part, self._is_leaf = is_part, is_leaf
        self._plans: list[Plan] = []
        self._homes: dict[int, int] = {}
        self._world: World | None = None
        self.tapped: list[int] = []
        self._equal: set[int] = set()  # ids of variables with the same value in all replicas
        self._read: dict[int, Any] = {}
        self.loss_layers: dict[int, list[Any]] = {}

    def prepare(self, world: World, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prepared:
        """Traces and plans one call of the model, and places its variables."""
        if self._world is not world:  # smp.init was called again
            self._world, self._plans, self._homes, self._equal = world, [], {}, set()
        config = world.config
        restores = _private.HeldBackRestores()
        with _private.lifted(), _private.own_pending_variables():
            clock = Clock()
            with restores.collecting(), calls_left(), phase(f"tracing model '{self._name}'"):
                traced = self._trace(args, kwargs)
            read = [leaf.variable for leaf in traced.variables]
            # Placed variables stay where they are, whichever model has placed them.
            self._homes.update(known_homes(world, read))
            inside = taps(traced)
            self.tapped = [i for i, t in enumerate(traced.outputs) if id(t) in inside]
            placed = set(self._homes)
            is_first = not self._plans and not self._is_part
            with phase(f"planning {config.partitions} partitions of model '{self._name}'"):
                plan = self._plan(traced, config, world)
            self._read.update((id(leaf.variable), leaf.variable) for leaf in traced.variables)
            self._homes = variable_homes(traced, plan, self._homes)
            model = self._model()
            variables = _variables(model, traced)
            move_between_ranks(placed_before(world, [*variables, *read]), self._homes, world)
            elsewhere = {
                partition: world.mp_group[world.owner(partition)]
                for partition in range(config.partitions)
                if partition not in world.my_partitions
            }
            default = config.default_partition
            note_placing(v for v in variables if id(v) in self._homes and id(v) not in placed)
            moving = _moving(world, variables, self._homes)
            with phase(f"building the variables of model '{self._name}'"):
                place(variables, self._homes, world.devices, default, elsewhere, world.owner)
            if moving:
                for each in [model, *self._holders()]:
                    _private.forget_compiled_functions(each, moving)
                trace_anew(moving)
            mark_copies(read, self._homes, elsewhere)
            note_homes(world, [*variables, *read], self._homes)
            self._make_equal(variables, world)
            if model is not None:
                run_checks(model)
                restores.release(model)
        if is_first and config.partitions > 1:
            say("model '%s': %s, in %s", self._name, _described(plan), clock)
        return Prepared(traced, plan, self._homes, self._with_other_rows(args, kwargs))

    def _with_other_rows(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[int], TracedGraph] | None:
        """The function `trace_rows` of a call; None for sparse and ragged tensors."""
        leaves = tf.nest.flatten((args, dict(kwargs)))
        if any(tf.is_tensor(leaf) and not isinstance(leaf, tf.Tensor) for leaf in leaves):
            return None
        specs = tf.nest.map_structure(_spec, (args, dict(kwargs)))
        return functools.partial(self._trace_rows, specs)

    def _trace_rows(self, specs: Any, rows: int) -> TracedGraph:
        """Traces a call with another number of rows for its costs: nothing is planned or placed."""
        leaves = tf.nest.flatten(specs)
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, tf.TensorSpec)]
        given = next((shape[0] for shape in shapes if shape.rank), None)

        def placeholder(leaf: Any) -> Any:
            if not isinstance(leaf, tf.TensorSpec):
                return leaf
            shape = leaf.shape
            if shape.rank and shape[0] == given:
                shape = [rows, *shape[1:]]
            return tf.compat.v1.placeholder(leaf.dtype, shape)

        with _private.new_graph("other_rows").as_default():
            args, kwargs = tf.nest.map_structure(placeholder, specs)
        with _private.lifted(), _private.own_pending_variables(), calls_left():
            return self._trace(args, kwargs)

    def _make_equal(self, variables: list[Any], world: World) -> None:
        """Copies the values of new variables from the first replica to the others."""
        new = [variable for variable in variables if id(variable) not in self._equal]
        self._equal.update(map(id, new))
        copy_variables(new, world.dp_group, world.dp_group[0], "the initial weights")

    def is_done(self, world: World) -> bool:
        """Whether the model has been partitioned since `smp.init`."""
        return self._world is world

    @property
    def plan(self) -> Plan | None:
        """The plan of the first call; None before."""
        return self._plans[0] if self._plans else None

    @property
    def read(self) -> list[Any]:
        """The variables that calls of the model have read, including those it does not track."""
        return list(self._read.values())

    def home(self, variable: Any) -> int | None:
        """The partition of a variable; None if the model does not read it."""
        return self._homes.get(id(variable))

    def _plan(self, traced: TracedGraph, config: Config, world: World) -> Plan:
        """A plan for a trace; after the first trace, one that keeps the placement of the first."""
        machine = PROCESSES if world.computes_to_send else None
        settings = PlanSettings.of(config, machine, precision_of(traced))
        if not config.auto_partition:
            plan = manual_plan(traced, config.partitions, config.default_partition, settings)
        elif self._plans:
            plan = follow(traced, self._plans, _limited_as(settings, self._plans[0]))
        elif stored := self._stored_plan(config):
            settings = _limited_as(settings, stored)
            plan = fit(stored, traced, config.partitions, settings)
        elif self._is_leaf:
            plan = in_one_place(traced, self._loads(world), self._homes, settings)
        else:
            plan = self._auto_plan(traced, world, settings)
        if not self._plans and not self._is_part:
            warn_of_empty(plan, is_shared=bool(self._homes))
            if plan.source == "auto" and not self._homes and not world.rank:
                warn_of_imbalance(plan)
        known = {call.label for earlier in self._plans for call in earlier.calls if call.pieces}
        if any(call.pieces and call.label not in known for call in plan.calls):
            self._plans.append(plan)
        return plan

    def _stored_plan(self, config: Config) -> Plan | None:
        """The plan file of the configuration; parts ignore a file that is shared by all models."""
        path = config.plan_path(self._name)
        if path is None:
            return None
        plan = Plan.load(path)
        for key, module in (("recompute", recompute), ("offload", offload)):
            made = getattr(plan.settings, key)
            if made != getattr(config, key) == module.NONE:
                text = json.dumps(module.as_dict(made))
                _logger.warning(
                    "plan '%s' was made with %s %s, but this run has none, and may need more "
                    'memory than the plan predicts. Add "%s": %s to smp.init.',
                    path,
                    key,
                    text,
                    key,
                    text,
                )
        is_other = isinstance(config.plan, str) and plan.model != self._name
        return None if self._is_part and is_other else plan

    def _loads(self, world: World) -> list[float]:
        """Bytes of the variables in each partition, of the models that contain this one."""
        loads = [0.0] * world.config.partitions
        variables = {id(v): v for holder in self._holders() for v in holder.variables}
        for key, partition in known_homes(world, variables.values()).items():
            variable = variables[key]
            loads[partition] += math.prod(variable.shape) * tf_dtype(variable).size
        return loads

    def _auto_plan(self, traced: TracedGraph, world: World, settings: PlanSettings) -> Plan:
        """An automatic plan; with several processes that of an earlier model with the same layers.

        Corresponding weights, such as those of a network and of its moving average, are then in the
        same process, even if the models are called with different shapes.
        """
        key = None
        if len(world.mp_group) > 1 and not self._homes:
            key = _layers(self._model(), traced)
        twins = _twins_in(world)
        if key in twins:
            return follow_twin(traced, twins[key], settings)
        plan = auto_plan(traced, world.config.partitions, settings, self._homes)
        if self._is_part and not self._homes:
            plan = beside(plan, self._loads(world))
        if key is not None:
            twins[key] = Places.of(plan)
        return plan

    def _trace(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TracedGraph:
        run = functools.partial(trace, self._forward, args, dict(kwargs), name=self._name)
        try:
            return run()
        except ValueError as error:
            if not _private.is_variable_creation_error(error):
                raise
        # A layer creates variables with initial values, which cannot wait for their device: build
        # the model on the host first, and move its variables afterwards.
        pending = _private.take_pending_variables()
        with tf.device("CPU:0"):
            for variable in pending:
                _private.initialize_on(variable, "CPU:0")
            specs = tf.nest.map_structure(_spec, (args, dict(kwargs)), expand_composites=True)
            build = tf.function(lambda a, k: self._forward(*a, **k), autograph=False)
            with _private.eager_builds():
                build.get_concrete_function(*specs)
        return run()


def _described(plan: Plan) -> str:
    """What was planned, with the predictions of automatic plans."""
    text = counted(plan.num_partitions - len(plan.empty), "partition")
    if plan.source != "auto" or not plan.has_costs:
        return f"{text} by {'hand' if plan.source == 'manual' else plan.source or 'a plan'}"
    found = plan.prediction
    return (
        f"{text} planned, predicted bubble {100 * found.bubble:.0f} %, peak memory "
        f"{format_bytes(max(found.peak_bytes))}"
    )


def _limited_as(settings: PlanSettings, plan: Plan) -> PlanSettings:
    """Returns the settings with the memory limit of a plan."""
    limit = plan.settings.machine.memory_bytes
    return replace(settings, machine=replace(settings.machine, memory_bytes=limit))


_twins: tuple[World | None, dict[Any, Places]] = None, {}


def _twins_in(world: World) -> dict[Any, Places]:
    """The placements planned since `smp.init`, by the structure of the models (see `_layers`)."""
    global _twins
    if _twins[0] is not world:
        _twins = world, {}
    return _twins[1]


def _layers(model: Any, traced: TracedGraph) -> Any:
    """Structure of a model: its layer calls and weight shapes, without names."""
    if model is None:
        return None
    calls = tuple((type(span.layer).__name__, span.depth) for span in traced.spans)
    weights = tuple((tuple(weight.shape), str(weight.dtype)) for weight in model.weights)
    return calls, weights


def _variables(model: Any, traced: TracedGraph) -> list[Any]:
    """The variables of a model, including those of layers that it uses but does not track."""
    read = [leaf.variable for leaf in traced.variables if is_keras(leaf.variable)]
    waiting = [variable for variable in read if not _private.is_initialized(variable)]
    tracked = () if model is None else model.variables
    found = [*tracked, *traced.new_variables, *waiting]
    return list({id(variable): variable for variable in found}.values())


def _moving(world: World, variables: list[Any], homes: Mapping[int, int]) -> set[int]:
    """Ids of variables that have memory and are placed now for the first time.

    The result is the same in all ranks, even where a rank's memory does not change, because tracing
    again is a collective operation.
    """
    known = known_homes(world, variables)
    return {
        id(variable)
        for variable in variables
        if id(variable) in homes and id(variable) not in known and _private.is_initialized(variable)
    }


def _spec(leaf: Any) -> Any:
    return tf.TensorSpec(leaf.shape, leaf.dtype) if tf.is_tensor(leaf) else leaf
