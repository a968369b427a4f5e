"""DualPipe-V: forward and backward passes of a V in pairs."""

from __future__ import annotations

from collections import deque

from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.regular.on_graph import on_graph
from opensmp.compiler.schedule.regular.passes import BACKWARD, FORWARD, WEIGHTS, Passes, listed


def dualpipe_v(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Pairs the forward passes of each piece with the backward passes of the other one.

    This is the half of DualPipe (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv
    2412.19437, section 3.2.1) that is left if each device has two pieces of one model in a V
    instead of pieces of two copies ("cut in half", Sea AI Lab, 2025). While a pair runs, what the
    one pass sends can travel during the other. With passes of equal time and M >= 2 P, a step
    takes 6 M + P - 1 of them, the least that is possible, so the bubble is
    (P - 1) / (6 M + P - 1); a device holds the activations of 2 P + 1 pieces, half a microbatch
    more than with `zb_v`. Fewer microbatches are those of a step of 2 P, without the others.

    Two devices, three microbatches; the first segment has no inputs to differentiate, so its B is
    not split:

        device 0 | 0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 3W1 3F2 0B0---- 3B2 3W2 0B1---- ... ... 0B2----
        device 1 | ... 1F0 2F0 1F1 2F1 1F2 2B0 2W0 2F2 1B0 1W0 2B1 2W1 1B1 1W1 2B2 2W2 1B2 1W2 ...
        dualpipe_v: makespan 20 s, bubble 10.0 %, one column 1 s

    Args:
        graph: Any task graph; see `on_graph` for those that are no such chain.
        active_microbatches: Maximum number of microbatches in flight, >= 1.
    """
    return on_graph("dualpipe_v", graph, passes, active_microbatches, pieces=2)


def passes(num_devices: int, num_microbatches: int, pieces: int = 2) -> list[Passes]:
    """Returns the passes of each device, which has two pieces."""
    enough = max(num_microbatches, 2 * num_devices)
    found = (_of_device(device, num_devices, enough) for device in range(num_devices))
    return [each[each[:, 2] < num_microbatches] for each in found]


def _of_device(device: int, num_devices: int, num_microbatches: int) -> Passes:
    rows = _Rows()
    after, until = num_devices - device - 1, device + 1
    # Forward passes until the first microbatch has come back from the last device.
    for _ in range(2 * after):
        rows.forward(0)
    for _ in range(until):
        rows.forward(0)
        rows.forward(1)
    # The second pieces alternate, until the first piece has something to go back through.
    for _ in range(after):
        rows.backward(1, weights_later=True)
        rows.weights()
        rows.forward(1)
    for _ in range(num_microbatches - 2 * num_devices + until):
        rows.forward(0)
        rows.backward(1)
        rows.forward(1)
        rows.backward(0)
    # The first piece has no forward pass left, then the second one has none.
    for _ in range(after):
        rows.backward(1)
        rows.forward(1)
        rows.backward(0)
    # In the second half of the remaining backward passes, weight gradients are put off, so that no
    # partition waits for the input gradients of another.
    for i in range(2 * until):
        rows.backward(1 - i % 2, weights_later=i > device)
    for _ in range(after):
        rows.weights()
        rows.backward(0, weights_later=True)
    while rows.waiting:
        rows.weights()
    return listed(rows.rows)


class _Rows:
    """The passes of a device so far, each kind and piece by ascending microbatches."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int]] = []
        self.waiting: deque[tuple[int, int, int]] = deque()
        self._next = {(kind, piece): 0 for kind in (FORWARD, BACKWARD) for piece in (0, 1)}

    def forward(self, piece: int) -> None:
        self._add(FORWARD, piece)

    def backward(self, piece: int, weights_later: bool = False) -> None:
        microbatch = self._add(BACKWARD, piece)
        self.waiting.append((WEIGHTS, piece, microbatch))
        if not weights_later:
            self.rows.append(self.waiting.pop())

    def weights(self) -> None:
        """The weight gradients that have waited longest."""
        self.rows.append(self.waiting.popleft())

    def _add(self, kind: int, piece: int) -> int:
        microbatch = self._next[kind, piece]
        self._next[kind, piece] += 1
        self.rows.append((kind, piece, microbatch))
        return microbatch
