"""An operation without its graph, and the resources that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opensmp.compiler.costs.op_graph import Array


@dataclass(frozen=True)
class Work:
    """The resources that some computation takes.

    Attributes:
        flops: Floating-point operations.
        bytes: Memory traffic.
        launches: Number of launched operations.
        narrow: FLOPs of narrow grouped convolutions, per channel of a group; see `narrow_flops`.
    """

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    narrow: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.narrow + other.narrow,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            self.flops * times, self.bytes * times, self.launches * times, self.narrow * times
        )


@dataclass(frozen=True)
class Call:
    """An operation without its graph.

    Attributes:
        type: Its type, such as `"MatMul"`.
        inputs: Its inputs.
        outputs: Its outputs.
        attribute: Returns an attribute's value by name; raises ValueError if there is none.
    """

    type: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    attribute: Callable[[str], Any]

    @property
    def read(self) -> int:
        """Bytes of all inputs."""
        return sum(array.nbytes for array in self.inputs)

    @property
    def written(self) -> int:
        """Bytes of all outputs."""
        return sum(array.nbytes for array in self.outputs)

    @property
    def elements(self) -> int:
        """Elements of all outputs."""
        return sum(array.elements for array in self.outputs)


Formula = Callable[[Call], tuple[float, float]]
"""Computes FLOPs and bytes of a call."""
