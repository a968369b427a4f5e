"""Where gradients flow in a graph, found without making them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from opensmp import _private
from opensmp.compiler.costs.gradient_costs import BLOCKING
from opensmp.compiler.costs.op_graph import Port, Wiring


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """Between which operations gradients flow, on the way from results to leaves.

    Attributes:
        wanted: For each operation, the indices of the inputs whose gradients are computed.
        hidden: Operations behind a custom gradient, which takes the place of theirs.
        custom: Operations that stand for a custom gradient.
    """

    wanted: list[tuple[int, ...]]
    hidden: frozenset[int]
    custom: frozenset[int]

    @classmethod
    def of(cls, wiring: Wiring, leaves: Collection[int], results: Sequence[Port]) -> GradientFlow:
        """Follows the gradients from results to leaves.

        Args:
            wiring: The graph.
            leaves: Operations whose outputs' gradients are wanted.
            results: Tensors that gradients come from.
        """
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
                # Such an operation reads the results of a function and then its arguments.
                # Its gradient goes to the arguments, past all that made the results.
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
        """Marks the operations through which a gradient could flow back to leaves."""
        reached = bytearray(len(wiring.operations))
        for i, inputs in enumerate(wiring.inputs):
            reached[i] = i in leaves or (
                wiring.types[i] not in BLOCKING
                and any(reached[p] and wiring.arrays[p][o].differentiable for p, o in inputs)
            )
        return reached

    def summed(self, wiring: Wiring) -> dict[Port, int]:
        """Tensors with several gradients to add up, and how many."""
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
    """Number of results of the function whose custom gradient an operation stands for; or 0."""
    if wiring.types[i] != "IdentityN" or not _private.has_custom_gradient(wiring.operations[i]):
        return 0
    return max((k for k in range(len(wiring.arrays[i])) if (i, k) in read), default=0) + 1
