"""Keras' trainer: losses, metrics and the callbacks of `fit`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as keras_backend
from keras.src.backend.common import global_state
from keras.src.random import seed_generator
from keras.src.trainers import compile_utils, epoch_iterator
from tensorflow.python.eager import context

from opensmp._private.keras.layers import get_logits, get_mask, set_logits, set_mask
from opensmp._private.patching import replaced

_GLOBAL_SEED_GENERATOR = "global_seed_generator"  # Keras before 3.14 has no name for it

Tensor = Any


def compiled_loss(model: Any) -> Any:
    """What computes the loss of all outputs; None without a loss. `model.loss` is as given."""
    return model._compile_loss


def compiled_metrics(model: Any) -> Any:
    """What updates all metrics that `compile` was given; None without any."""
    return model._compile_metrics


def compiled_with(model: Any) -> dict[str, Any]:
    """The arguments of `compile`, as they were given; empty without a call of it.

    The public `get_compile_config` fails for what cannot be written to a file, such as a
    function of the user's, and warns of it.
    """
    owner: Any = getattr(model, "_compile_config", None)
    return {} if owner is None else dict(owner.config)


def function_within(value: Any) -> tuple[Any, dict[str, Any]] | None:
    """The function that a loss or metric of Keras' calls, and its arguments; None for others.

    The configuration lacks them, such as the `delta` of `keras.losses.Huber`.
    """
    function = getattr(value, "fn", getattr(value, "_fn", None))
    given = getattr(value, "_fn_kwargs", None)
    return (function, dict(given)) if isinstance(given, dict) else None


def build_metrics(model: Any, y: Any, outputs: Any) -> None:
    """Makes the metrics that `compile` was given; Keras does it at their first update."""
    metrics = model._compile_metrics
    if metrics is not None and not metrics.built:
        metrics.build(y, outputs)


def build_loss(loss: Any, y: Any, outputs: Any) -> None:
    """Makes the losses that `compile` was given, and the metrics that note them.

    As Keras' `fit` does where it needs them before the first batch. Sizes may be unknown.
    """

    def like(leaf: Any) -> Any:
        return None if leaf is None else keras.KerasTensor(leaf.shape, leaf.dtype)

    keras_backend.compute_output_spec(loss, *tf.nest.map_structure(like, (y, outputs)))


def call_in_training(model: Any, x: Any) -> Any:
    """Calls a model as Keras' `train_step` does."""
    return model(x, training=True) if model._call_has_training_arg else model(x)


def track_loss(model: Any, loss: Tensor, rows: Any) -> None:
    """Notes the loss of a batch for the logs, as Keras' `train_step` does."""
    model._loss_tracker.update_state(loss, sample_weight=rows)


_counts_rows = threading.local()


@contextlib.contextmanager
def rows_count(known: bool) -> Iterator[None]:
    """Context that says whether plain Keras would know the number of rows of a batch.

    Keras weights the logged loss of each of several outputs by the rows of the batch, but only
    where it knows them when it traces: not with a dataset whose last batch may be smaller.
    """
    outer = getattr(_counts_rows, "known", True)
    _counts_rows.known = known

    def make(original: Any) -> Any:
        def call(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            if known:
                return original(self, y_true, y_pred, sample_weight)
            return original(
                self, y_true, tf.nest.map_structure(_of_unknown_rows, y_pred), sample_weight
            )

        return call

    try:
        with replaced(compile_utils.CompileLoss, "call", make):
            yield
    finally:
        _counts_rows.known = outer


def _of_unknown_rows(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, tf.Tensor) or not tensor.shape.rank:
        return tensor
    shape = [None, *tensor.shape[1:]]
    result = tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=shape)
    for get, put in ((get_mask, set_mask), (get_logits, set_logits)):
        value = get(tensor)
        if value is not None:
            put(result, value)
    return result


def track(metric: Any, value: Tensor, rows: int) -> None:
    """Notes the loss of one of several outputs as Keras does; see `rows_count`."""
    known = getattr(_counts_rows, "known", True)
    metric.update_state(value, sample_weight=rows if known else None)


@contextlib.contextmanager
def tracked_values(metrics: Sequence[Any]) -> Iterator[dict[int, Tensor]]:
    """Context in which metrics give away what they are told, by id, in place of noting it.

    The losses of several outputs are noted for each batch, and not for each microbatch.
    """
    values: dict[int, Tensor] = {}

    def taking(metric: Any) -> Callable[..., None]:
        def update_state(value: Tensor, sample_weight: Any = None) -> None:
            values[id(metric)] = value

        return update_state

    for metric in metrics:
        vars(metric)["update_state"] = taking(metric)
    try:
        yield values
    finally:
        for metric in metrics:
            del vars(metric)["update_state"]


def global_seed() -> int | None:
    """The seed of `tf.random.set_seed`; the public `get_seed` counts as a use of it."""
    seed: int | None = context.global_seed()
    return seed


@contextlib.contextmanager
def arrays_shuffled_by(shuffle: Callable[[Any], Any]) -> Iterator[None]:
    """Context in which what Keras makes of arrays is shuffled by a function of the indices.

    Keras uses `tf.random.shuffle`, whose order is another one in each process without a seed,
    and the same in each epoch with one.
    """
    original = tf.random.shuffle

    def replacement(value: Any, seed: Any = None, name: Any = None) -> Any:
        return shuffle(value) if seed is None else original(value, seed, name)

    tf.random.shuffle = replacement
    try:
        yield
    finally:
        tf.random.shuffle = original


def overrides(callback: Any, hook: str) -> bool:
    """Whether a callback does anything at a hook such as `"on_epoch_end"`."""
    return not getattr(getattr(callback, hook), "_is_default", False)


def initial_epoch(model: Any) -> int | None:
    """The epoch that `fit` begins with if it is not its argument; BackupAndRestore sets it."""
    epoch: int | None = model._initial_epoch
    return epoch


def set_initial_epoch(model: Any, epoch: int | None) -> None:
    """See `initial_epoch`."""
    model._initial_epoch = epoch


@contextlib.contextmanager
def epochs_begun_by(
    begin: Callable[[Any, Callable[[], Iterator[Any]]], Iterator[Any]],
) -> Iterator[None]:
    """Context in which a function says with which batches of an epoch `fit` goes on.

    Keras can begin with another epoch than the first, but only at its first batch, and with data
    that know nothing of the epochs before.

    Args:
        begin: Gets what makes the batches of an epoch, and a function that gives an iterator of
            what `fit` is to do next: the number of the first batch, that of the last one from
            Keras 3.10 on, and an iterator of data.
    """

    def make(original: Any) -> Any:
        def enumerate_iterator(self: Any) -> Iterator[Any]:
            return begin(self, lambda: original(self))

        return enumerate_iterator

    with replaced(epoch_iterator.EpochIterator, "_enumerate_iterator", make):
        yield


def pass_over_epoch(
    epoch: Any, steps: Iterator[Any], execution: int, num_batches: int | None
) -> None:
    """Brings data to the end of an epoch that was trained before.

    Data that begin anew with each epoch need only be begun, as often as Keras does: that is when
    they are shuffled.

    Args:
        epoch: What makes the batches of an epoch; see `epochs_begun_by`.
        steps: What `fit` would do.
        execution: Batches of one of these steps.
        num_batches: What Keras takes for their number, where it is not known beforehand.
    """
    if epoch.steps_per_epoch is not None:
        with epoch.catch_stop_iteration():
            for *_, data in steps:
                for _ in range(execution):
                    next(data)
        return
    is_unknown = epoch.data_adapter.num_batches is None
    for number, (*_, data) in enumerate(steps):
        if number == 0:
            next(data, None)
        if is_unknown:  # Keras learns that the data have ended by asking for more
            epoch._num_batches, epoch._current_iterator = num_batches, None
            epoch.data_adapter.on_epoch_end()
            return


def global_seed_state(make: bool = False) -> Any | None:
    """The variable that Keras' random functions without a seed use; None if they have not yet.

    Args:
        make: Whether to make it.
    """
    known = global_state.get_global_attribute(_GLOBAL_SEED_GENERATOR)
    if known is None and make:
        known = seed_generator.global_seed_generator()
    return None if known is None else known.state


def backup_path(callback: Any) -> str:
    """The file into which a BackupAndRestore writes the weights."""
    return str(callback._weights_path)
