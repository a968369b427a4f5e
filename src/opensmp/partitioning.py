"""How one model is partitioned: from a call of it to a traced, planned, placed graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.graph import TracedGraph, trace
from opensmp.plan import Plan, auto_plan, layer_partitions, manual_plan, variable_homes
from opensmp.runtime.placement import place
from opensmp.runtime.world import World


class Partitioning:
    """The partitions of one model; they stay for all shapes and modes it is called with.

    Args:
        name: Name of the model.
        forward: The model's plain call.
        variables: Gives the model's variables.
    """

    def __init__(
        self, name: str, forward: Callable[..., Any], variables: Callable[[], list[Any]]
    ) -> None:
        self._name = name
        self._forward = forward
        self._variables = variables
        self._layers: dict[tuple[int, int], int] = {}
        self._homes: dict[int, int] = {}
        self._world: World | None = None

    def prepare(
        self, world: World, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[TracedGraph, Plan]:
        """Traces and plans one call of the model, and puts its variables in place.

        Args:
            world: Devices and configuration.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        if self._world is not world:  # another smp.init since
            self._world, self._layers, self._homes = world, {}, {}
        config = world.config
        with tf.init_scope():
            traced = self._trace(args, kwargs)
            if config.auto_partition:
                plan = auto_plan(traced, config.partitions, self._layers)
                self._layers = layer_partitions(traced, plan) | self._layers
            else:
                plan = manual_plan(traced, config.partitions, config.default_partition)
            self._homes = variable_homes(traced, plan, self._homes)
            variables = [*self._variables(), *traced.new_variables]
            place(variables, self._homes, world.devices, config.default_partition)
        return traced, plan

    def home(self, variable: Any) -> int | None:
        """The partition a variable lies in, None if the model does not read it."""
        return self._homes.get(id(variable))

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
            build.get_concrete_function(*specs)
        return run()


def _spec(leaf: Any) -> Any:
    return tf.TensorSpec(leaf.shape, leaf.dtype) if tf.is_tensor(leaf) else leaf
