"""How far a split model may differ from the plain one, and the cause of each difference."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """The largest difference that a case may show.

    Attributes:
        relative: Relative to the tensor's largest value (see `compare`); 0 asks for equal
            bits.
        cause: Why the numbers may differ at all.
    """

    relative: float
    cause: str

    def __str__(self) -> str:
        return "equal bits" if self.relative == 0 else f"{self.relative:.0e}"


BIT_EQUAL = Bound(0.0, "nothing reorders a sum")
REASSOCIATED = Bound(
    1e-6,
    "TensorFlow's graph optimizer, which sees the whole of a plain step and only a partition of "
    "a split one, adds in another order, or a tape and tf.gradients do; equal bits without both",
)
REASSOCIATED_DOUBLE = Bound(1e-12, REASSOCIATED.cause)
SEVERAL_USES = Bound(
    1e-6,
    "three or more contributions to one gradient come from several partitions, and each "
    "partition adds its own first; 1e-12 in double precision",
)
SEVERAL_USES_DOUBLE = Bound(1e-12, SEVERAL_USES.cause)
JOINED = Bound(
    1e-6,
    "a gradient of several microbatches is one product of all their rows, whose terms are not "
    "added microbatch by microbatch; 1e-12 in double precision",
)
JOINED_DOUBLE = Bound(1e-12, JOINED.cause)
