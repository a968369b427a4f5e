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
# Equal bits with tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False}).
REASSOCIATED = Bound(
    1e-6,
    "TensorFlow's arithmetic optimizer adds contributions and microbatches in another order "
    "where plain Keras has both in one graph",
)
