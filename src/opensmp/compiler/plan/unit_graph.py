"""The partitioner's input: a graph of few units with costs, independent of TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class CutTensor(NamedTuple):
    """A tensor that one unit produces for others, and its transfer sizes.

    Attributes:
        producer: Unit that produces it.
        consumers: Units that read it, ascending, without the producer.
        forward_bytes: Size of the tensor for one microbatch.
        backward_bytes: Size of its gradient; 0 if no gradient flows.
        name: Name of the tensor in the traced graph.
    """

    producer: int
    consumers: tuple[int, ...]
    forward_bytes: int
    backward_bytes: int
    name: str = ""


class SharedVariable(NamedTuple):
    """A variable that several units read.

    It belongs to the partition of the first of them; every other partition that reads it receives
    its value, and sends its gradient back, once per microbatch.

    Attributes:
        units: Units that read it, ascending.
        parameter_bytes: Size of the variable.
        gradient_bytes: Size of its gradient; 0 if it is frozen.
        name: Path of the variable.
    """

    units: tuple[int, ...]
    parameter_bytes: int
    gradient_bytes: int
    name: str = ""


@dataclass(frozen=True, eq=False)
class CoarseGraph:
    """Units of operations that are planned as a whole, in topological order.

    Every array has one entry per unit. Seconds and activation bytes are per microbatch. Unit
    indices are a topological order: tensors go from lower to higher units only.

    Attributes:
        names: Names for people, such as the path of a layer.
        forward_seconds: Time of the forward pass.
        backward_seconds: Time of the backward pass; 0 for frozen units.
        parameter_bytes: Size of the variables that only this unit reads.
        state_bytes: Gradients and optimizer slots of these variables.
        residual_bytes: Residuals that the forward pass keeps for the backward pass.
        tensors: Tensors between units.
        shared: Variables of several units; not in `parameter_bytes`.
        operations: Names of each unit's operations.
        layers: Path of the Keras layer that each unit belongs to, "" for none.
        forward_flops: Floating-point operations of the forward pass; None if not counted.
        backward_flops: Floating-point operations of the backward pass; None if not counted.
        selective_bytes: What is kept of `residual_bytes` with selective recomputation; None if not
            counted, which is as without.
        full_bytes: What is kept of it with full recomputation, beside tensors between units; None
            if not counted, which is nothing.
        selective_seconds: Time that selective recomputation adds to the backward pass; None if not
            counted. Full recomputation adds `forward_seconds`.
    """

    names: tuple[str, ...]
    forward_seconds: NDArray[np.float64]
    backward_seconds: NDArray[np.float64]
    parameter_bytes: NDArray[np.int64]
    state_bytes: NDArray[np.int64]
    residual_bytes: NDArray[np.int64]
    tensors: tuple[CutTensor, ...]
    shared: tuple[SharedVariable, ...] = ()
    operations: tuple[tuple[str, ...], ...] = ()
    layers: tuple[str, ...] = ()
    forward_flops: NDArray[np.float64] | None = None
    backward_flops: NDArray[np.float64] | None = None
    selective_bytes: NDArray[np.int64] | None = None
    full_bytes: NDArray[np.int64] | None = None
    selective_seconds: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Machine:
    """Parameters of the time model; all devices are equal.

    Attributes:
        flops_per_second: Arithmetic speed of one device.
        bytes_per_second: Memory bandwidth of one device.
        operation_seconds: Fixed launch time of one operation.
        transfer_seconds: Latency of moving one tensor between devices.
        transfer_bytes_per_second: Bandwidth between devices.
        memory_bytes: Memory of one device; None for no limit.
        narrow_flops_per_second: Arithmetic speed of a grouped convolution with one channel per
            group; with n channels per group, it is n times as high. None if grouped convolutions
            run at `flops_per_second`.
    """

    flops_per_second: float = 5e10
    bytes_per_second: float = 1e10
    operation_seconds: float = 5e-6
    transfer_seconds: float = 2e-5
    transfer_bytes_per_second: float = 5e9
    memory_bytes: int | None = None
    narrow_flops_per_second: float | None = None


PROCESSES = Machine(transfer_seconds=6e-3, transfer_bytes_per_second=7e8)
"""CPUs of several processes, where the computing cores also carry the transfers.

Measured: a latency of 1 to 2 ms, and 0.5 ms more per MB, on cores that compute three times as fast
as the default; only the proportion matters.
"""
