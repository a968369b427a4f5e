"""`smp.distributed_dataset`: turns arrays or examples into batches for each replica."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import numpy as np
import tensorflow as tf

from opensmp.api.sharding import shard as shard_of
from opensmp.distributed import world
from opensmp.distributed.world import DP_GROUP
from opensmp.errors import ConfigError

P = ParamSpec("P")

_WHAT = "smp.distributed_dataset"


class Batches(NamedTuple):
    """A dataset and its length.

    Attributes:
        dataset: A `tf.data.Dataset` of this replica's batches.
        steps_per_epoch: Number of batches in an epoch; None if the number of examples is unknown.
    """

    dataset: Any
    steps_per_epoch: int | None


def distributed_dataset(
    batch_size: int,
    *,
    shuffle: bool | int = False,
    seed: int = 0,
    repeat: bool = False,
    drop_remainder: bool = True,
    shard: bool = True,
) -> Callable[[Callable[P, Any]], Callable[P, Batches]]:
    """Batches the data that a function returns and shards each batch over the replicas.

    The function returns arrays or tensors, or tuples or dicts of them, whose first axis indexes the
    examples; or a `tf.data.Dataset` of single examples.

    Args:
        batch_size: Global batch size: examples in a batch over all replicas.
        shuffle: Whether to reshuffle the examples in each epoch: True uses a buffer of all
            examples, an integer is the buffer size.
        seed: Seed of the shuffling; it must be the same in all processes.
        repeat: Whether the dataset repeats indefinitely; if so, pass `steps_per_epoch` to `fit`.
        drop_remainder: Whether to drop examples that do not fill a batch. With `repeat` they go
            into the first batch of the next epoch instead.
        shard: Whether each replica gets its shard, as a training loop with `smp.step` needs. Pass
            False for `fit` with several replicas, since `fit` shards whole batches itself.

    Returns:
        A decorator; the decorated function returns `Batches`.

    Raises:
        ConfigError: An argument is invalid, or incompatible with the number of replicas, or the
            function returns an unsupported type.

    Example:
        ```python
        @smp.distributed_dataset(batch_size=128, shuffle=True)
        def training_data():
            return images, labels

        dataset, steps_per_epoch = training_data()
        ```
    """
    _check(batch_size, shuffle)

    def decorate(function: Callable[P, Any]) -> Callable[P, Batches]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> Batches:
            dataset, size = _examples(function(*args, **kwargs))
            replicas = 1
            if shard and world.is_initialized():
                replicas = len(world.current(_WHAT).group(DP_GROUP))
            _check_replicas(batch_size, size, replicas, drop_remainder, repeat)
            if shuffle:
                dataset = dataset.shuffle(_buffer(shuffle, size), seed=seed)
            if repeat:
                dataset = dataset.repeat()
            dataset = dataset.batch(batch_size, drop_remainder=drop_remainder or repeat)
            if replicas > 1:
                dataset = shard_of(dataset, batched=True)
            steps = None
            if size is not None:
                steps = size // batch_size
                if size % batch_size and (repeat or not drop_remainder):
                    steps += 1
            return Batches(dataset.prefetch(tf.data.AUTOTUNE), steps)

        return wrapper

    return decorate


def _examples(made: Any) -> tuple[Any, int | None]:
    """Dataset of single examples and their number, None if it is unknown."""
    if isinstance(made, tf.data.Dataset):
        size = int(made.cardinality())
        return made, (size if size >= 0 else None)
    leaves = tf.nest.flatten(made)
    shapes = [getattr(leaf, "shape", None) for leaf in leaves]
    if not leaves or any(shape is None or len(shape) == 0 for shape in shapes):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "nothing"
        raise ConfigError(
            f"{_WHAT}: expected a function that returns arrays, tensors, tuples or dicts of them, "
            f"or a tf.data.Dataset; received {kinds}. For a generator use "
            "tf.data.Dataset.from_generator."
        )
    sizes = {int(shape[0]) for shape in shapes if shape is not None}
    if len(sizes) > 1:
        raise ConfigError(
            f"{_WHAT}: the arrays have different numbers of examples: their shapes are "
            f"{', '.join(str(tuple(shape)) for shape in shapes if shape is not None)}."
        )
    return tf.data.Dataset.from_tensor_slices(made), sizes.pop()


def _buffer(shuffle: bool | int, size: int | None) -> int:
    if shuffle is not True:
        return int(shuffle)
    if size is None:
        raise ConfigError(
            f"{_WHAT}: shuffle=True needs the number of examples, which this dataset does not "
            "know. Give the size of the buffer, such as shuffle=10_000."
        )
    return max(size, 1)


def _check(batch_size: Any, shuffle: Any) -> None:
    faults = []
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool):
        faults.append(f"batch_size must be a number of examples; received {batch_size!r}")
    elif batch_size < 1:
        faults.append(f"batch_size must be 1 or more; received {batch_size}")
    if not isinstance(shuffle, bool) and (not isinstance(shuffle, int) or shuffle < 1):
        faults.append(f"shuffle must be True, False or the size of a buffer; received {shuffle!r}")
    if faults:
        raise ConfigError(f"{_WHAT}: {'; '.join(faults)}. Call it with @{_WHAT}(batch_size=128).")


def _check_replicas(
    batch_size: int, size: int | None, replicas: int, drop: bool, repeat: bool
) -> None:
    if batch_size % replicas:
        raise ConfigError(
            f"{_WHAT}: batch_size={batch_size} cannot be divided among {replicas} replicas. "
            f"Expected: a multiple of {replicas}, such as {-(-batch_size // replicas) * replicas}."
        )
    if size is None or repeat:  # a dataset that goes on for ever fills each batch
        return
    if not drop and size % batch_size % replicas:
        raise ConfigError(
            f"{_WHAT}: the last batch has {size % batch_size} of {size} examples, which cannot be "
            f"divided among {replicas} replicas. Use drop_remainder=True."
        )
    if drop and 0 < size < batch_size:
        raise ConfigError(
            f"{_WHAT}: {size} examples do not fill one batch of {batch_size}. Use a smaller "
            "batch_size, or drop_remainder=False."
        )
