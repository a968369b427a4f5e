"""Dense models: the ways in which stages, variables and outputs can be connected."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from parity.case import CYCLIC, Case, evaluation, supervised, vectors
from parity.layout import Layout, Maker


def mlp(make: Maker) -> Any:
    class MLP(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [keras.layers.Dense(16, activation="relu") for _ in range(3)]
            self.top = keras.layers.Dense(3)

        def call(self, x: Any, training: bool | None = None) -> Any:
            for stage, layer in enumerate(self.hidden):
                with make.partition(stage):
                    x = layer(x)
            with make.partition(3):
                return self.top(x)

    return MLP()


CASES = (
    Case("MLP", mlp, vectors(8, 3), supervised(), num_stages=4, evaluate=evaluation()),
    Case(
        "Partition pattern 0-1-0-1",
        mlp,
        vectors(8, 3),
        supervised(),
        num_stages=4,
        layouts=CYCLIC,
    ),
)
