"""Optimizer patches: averages of weights that other processes own, or update."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.optimizers import base_optimizer

from opensmp._private.keras.sharded_optimizers import share_averages
from opensmp._private.keras.shards import shards_now
from opensmp._private.keras.variables import is_elsewhere


def average_what_is_here() -> None:
    """Makes ScheduleFreeAdamW (Keras 3.14 on) copy the weights of this process only, not all."""
    owner = getattr(keras.optimizers, "ScheduleFreeAdamW", None)
    if owner is None:
        return
    build = owner.build

    def build_here(self: Any, var_list: Any) -> None:
        if self.built or (shards_now() is None and not any(map(is_elsewhere, var_list))):
            build(self, var_list)
            return
        base_optimizer.BaseOptimizer.build(self, var_list)
        self._momentums, self._velocities = self.add_optimizer_variables(
            var_list, ["momentum", "velocity"]
        )
        for momentum, variable in zip(self._momentums, var_list, strict=True):
            if momentum is not None and not is_elsewhere(momentum):
                self.assign(momentum, keras.ops.copy(variable))

    owner.build = build_here


def overwrite_what_is_here(owner: Any) -> None:
    overwrite = owner._overwrite_model_variables_with_average_value

    def _overwrite_model_variables_with_average_value(self: Any, trainable_variables: Any) -> Any:
        averages = self._model_variables_moving_average
        if len(trainable_variables) != len(averages):
            return overwrite(self, trainable_variables)
        pairs = zip(trainable_variables, averages, strict=True)
        here = [i for i, pair in enumerate(pairs) if not any(map(is_elsewhere, pair))]
        self._model_variables_moving_average = [averages[i] for i in here]
        try:
            result = overwrite(self, [trainable_variables[i] for i in here])
        finally:
            self._model_variables_moving_average = averages
        share_averages(trainable_variables)
        return result

    owner._overwrite_model_variables_with_average_value = (
        _overwrite_model_variables_with_average_value
    )


@contextlib.contextmanager
def averages_of_own(optimizer: Any) -> Iterator[None]:
    """Context in which an optimizer lists only the weights and averages of this process.

    Keras' SwapEMAWeights reads each variable of both lists.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    names = ("_trainable_variables", "_model_variables_moving_average")
    kept: list[tuple[Any, str, Any]] = []
    for each in getattr(inner, "optimizers", [inner]):
        lists = [vars(each).get(name) for name in names]
        if None in lists:
            continue
        here = [not any(map(is_elsewhere, pair)) for pair in zip(*lists, strict=True)]
        for name, variables in zip(names, lists, strict=True):
            kept.append((each, name, variables))
            vars(each)[name] = list(itertools.compress(variables, here))
    try:
        yield
    finally:
        for each, name, variables in kept:
            vars(each)[name] = variables
    for _, name, variables in kept:
        if name == names[0]:
            share_averages(variables)
