"""Creates the slots of an optimizer before values are loaded into them."""

from __future__ import annotations

import keras

from opensmp.base.types import Model


def build_optimizer(model: Model) -> None:
    """Creates the slots of a compiled model's optimizer, so that a file can restore them."""
    optimizer = getattr(model, "optimizer", None)
    if isinstance(optimizer, keras.optimizers.Optimizer) and not optimizer.built:
        optimizer.build(model.trainable_variables)
