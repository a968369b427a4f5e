"""Forward and backward cost of each operation of a traced graph, in FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.costs import gradient_costs, op_costs
from opensmp.compiler.costs.gradient_flow import GradientFlow
from opensmp.compiler.costs.op_graph import Port, Wiring
from opensmp.compiler.costs.residuals import Keeper
from opensmp.compiler.costs.work import Call, Work
from opensmp.compiler.trace.control_flow import LOOPS, bodies
from opensmp.compiler.trace.shared_ops import replicated
from opensmp.compiler.trace.trace import TracedGraph

UNKNOWN_SIZE = 32
"""Assumed size of a dimension that the trace leaves unknown, such as the batch."""

_NOT_RUN = frozenset({"Const", "Placeholder", "NoOp"})


@dataclass(frozen=True, eq=False)
class Costs:
    """The costs of a traced graph for one microbatch; lists have one entry per operation.

    Operations that no result depends on do not run and cost nothing.

    Attributes:
        wiring: The operations and the tensors that they read.
        flow: Where gradients flow.
        forward: Work of each operation's forward pass.
        backward: Work of each operation's share of the backward pass.
        residual_bytes: Bytes that the backward pass keeps of each operation's results; an input of
            the model counts for the first operation whose gradient reads it.
        source_bytes: The part of `residual_bytes` that is inputs of the model.
        kept: The tensors that the backward pass keeps, without inputs of the model.
        active: Indices of operations that depend on activations or state.
        replicated: Indices of operations that are replicated and belong to no partition.
        defaulted: Types that neither TensorFlow's statistics nor a formula covers.
    """

    wiring: Wiring
    flow: GradientFlow
    forward: list[Work]
    backward: list[Work]
    residual_bytes: NDArray[np.int64]
    source_bytes: NDArray[np.int64]
    kept: tuple[Port, ...]
    active: tuple[int, ...]
    replicated: frozenset[int]
    defaulted: tuple[str, ...]

    def flops(self) -> dict[str, tuple[float, float]]:
        """Returns operation name to (forward FLOPs, backward FLOPs)."""
        return {
            op.name: (forward.flops, backward.flops)
            for op, forward, backward in zip(
                self.wiring.operations, self.forward, self.backward, strict=True
            )
        }


def trainable_placeholders(traced: TracedGraph) -> tuple[Tensor, ...]:
    """Returns the placeholders of the variables that training computes gradients for."""
    updated = {id(variable) for variable, _ in traced.updates}
    return tuple(
        v.placeholder
        for v in traced.variables
        if v.variable.trainable
        and id(v.variable) not in updated
        and (v.placeholder.dtype.is_floating or v.placeholder.dtype.is_complex)
    )


def graph_costs(
    traced: TracedGraph,
    *,
    required: Collection[Tensor] | None = None,
    unknown_size: int = UNKNOWN_SIZE,
) -> Costs:
    """Counts FLOPs, bytes and residuals of every operation of a traced graph.

    Forward FLOPs come from TensorFlow's own op statistics where available, and otherwise from
    `opensmp.compiler.costs.op_costs`; loops, branches and calls sum over the operations inside. The
    backward pass and its residuals follow `opensmp.compiler.costs.gradient_costs`.

    Args:
        traced: The traced model.
        required: Inputs and variables (their placeholders) whose gradients are needed; None for all
            trainable variables, empty for inference.
        unknown_size: Assumed size of unknown dimensions.
    """
    wiring = Wiring.of(traced.operations, unknown_size)
    wanted = trainable_placeholders(traced) if required is None else required
    copied = frozenset(wiring.index[op] for op in replicated(traced))
    state = {id(variable) for variable, _ in traced.updates}
    leaves = {wiring.index[t.op] for t in wanted}
    active = {wiring.index[t.op] for t in traced.inputs}
    active |= {wiring.index[v.placeholder.op] for v in traced.variables if id(v.variable) in state}
    constant = copied | {wiring.index[op] for op in traced.sources} - active
    results = [_port(wiring, tensor) for tensor in traced.results]
    loss_like = [*traced.outputs, *(t for t in traced.logits if t is not None), *traced.losses]
    counter = _Counter(unknown_size)
    counted = counter.count(
        wiring,
        leaves=leaves,
        active=active,
        constant=constant,
        differentiated=[_port(wiring, tensor) for tensor in loss_like],
        results=results,
    )
    sources = np.zeros(len(wiring.operations), dtype=np.int64)
    for source, reader in counted.keeper.sources.items():
        sources[reader] += wiring.array((source, 0)).nbytes
    return Costs(
        wiring,
        counted.flow,
        counted.forward,
        counted.backward,
        np.array(counted.keeper.residual_bytes, dtype=np.int64) + sources,
        sources,
        counted.keeper.kept,
        counted.keeper.active,
        copied,
        tuple(sorted(counter.defaulted)),
    )


def _port(wiring: Wiring, tensor: Tensor) -> Port:
    return wiring.index[tensor.op], tensor.value_index


# --- counting one graph ---------------------------------------------------------------------


@dataclass(eq=False)
class _Counted:
    """The costs of one graph, either the model's or that of a function inside it.

    Attributes:
        flow: Where gradients flow.
        forward: Work of each operation.
        backward: Work of each operation's gradient.
        keeper: The tensors that the backward pass keeps.
    """

    flow: GradientFlow
    forward: list[Work]
    backward: list[Work]
    keeper: Keeper


class _Counter:
    """Counts the costs of graphs, including those of nested functions."""

    def __init__(self, unknown_size: int) -> None:
        self.defaulted: set[str] = set()
        self._unknown_size = unknown_size
        self._wirings: dict[int, Wiring] = {}

    def count(
        self,
        wiring: Wiring,
        *,
        leaves: Collection[int],
        active: Collection[int],
        constant: Collection[int],
        differentiated: Sequence[Port],
        results: Sequence[Port],
    ) -> _Counted:
        """Counts one graph: `leaves`, `active` and `constant` are placeholders and operations.

        Those of `leaves` need gradients, those of `active` differ between microbatches, and the
        results of `constant` need not be kept. Gradients start from `differentiated`.
        """
        size = len(wiring.operations)
        flow = GradientFlow.of(wiring, leaves, differentiated)
        live = _live(wiring, results)
        keeper = Keeper(wiring, active, constant)
        forward, backward = [Work()] * size, [Work()] * size
        counted = _Counted(flow, forward, backward, keeper)
        for i in range(size):
            if not live[i] or wiring.types[i] in _NOT_RUN:
                continue
            nested = bodies(wiring.operations[i], self._unknown_size)
            if nested is not None:
                self._count_nested(wiring, i, nested, counted, keeper)
                continue
            call = _call(wiring, i)
            counted.forward[i] = self._forward(wiring.operations[i], call)
            if flow.wanted[i]:
                self._count_gradient(wiring, i, call, counted, keeper)
        for i in keeper.again():
            counted.backward[i] = counted.backward[i] + counted.forward[i]
        for port, readers in flow.summed(wiring).items():
            array = wiring.array(port)  # the gradients of all readers are added up
            work = Work((readers - 1) * array.elements, (readers + 1) * array.nbytes, 1)
            counted.backward[port[0]] = counted.backward[port[0]] + work
        return counted

    def _forward(self, op: Op, call: Call) -> Work:
        """Returns the work of one operation's forward pass; records types without a formula."""
        shapes = ([a.shape for a in call.inputs], [a.shape for a in call.outputs])
        found = op_costs.formula(call)
        flops = _private.registered_flops(op, *shapes)
        if found is None:
            if flops is None:
                self.defaulted.add(op.type)
            found = op_costs.default(call)
        flops = found[0] if flops is None else flops
        return Work(flops, found[1], 1, op_costs.narrow_flops(call, flops))

    def _count_gradient(
        self, wiring: Wiring, i: int, call: Call, counted: _Counted, keeper: Keeper
    ) -> None:
        """Counts the gradient of one operation and the tensors that it keeps."""
        wanted = counted.flow.wanted[i]
        forward = counted.forward[i]
        sparse = wiring.types[wiring.inputs[i][0][0]] == "Placeholder" if call.inputs else False
        work = gradient_costs.backward(call, wanted, forward, sparse=sparse)
        if i in counted.flow.hidden:  # inside a function whose custom gradient recomputes it
            counted.backward[i] = forward + work
            return
        counted.backward[i] = work
        custom = i in counted.flow.custom  # may read all arguments of its function
        inputs, outputs = (wanted, ()) if custom else gradient_costs.reads(call, wanted)
        for port in (*(wiring.inputs[i][k] for k in inputs), *((i, k) for k in outputs)):
            keeper.keep(port, i)

    def _count_nested(
        self, wiring: Wiring, i: int, nested: Any, counted: _Counted, keeper: Keeper
    ) -> None:
        """Counts a loop, branch or call; for several branches, takes the maximum of each cost."""
        loop = wiring.types[i] in LOOPS
        ports = wiring.inputs[i][nested.skip :]
        wanted = [k - nested.skip for k in counted.flow.wanted[i] if k >= nested.skip]
        every: list[tuple[Work, Work, int]] = []
        for graph in nested.graphs:
            inside = self._wiring(graph)
            arguments = [inside.index[t.op] for t in graph.inputs[: len(ports)]]
            results = [_port(inside, tensor) for tensor in graph.outputs]
            results = results[: len(ports)] if loop else results
            invariant = {
                k
                for k, t in enumerate(graph.outputs[: len(ports)])
                if loop and _passed_on(t) is graph.inputs[k]
            }
            leaves = {arguments[k] for k in wanted}
            if loop and leaves:
                leaves = _carried(inside, arguments, results, leaves)
            active = {
                a
                for k, a in enumerate(arguments)
                if (loop and k not in invariant) or keeper.is_active(ports[k])
            }
            body = self.count(
                inside,
                leaves=leaves,
                active=active - {arguments[k] for k in invariant},
                constant=set(arguments) - active,
                differentiated=results,
                results=results,
            )
            residual = sum(body.keeper.residual_bytes)
            for k, argument in enumerate(arguments):
                if argument not in body.keeper.sources:
                    continue
                if loop and k not in invariant:
                    residual += inside.array((argument, 0)).nbytes  # kept for each iteration
                else:
                    keeper.keep(ports[k], i)
            backward = sum(body.backward, Work()) if wanted else Work()
            every.append((sum(body.forward, Work()), backward, residual if wanted else 0))
        kept = max(residual for *_, residual in every) * nested.trips
        counted.keeper.residual_bytes[i] += kept
        counted.forward[i] = _largest([f for f, _, _ in every]) * nested.trips + Work(launches=1)
        if wanted:  # residuals of a loop are stacked and unstacked
            work = _largest([b for _, b, _ in every]) * nested.trips
            counted.backward[i] = work + Work(0.0, 2 * kept if loop else 0, 1)

    def _wiring(self, graph: Any) -> Wiring:
        if id(graph) not in self._wirings:
            self._wirings[id(graph)] = Wiring.of(graph.get_operations(), self._unknown_size)
        return self._wirings[id(graph)]


def _call(wiring: Wiring, i: int) -> Call:
    op = wiring.operations[i]
    return Call(op.type, wiring.input_arrays(i), wiring.arrays[i], op.get_attr)


def _live(wiring: Wiring, results: Sequence[Port]) -> bytearray:
    """Marks the operations that run: those with side effects and those that results depend on."""
    live = bytearray(len(wiring.operations))
    for i, _ in results:
        live[i] = 1
    for i in range(len(live) - 1, -1, -1):
        if live[i] or _private.is_stateful(wiring.operations[i]):
            live[i] = 1
            for p in wiring.producers(i):
                live[p] = 1
    return live


def _passed_on(tensor: Tensor) -> Tensor:
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def _carried(
    wiring: Wiring, arguments: Sequence[int], results: Sequence[Port], leaves: set[int]
) -> set[int]:
    """Returns the loop-body arguments that gradients flow to, including via earlier iterations."""
    while True:
        reached = GradientFlow.reached_from(wiring, leaves)
        more = {
            arguments[k]
            for k, (i, o) in enumerate(results)
            if reached[i] and wiring.arrays[i][o].differentiable
        }
        if more <= leaves:
            return leaves
        leaves = leaves | more


def _largest(works: Sequence[Work]) -> Work:
    return Work(
        max(work.flops for work in works),
        max(work.bytes for work in works),
        max(work.launches for work in works),
        max(work.narrow for work in works),
    )
