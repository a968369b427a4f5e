"""A transfer between processes: a tensor, or only an order of operations."""

from __future__ import annotations

from dataclasses import dataclass

from opensmp.base.types import Op, Tensor


@dataclass(frozen=True, eq=False)
class Transfer:
    """A tensor or a dependency from one process to another.

    Attributes:
        op: The operation that computes it.
        tensor: The tensor to send; None if only the order matters.
        after: The operation that must wait, if only the order matters.
        source: Position of the sending process in the replica.
        target: Position of the receiving process.
        aliases: Tensors that hold the same value, such as several reads of one variable.
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
