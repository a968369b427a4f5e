"""The value that travels: one tensor, or one order, from one process to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Op = Any
Tensor = Any


@dataclass(frozen=True, eq=False)
class Transfer:
    """Something that one process computes and another needs.

    Attributes:
        op: What computes it.
        tensor: What is sent; None if only the order matters, not a value.
        after: Where only the order matters: what must wait.
        source: Position of the sending process in the replica.
        target: Position of the receiving process.
        aliases: Tensors that hold the same value: several reads of one variable.
    """

    op: Op
    tensor: Tensor | None
    source: int
    target: int
    aliases: tuple[Tensor, ...] = ()
    after: Op | None = None

    def __str__(self) -> str:
        what = "order" if self.tensor is None else f"{self.tensor.dtype.name} {self.tensor.shape}"
        return f"{self.op.name}: {what} from {self.source} to {self.target}"
