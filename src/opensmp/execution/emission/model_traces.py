"""The traces and programs of the models that one step calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opensmp import _private
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.trace.differentiable import is_differentiable
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.trace import TracedGraph, call_signature
from opensmp.compiler.trace.variables import is_keras, is_trainable
from opensmp.execution.context import Prepared
from opensmp.execution.models.attributes import attributes

Tensor = Any


class ModelTraces:
    """What was traced, planned and lowered for the calls of one step; each once."""

    def __init__(self) -> None:
        self._prepared: dict[Any, Prepared] = {}
        self._programs: dict[Any, Program] = {}
        self._attributes: dict[int, list[tuple[Any, int]]] = {}

    def key(self, model: Any, call: Structure) -> tuple[Any, ...]:
        """Equal for two calls that one trace of the model can serve.

        Its last entry numbers what Python has set in the model: `model.temperature` may be another
        one in the next call of the step.

        Args:
            model: The model.
            call: The arguments of the call.
        """
        now, states = attributes(model), self._attributes.setdefault(id(model), [])
        known = [number for state, number in states if state == now]
        number = known[0] if known else len(states)
        if not known:
            states.append((now, number))
        return (id(model), call_signature(call), number)

    def prepared(self, key: tuple[Any, ...], model: Any, make: Callable[[], Prepared]) -> Prepared:
        """The trace and plan for a key, made at the first time.

        Args:
            key: See `key`.
            model: The model.
            make: Traces and plans it.
        """
        if key not in self._prepared:
            self._prepared[key] = make()
            # The call may set attributes as well: those that it leaves are no change.
            self._attributes[id(model)].append((attributes(model), key[-1]))
        return self._prepared[key]

    def program(
        self,
        key: tuple[Any, ...],
        required: Sequence[Tensor],
        optional: Sequence[Tensor],
        make: Callable[[], Program],
    ) -> Program:
        """The program for a key, made at the first time.

        Args:
            key: See `key`.
            required: Leaves whose gradients will be wanted.
            optional: Leaves whose gradients may be wanted.
            make: Lowers the model.
        """
        whole = (key, frozenset(map(id, required)), frozenset(map(id, optional)))
        if whole not in self._programs:
            with _private.lifted():
                self._programs[whole] = make()
        return self._programs[whole]


def wanted_leaves(
    traced: TracedGraph, values: Mapping[int, Tensor], training: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and variables whose gradients will be wanted, and those that may be wanted.

    Args:
        traced: The traced model.
        values: Id of a leaf's placeholder to its value in the call.
        training: That argument of the call.
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
