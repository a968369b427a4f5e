"""Caches of the traces and programs of the models that one step calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.trace.differentiable import is_differentiable
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.trace import TracedGraph, call_signature
from opensmp.compiler.trace.variables import is_keras, is_trainable
from opensmp.execution.context import Prepared
from opensmp.execution.models.attributes import Attributes, attributes


class ModelTraces:
    """Caches the traces, plans and programs of one step's calls."""

    def __init__(self) -> None:
        self._prepared: dict[Any, Prepared] = {}
        self._programs: dict[Any, Program] = {}
        self._attributes: dict[int, list[tuple[Attributes, int]]] = {}

    def key(self, model: Any, call: Structure) -> tuple[Any, ...]:
        """Cache key of a call: calls with equal keys share one trace of the model.

        The last entry numbers the model's attribute values, because Python code may set an
        attribute such as `model.temperature` between two calls of the step.
        """
        now, states = attributes(model), self._attributes.setdefault(id(model), [])
        number = next((number for state, number in states if state == now), None)
        if number is None:
            number = len(states)
            states.append((now, number))
        return (id(model), call_signature(call), number)

    def prepared(self, key: tuple[Any, ...], model: Any, make: Callable[[], Prepared]) -> Prepared:
        """The trace and plan for a key of `key`; calls `make` on the first use."""
        if key not in self._prepared:
            self._prepared[key] = make()
            # The call itself may set attributes; the values that it leaves count as the same state.
            self._attributes[id(model)].append((attributes(model), key[-1]))
        return self._prepared[key]

    @property
    def calls(self) -> list[Prepared]:
        """The traced calls, with their plans."""
        return list(self._prepared.values())

    @property
    def graphs(self) -> list[Any]:
        """The graphs of the traces."""
        return [prepared.traced.graph for prepared in self._prepared.values()]

    def forget_symbolic(self) -> None:
        """Drops the traces that capture tensors of a graph, and their programs."""
        symbolic = {
            key
            for key, prepared in self._prepared.items()
            if any(tf.is_symbolic_tensor(outer) for outer, _ in prepared.traced.captures)
        }
        for key in symbolic:
            del self._prepared[key]
        for whole in [whole for whole in self._programs if whole[0][0] in symbolic]:
            del self._programs[whole]

    def program(
        self,
        key: tuple[Any, ...],
        required: Sequence[Tensor],
        optional: Sequence[Tensor],
        make: Callable[[], Program],
    ) -> Program:
        """The program for a key of `key` and a policy; calls `make` to lower on the first use.

        `required` are the leaves whose gradients will be used, `optional` those for which they may
        be.
        """
        whole = (key, frozenset(map(id, required)), frozenset(map(id, optional)))
        if whole not in self._programs:
            with _private.lifted():
                self._programs[whole] = make()
        return self._programs[whole]


def wanted_leaves(
    traced: TracedGraph, values: Mapping[int, Tensor], training: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves whose gradients will be used (required), and those for which they may be (optional).

    `values` maps the id of a leaf's placeholder to its value; `training` is the call's argument.
    """
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
