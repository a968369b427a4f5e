"""Determines where gradients flow in a graph, without building them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from opensmp import _private
from opensmp.compiler.costs.families import BLOCKING
from opensmp.compiler.costs.op_graph import Port, Wiring


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """The paths of gradients from the differentiated results back to the leaves.

    Attributes:
        wanted: For each operation, the indices of the inputs whose gradients are computed.
        hidden: Operations inside a function with a custom gradient, which replaces their own.
        custom: `IdentityN` operations that carry a custom gradient.
    """

    wanted: list[tuple[int, ...]]
    hidden: frozenset[int]
    custom: frozenset[int]

    @classmethod
    def of(cls, wiring: Wiring, leaves: Collection[int], results: Sequence[Port]) -> GradientFlow:
        """Follows the gradients from the tensors `results` back to the operations `leaves`."""
        size = len(wiring.operations)
        wanted: list[tuple[int, ...]] = [()] * size
        if not leaves:
            return cls(wanted, frozenset(), frozenset())
        reached = cls.reached_from(wiring, leaves)
        shown, behind = bytearray(size), bytearray(size)
        for i, _ in results:
            shown[i] = reached[i]
        custom = set()
        read = {port for inputs in wiring.inputs for port in inputs}
        for i in range(size - 1, -1, -1):
            if not (shown[i] or behind[i]) or i in leaves:
                continue
            inputs = wiring.inputs[i]
            wanted[i] = tuple(
                k
                for k, (p, o) in enumerate(inputs)
                if reached[p] and wiring.arrays[p][o].differentiable
            )
            results_of_custom = _custom_results(wiring, i, read)
            if results_of_custom:
                # The inputs of such an operation are the results of a function, then its arguments.
                # Its gradient flows to the arguments and bypasses the operations inside the
                # function.
                custom.add(i)
                for k in wanted[i]:
                    if k < results_of_custom:
                        behind[inputs[k][0]] = 1
                wanted[i] = tuple(k for k in wanted[i] if k >= results_of_custom)
            marks = shown if shown[i] else behind
            for k in wanted[i]:
                marks[inputs[k][0]] = 1
        hidden = frozenset(i for i in range(size) if behind[i] and not shown[i])
        return cls(wanted, hidden, frozenset(custom))

    @staticmethod
    def reached_from(wiring: Wiring, leaves: Collection[int]) -> bytearray:
        """Marks the operations through which a gradient can flow back to the leaves."""
        reached = bytearray(len(wiring.operations))
        for i, inputs in enumerate(wiring.inputs):
            reached[i] = i in leaves or (
                wiring.types[i] not in BLOCKING
                and any(reached[p] and wiring.arrays[p][o].differentiable for p, o in inputs)
            )
        return reached

    def summed(self, wiring: Wiring) -> dict[Port, int]:
        """Returns the number of gradients to add up, for tensors that have more than one."""
        counts: dict[Port, int] = {}
        for i, wanted in enumerate(self.wanted):
            if i not in self.hidden:
                for k in wanted:
                    port = wiring.inputs[i][k]
                    counts[port] = counts.get(port, 0) + 1
        return {
            port: count
            for port, count in counts.items()
            if count > 1 and wiring.types[port[0]] != "Placeholder"
        }


def _custom_results(wiring: Wiring, i: int, read: set[Port]) -> int:
    """Number of results of the function whose custom gradient operation `i` carries; 0 if none."""
    if wiring.types[i] != "IdentityN" or not _private.has_custom_gradient(wiring.operations[i]):
        return 0
    return max((k for k in range(len(wiring.arrays[i])) if (i, k) in read), default=0) + 1
