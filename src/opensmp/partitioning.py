"""How one model is partitioned: from a call of it to a traced, planned, placed graph."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.collectives import copy_variables
from opensmp.config import Config
from opensmp.graph import TracedGraph, trace
from opensmp.graph.variables import is_keras
from opensmp.plan import (
    PROCESSES,
    Places,
    Plan,
    PlanSettings,
    auto_plan,
    fit,
    follow,
    follow_twin,
    manual_plan,
    variable_homes,
    warn_of_empty,
)
from opensmp.runtime.current import Prepared
from opensmp.runtime.placement import mark_copies, place
from opensmp.runtime.world import World
from opensmp.saving import deferred


class Partitioning:
    """The partitions of one model; they stay for all shapes and modes it is called with.

    Args:
        model: The model.
        forward: The model's plain call.
    """

    def __init__(self, model: Any, forward: Callable[..., Any]) -> None:
        self._model = weakref.ref(model)
        self._name = model.name
        self._forward = forward
        self._plans: list[Plan] = []
        self._homes: dict[int, int] = {}
        self._world: World | None = None
        self._equal: set[int] = set()  # ids of variables that are the same in all replicas

    def prepare(self, world: World, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prepared:
        """Traces and plans one call of the model, and puts its variables in place.

        Args:
            world: Devices and configuration.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        if self._world is not world:  # another smp.init since
            self._world, self._plans, self._homes, self._equal = world, [], {}, set()
        config = world.config
        restores = _private.HeldBackRestores()
        with _private.lifted(), _private.own_pending_variables():
            with restores.collecting():
                traced = self._trace(args, kwargs)
            plan = self._plan(traced, config, world)
            self._homes = variable_homes(traced, plan, self._homes)
            model = self._model()
            variables = _variables(model, traced)
            elsewhere = {
                partition: world.mp_group[world.owner(partition)]
                for partition in range(config.partitions)
                if partition not in world.my_partitions
            }
            default = config.default_partition
            if place(variables, self._homes, world.devices, default, elsewhere, world.owner):
                _private.forget_compiled_functions(model)
            mark_copies([leaf.variable for leaf in traced.variables], self._homes, elsewhere)
            self._make_equal(variables, world)
            if model is not None:
                deferred.check(model)
                restores.release(model)
        return Prepared(traced, plan, self._homes)

    def _make_equal(self, variables: list[Any], world: World) -> None:
        """Gives new variables the values that they have in the first replica."""
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

    def home(self, variable: Any) -> int | None:
        """The partition a variable lies in, None if the model does not read it."""
        return self._homes.get(id(variable))

    def _plan(self, traced: TracedGraph, config: Config, world: World) -> Plan:
        """A plan for a trace: the first one, or one that keeps the places of the first."""
        settings = PlanSettings.of(config, PROCESSES if world.computes_to_send else None)
        if not config.auto_partition:
            plan = manual_plan(traced, config.partitions, config.default_partition, settings)
        elif self._plans:
            plan = follow(traced, self._plans, settings)
        elif path := config.plan_path(self._name):
            plan = fit(Plan.load(path), traced, config.partitions, settings)
        else:
            plan = self._auto_plan(traced, world, settings)
        if not self._plans:
            warn_of_empty(plan)
        known = {call.label for earlier in self._plans for call in earlier.calls if call.pieces}
        if any(call.pieces and call.label not in known for call in plan.calls):
            self._plans.append(plan)
        return plan

    def _auto_plan(self, traced: TracedGraph, world: World, settings: PlanSettings) -> Plan:
        """A plan of our own; in several processes that of an earlier model of the same layers.

        Weights that belong together, such as those of a network and of its moving average, then
        lie together, though the models may be called with other shapes.
        """
        key = _layers(self._model(), traced) if len(world.mp_group) > 1 else None
        twins = _twins_in(world)
        if key in twins:
            return follow_twin(traced, twins[key], settings)
        plan = auto_plan(traced, world.config.partitions, settings)
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
        # A layer makes variables that have a value from the start, which cannot wait for
        # their device: build the model on the host first; its variables move afterwards.
        pending = _private.take_pending_variables()
        with tf.device("CPU:0"):
            for variable in pending:
                _private.initialize_on(variable, "CPU:0")
            specs = tf.nest.map_structure(_spec, (args, dict(kwargs)), expand_composites=True)
            build = tf.function(lambda a, k: self._forward(*a, **k), autograph=False)
            with _private.eager_builds():
                build.get_concrete_function(*specs)
        return run()


_twins: tuple[World | None, dict[Any, Places]] = None, {}


def _twins_in(world: World) -> dict[Any, Places]:
    """What was planned since `smp.init`, by what the models consist of."""
    global _twins
    if _twins[0] is not world:
        _twins = world, {}
    return _twins[1]


def _layers(model: Any, traced: TracedGraph) -> Any:
    """What a model consists of: its layer calls and weights, without their names."""
    if model is None:
        return None
    calls = tuple((type(span.layer).__name__, span.depth) for span in traced.spans)
    weights = tuple((tuple(weight.shape), str(weight.dtype)) for weight in model.weights)
    return calls, weights


def _variables(model: Any, traced: TracedGraph) -> list[Any]:
    """The variables of a model, with those of layers that it uses but does not track."""
    read = [leaf.variable for leaf in traced.variables if is_keras(leaf.variable)]
    waiting = [variable for variable in read if not _private.is_initialized(variable)]
    tracked = () if model is None else model.variables
    found = [*tracked, *traced.new_variables, *waiting]
    return list({id(variable): variable for variable in found}.values())


def _spec(leaf: Any) -> Any:
    return tf.TensorSpec(leaf.shape, leaf.dtype) if tf.is_tensor(leaf) else leaf
