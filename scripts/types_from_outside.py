"""What a type checker must see of the installed package; `scripts/package.sh` runs mypy on it.

It is never run. A line with `type: ignore` is a wrong call: `mypy --strict` complains if such a
line is accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typing_extensions import assert_type

import opensmp as smp
import smdistributed.modelparallel.tensorflow as old
import smp as short


class Net(smp.DistributedModel):
    """A model of the user's."""

    def call(self, x: Any) -> Any:
        with smp.partition(0):
            return x


smp.init({"partitions": 2, "microbatches": 4})
short.init()
old.init({"partitions": 2})
smp.init(2)  # type: ignore[arg-type]
short.init(2)  # type: ignore[arg-type]
old.init(2)  # type: ignore[arg-type]
smp.inti()  # type: ignore[attr-defined]
short.inti()  # type: ignore[attr-defined]
old.inti()  # type: ignore[attr-defined]

assert_type(smp.rank(), int)
assert_type(short.rank(), int)
assert_type(old.rank(), int)
assert_type(smp.is_initialized(), bool)
assert_type(smp.allgather({"loss": 1.0}), list[Any])
group: smp.CommGroup = smp.DP_GROUP
assert_type(smp.memory_report(), smp.MemoryReport)
smp.allreduce(1.0, "sum", old.WORLD)
smp.allreduce(1.0, group="world")  # type: ignore[arg-type]
smp.barrier("world")  # type: ignore[arg-type]


@smp.step
def bare(images: Any, count: int = 1) -> Any:
    """A step without arguments of its own."""


@short.step(non_split_inputs=["count"])
def called(images: Any, count: int) -> Any:
    """A step with arguments."""


class Trainer:
    """Steps may be methods."""

    @old.step
    def method(self, images: Any, count: int = 1) -> Any:
        """Is bound to its object."""


bare(0, count=2)
bare(0, count="two")  # type: ignore[arg-type]
bare(0, 1, 2)  # type: ignore[call-arg]
called(0, 1)
called(0)  # type: ignore[call-arg]
Trainer().method(0)
Trainer().method(0, "two")  # type: ignore[arg-type]
assert_type(bare.experimental_get_tracing_count(), int)
print(bare.schedule)


@smp.scope
def make_model(units: int) -> Net:
    """A function whose model is made in the scope."""
    return Net()


same: Callable[[int], Net] = make_model
output: smp.StepOutput = bare(0)
output.accumulate()
output.reduce_mean()
manager = smp.CheckpointManager(Net(), "folder")
manager.save()
