"""Loads weights from a file of any format into an existing model."""

from __future__ import annotations

import contextlib
from typing import Any

import tensorflow as tf

from opensmp.base.types import Model, PathLike
from opensmp.errors import SavingError
from opensmp.saving.models.formats.formats import Format, inspected
from opensmp.saving.models.inspection.damage import explained


def load_into(model: Model, path: PathLike, kind: Format, what: str, *, state: bool = True) -> None:
    """Loads weights, and optimizer state if the file has it; an error changes nothing."""
    if not model.built:
        raise SavingError(
            f"{what}: model '{model.name}' has no weights yet, for the shapes of its inputs are "
            "not known. Call it with one batch first."
        )
    with explained(path, what), _scope_of(model):
        inspected(path, kind, what)
        kind.value.load_weights(model, path, what, state)


def _scope_of(model: Model) -> Any:
    """The strategy scope of a model's variables, unless a strategy is already active."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return strategy.scope()
