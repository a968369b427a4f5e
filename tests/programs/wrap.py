"""What a program is given to split its models with; for plain Keras it splits nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp


class Wrap:
    """Splits models with opensmp.

    A program calls it with a model and goes on with what comes back. What a script in several
    processes has to say besides, of `smp.step`, of its part of the data and of the gradients of
    other replicas, is here too, so that the same program runs under plain Keras.
    """

    split = True

    def __init__(self) -> None:
        self._models: list[keras.Model] = []

    def __call__(self, model: keras.Model) -> keras.Model:
        """The model, split."""
        self._models.append(smp.DistributedModel.from_keras(model))
        return self._models[-1]

    def was_split(self) -> bool:
        """Whether any of the models has a plan by now."""
        return any(map(_has_plan, self._models))

    def step(self, function: Any = None, **options: Any) -> Any:
        """As `smp.step`, bare or with options."""
        return smp.step(function, **options) if function else smp.step(**options)

    def shard(self, *arrays: Any) -> Any:
        """The rows of this replica, of each array: the first ones, or the next, ..."""
        return _one_or_all([np.split(np.asarray(a), smp.dp_size())[smp.dp_rank()] for a in arrays])

    def allreduce(self, values: Any) -> Any:
        """The mean over the replicas."""
        return smp.allreduce(values) if smp.dp_size() > 1 else values

    def local_pairs(self, *of: Any) -> Any:
        """Pairs of the variables of two models or lists that lie in this process."""
        return smp.local_variables(*of)

    def unshard(self, value: Any) -> Any:
        """The rows of all replicas."""
        parts = smp.allgather(np.asarray(value), smp.DP_GROUP) if smp.dp_size() > 1 else [value]
        return np.concatenate([np.asarray(part) for part in parts])


class Plain(Wrap):
    """Plain Keras: models stay as they are, and a step is a loop over the microbatches.

    Args:
        microbatches: Into how many a step divides its batch: those of all replicas together.
    """

    split = False

    def __init__(self, microbatches: int = 1) -> None:
        super().__init__()
        self._microbatches = microbatches

    def __call__(self, model: keras.Model) -> keras.Model:
        """The model itself."""
        return model

    def step(self, function: Any = None, **options: Any) -> Any:
        """Calls a function with one microbatch after the other."""
        if function is None:
            return functools.partial(self.step, **options)
        return _looped(function, self._microbatches, options.get("non_split_inputs", ()))

    def shard(self, *arrays: Any) -> Any:
        """All rows."""
        return _one_or_all([np.asarray(array) for array in arrays])

    def allreduce(self, values: Any) -> Any:
        """The values themselves."""
        return values

    def local_pairs(self, *of: Any) -> Any:
        """All pairs."""
        return zip(*(getattr(each, "variables", each) for each in of), strict=True)

    def unshard(self, value: Any) -> Any:
        """The rows themselves."""
        return np.asarray(value)


def _has_plan(model: Any) -> bool:
    try:
        return bool(model.plan)
    except smp.PlanError:
        return False


def _one_or_all(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else arrays


def _looped(function: Callable[..., Any], count: int, whole: Any) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        parts = [
            function(**{k: v if k in whole else _part(v, i, count) for k, v in given.items()})
            for i in range(count)
        ]
        flat = [tf.nest.flatten(part, expand_composites=False) for part in parts]
        outputs = [
            None if values[0] is None else smp.StepOutput(values)
            for values in zip(*flat, strict=True)
        ]
        return tf.nest.pack_sequence_as(parts[0], outputs, expand_composites=False)

    return run


def _part(value: Any, index: int, count: int) -> Any:
    def part(leaf: Any) -> Any:
        if isinstance(leaf, smp.StepOutput):
            return leaf.outputs[index]
        if not isinstance(leaf, (tf.Tensor, np.ndarray)) or not len(leaf.shape):
            return leaf
        rows = leaf.shape[0] // count
        return leaf[index * rows : (index + 1) * rows]

    return tf.nest.map_structure(part, value)
