"""How a model is laid out over partitions and microbatches in one comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

import opensmp as smp


@dataclass(frozen=True)
class Layout:
    """A configuration of `smp.init`, and which stage of a model goes to which partition.

    Attributes:
        partitions: Number of partitions.
        microbatches: Number of microbatches.
        pipeline: Name of a schedule.
        pattern: "blocks" puts neighbouring stages together (0-0-1-1), "cyclic" deals them
            out in turn (0-1-0-1), "v" deals them forth and back (0-1-1-0), "auto" leaves it to the
            automatic partition.
        optimize: "memory" or "speed", with which gradients of weights are computed for several
            microbatches at once.
    """

    partitions: int
    microbatches: int
    pipeline: str
    pattern: str = "blocks"
    optimize: str = "memory"

    @property
    def config(self) -> dict[str, Any]:
        """The argument of `smp.init`."""
        return {
            "partitions": self.partitions,
            "microbatches": self.microbatches,
            "pipeline": self.pipeline,
            "optimize": self.optimize,
            "auto_partition": self.pattern == "auto",
            "default_partition": 0,
        }

    def partition_of(self, stage: int, num_stages: int) -> int:
        """The partition of one of a model's stages."""
        if self.pattern == "cyclic":
            return stage % self.partitions
        if self.pattern == "v":
            back, place = divmod(stage, self.partitions)
            return self.partitions - 1 - place if back % 2 else place
        return stage * self.partitions // num_stages

    def describe(self, num_stages: int) -> str:
        """The pattern in full, such as "0-0-1-1"."""
        if self.pattern == "auto":
            return "auto"
        return "-".join(str(self.partition_of(s, num_stages)) for s in range(num_stages))

    def __str__(self) -> str:
        last = "-speed" if self.optimize == "speed" else ""
        return f"P{self.partitions}-M{self.microbatches}-{self.pipeline}-{self.pattern}{last}"


class PlainMaker:
    """Makes a case's models as plain Keras models."""

    Model = keras.Model

    def partition(self, stage: int) -> Any:
        """No partition: a context that does nothing."""
        return contextlib.nullcontext()

    def functional(self, inputs: Any, outputs: Any) -> Any:
        """A Functional model."""
        return self.Model(inputs, outputs)

    def take(self, model: Any) -> Any:
        """A finished Keras model, as it is."""
        return model


class SplitMaker:
    """Makes a case's models as distributed models.

    Args:
        layout: Where the stages go.
        num_stages: Number of stages that the models name.
    """

    Model = smp.DistributedModel

    def __init__(self, layout: Layout, num_stages: int) -> None:
        self._layout = layout
        self._num_stages = num_stages

    def partition(self, stage: int) -> Any:
        """The context that puts operations into the partition of a stage."""
        return smp.partition(self._layout.partition_of(stage, self._num_stages))

    def functional(self, inputs: Any, outputs: Any) -> Any:
        """A Functional model that is distributed."""
        return smp.DistributedModel(inputs, outputs)

    def take(self, model: Any) -> Any:
        """The distributed view of a finished Keras model."""
        return smp.DistributedModel.from_keras(model)


Maker = PlainMaker | SplitMaker


def with_policy(policy: str, parts: Callable[[Maker], Any], make: Maker) -> Any:
    """The models of `parts(make)` with another dtype policy than Keras' default."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return parts(make)
    finally:
        keras.config.set_dtype_policy(before)
