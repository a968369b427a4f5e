"""Residuals: the tensors that the forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Collection

from opensmp import _private
from opensmp.compiler.costs.families import ALIASES
from opensmp.compiler.costs.op_graph import Port, Wiring


class Keeper:
    """Decides for each tensor that the backward pass reads whether to keep it or recompute it.

    Tensors that depend on activations or state are kept. Tensors that depend on weights alone are
    recomputed. Variables and constants are available anyway. Tensors that share memory, such as the
    input and the result of a reshape, are kept once.

    Attributes:
        residual_bytes: For each operation, the bytes of its results that are kept.
        sources: Maps a placeholder whose value is kept to the operation whose gradient first reads
            it.
    """

    def __init__(self, wiring: Wiring, active: Collection[int], constant: Collection[int]) -> None:
        self.residual_bytes = [0] * len(wiring.operations)
        self.sources: dict[int, int] = {}
        self._wiring = wiring
        self._constant = constant
        self._kept: set[Port] = set()
        self._again: set[int] = set()
        self._active = bytearray(len(wiring.operations))
        for i, op in enumerate(wiring.operations):
            self._active[i] = (
                i in active
                or any(self._active[p] for p, _ in wiring.inputs[i])
                or (_private.is_stateful(op) and i not in constant)
            )

    @property
    def kept(self) -> tuple[Port, ...]:
        """The tensors that are kept, in topological order, without placeholders."""
        return tuple(p for p in sorted(self._kept) if self._wiring.types[p[0]] != "Placeholder")

    @property
    def active(self) -> tuple[int, ...]:
        """Operations that depend on activations or state, without placeholders."""
        types = self._wiring.types
        return tuple(i for i, on in enumerate(self._active) if on and types[i] != "Placeholder")

    def is_active(self, port: Port) -> bool:
        """Returns whether a tensor depends on activations or state."""
        return bool(self._active[port[0]])

    def keep(self, port: Port, reader: int) -> None:
        """Records that the gradient of operation `reader` reads a tensor."""
        producer = port[0]
        if producer in self._constant:
            return
        if not self._active[producer]:
            self._again.add(producer)
            return
        root = self._memory(port)
        if root in self._kept:
            return
        self._kept.add(root)
        if self._wiring.types[root[0]] == "Placeholder":
            self.sources[root[0]] = reader
        else:
            self.residual_bytes[root[0]] += self._wiring.array(root).nbytes

    def again(self) -> list[int]:
        """Returns the operations on weights alone that the backward pass runs again."""
        waiting, found = sorted(self._again), set[int]()
        while waiting:
            i = waiting.pop()
            if i not in found and i not in self._constant and not self._active[i]:
                found.add(i)
                waiting.extend(p for p, _ in self._wiring.inputs[i])
        return sorted(found)

    def _memory(self, port: Port) -> Port:
        """Returns the tensor whose memory a tensor shares; the tensor itself if none."""
        i, k = port
        while self._wiring.types[i] in ALIASES and self._wiring.inputs[i]:
            i, k = self._wiring.inputs[i][k if self._wiring.types[i] == "IdentityN" else 0]
        return i, k
