"""What selective recomputation keeps and costs, predicted for each operation of a graph."""

from __future__ import annotations

from opensmp.compiler.costs.families import ALIASES
from opensmp.compiler.costs.graph_costs import Costs
from opensmp.compiler.costs.op_graph import Port
from opensmp.compiler.recomputation.choice import SMALL_SHARE, has_state, is_heavy
from opensmp.compiler.recomputation.minimum_cut import UNLIMITED, cheapest_cut


def selective_costs(costs: Costs) -> tuple[list[int], list[bool]]:
    """Returns the bytes that are kept of each operation, and whether it runs again.

    The whole graph is treated as one segment, so tensors between partitions count as kept only if
    they are read.

    Args:
        costs: The costs of a graph, with the tensors that its backward pass reads.
    """
    wiring = costs.wiring
    active = set(costs.active)
    kept = [0] * len(wiring.operations)
    again = [False] * len(wiring.operations)
    largest = max((wiring.array(port).nbytes for port in costs.kept), default=0)

    def size(port: Port) -> int:
        if wiring.types[port[0]] in ALIASES and wiring.inputs[port[0]]:
            return UNLIMITED
        return max(1, wiring.array(port).nbytes)

    def is_fixed(i: int) -> bool:
        is_alias = wiring.types[i] in ALIASES and bool(wiring.inputs[i])
        return not is_alias and (has_state(wiring.operations[i]) or is_heavy(costs, i))

    small = [p for p in costs.kept if SMALL_SHARE * wiring.array(p).nbytes <= largest]
    large = [p for p in costs.kept if SMALL_SHARE * wiring.array(p).nbytes > largest]
    cut, rerun = cheapest_cut(
        large,
        lambda port: port[0] if port[0] in active else None,
        lambda i: wiring.inputs[i],
        is_fixed,
        size,
    )
    for port in (*cut, *small):
        kept[port[0]] += wiring.array(port).nbytes
    for i in rerun:
        again[i] = True
    inside = costs.residual_bytes - costs.source_bytes  # of what loops and calls keep
    for port in costs.kept:
        inside[port[0]] -= wiring.array(port).nbytes
    for i in active:
        if not again[i] or is_heavy(costs, i):
            kept[i] += int(inside[i])
    return kept, again
