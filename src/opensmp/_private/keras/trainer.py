"""Keras' trainer: losses, metrics, seeds, and the callbacks and epochs of `fit`."""

from __future__ import annotations

import contextlib
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
from opensmp.base.thread_values import ThreadValue
from opensmp.base.types import Tensor

_GLOBAL_SEED_GENERATOR = "global_seed_generator"  # Keras before 3.14 has no name for it


def compiled_loss(model: Any) -> Any:
    """The `CompileLoss` that computes the loss of all outputs, or None; `model.loss` is raw."""
    return model._compile_loss


def compiled_metrics(model: Any) -> Any:
    """The `CompileMetrics` that updates all metrics given to `compile`, or None."""
    return model._compile_metrics


def compiled_with(model: Any) -> dict[str, Any]:
    """The arguments given to `compile`, unchanged; empty if it was not called.

    The public `get_compile_config` warns and fails for arguments that cannot be serialized, such as
    a user's function.
    """
    owner: Any = getattr(model, "_compile_config", None)
    return {} if owner is None else dict(owner.config)


def function_within(value: Any) -> tuple[Any, dict[str, Any]] | None:
    """The function that a Keras loss or metric wraps, and its keyword arguments; None for others.

    The serialized configuration lacks these arguments, such as the `delta` of `keras.losses.Huber`.
    """
    function = getattr(value, "fn", getattr(value, "_fn", None))
    given = getattr(value, "_fn_kwargs", None)
    return (function, dict(given)) if isinstance(given, dict) else None


def build_metrics(model: Any, y: Any, outputs: Any) -> None:
    """Builds the metrics given to `compile`; Keras does so at their first update."""
    metrics = model._compile_metrics
    if metrics is not None and not metrics.built:
        metrics.build(y, outputs)


def build_loss(loss: Any, y: Any, outputs: Any) -> None:
    """Builds the losses given to `compile`, and the metrics that track them.

    Does what `fit` does where it needs them before the first batch. Dimensions may be unknown.
    """

    def like(leaf: Any) -> Any:
        return None if leaf is None else keras.KerasTensor(leaf.shape, leaf.dtype)

    keras_backend.compute_output_spec(loss, *tf.nest.map_structure(like, (y, outputs)))


def call_in_training(model: Any, x: Any) -> Any:
    """Calls a model as Keras' `train_step` does."""
    return model(x, training=True) if model._call_has_training_arg else model(x)


def track_loss(model: Any, loss: Tensor, rows: Any) -> None:
    """Updates the logged loss with that of a batch, as Keras' `train_step` does."""
    model._loss_tracker.update_state(loss, sample_weight=rows)


_counts_rows = ThreadValue(True)


@contextlib.contextmanager
def rows_count(known: bool) -> Iterator[None]:
    """Context that says whether plain Keras would know the number of rows of a batch.

    Keras weights the logged loss of each of several outputs by the rows of the batch, but only
    where the batch size is static in the trace, which it is not for a dataset whose last batch may
    be smaller.
    """

    def make(original: Any) -> Any:
        def call(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            if known:
                return original(self, y_true, y_pred, sample_weight)
            return original(
                self, y_true, tf.nest.map_structure(_of_unknown_rows, y_pred), sample_weight
            )

        return call

    with _counts_rows.set_to(known), replaced(compile_utils.CompileLoss, "call", make):
        yield


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
    """Updates the metric for the loss of one of several outputs as Keras does; see `rows_count`."""
    metric.update_state(value, sample_weight=rows if _counts_rows.get() else None)


@contextlib.contextmanager
def tracked_values(metrics: Sequence[Any]) -> Iterator[dict[int, Tensor]]:
    """Context that records, by metric id, the values passed to metrics, and leaves them unchanged.

    The losses of several outputs are tracked per batch, not per microbatch.
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
    """The seed given to `tf.random.set_seed`; the public `get_seed` would count as a use of it."""
    seed: int | None = context.global_seed()
    return seed


@contextlib.contextmanager
def kept_seeds() -> Iterator[None]:
    """Context after which unseeded random operations draw what they would have drawn without it.

    TensorFlow counts the eager ones with a generator of its own, and Keras makes its global
    generator at the first use; neither can be read or set by public functions.
    """
    here = context.context()
    generator = getattr(here, "_rng", None)  # there is none before tf.random.set_seed
    state = None if generator is None else generator.getstate()
    known = global_state.get_global_attribute(_GLOBAL_SEED_GENERATOR)
    try:
        yield
    finally:
        if generator is not None:
            generator.setstate(state)
        if known is None:
            global_state.set_global_attribute(_GLOBAL_SEED_GENERATOR, None)


@contextlib.contextmanager
def arrays_shuffled_by(shuffle: Callable[[Any], Any]) -> Iterator[None]:
    """Context in which `shuffle(indices)` shuffles the array data that Keras feeds to `fit`.

    Keras uses `tf.random.shuffle`, whose order differs between processes without a global seed, and
    is the same in each epoch with one.
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
    """Whether a callback implements a hook such as `"on_epoch_end"`."""
    return not getattr(getattr(callback, hook), "_is_default", False)


def initial_epoch(model: Any) -> int | None:
    """The epoch at which `fit` starts if it was not given one; BackupAndRestore sets it."""
    epoch: int | None = model._initial_epoch
    return epoch


def set_initial_epoch(model: Any, epoch: int | None) -> None:
    """See `initial_epoch`."""
    model._initial_epoch = epoch


@contextlib.contextmanager
def epochs_begun_by(
    begin: Callable[[Any, Callable[[], Iterator[Any]]], Iterator[Any]],
) -> Iterator[None]:
    """Context in which `begin` decides at which batch of an epoch `fit` continues.

    Keras can start at a later epoch, but only at its first batch, and with data that do not account
    for the earlier epochs.

    Args:
        begin: Takes the `EpochIterator` and a function that returns the original iterator over what
            `fit` is to do next: the number of the first batch, that of the last one (Keras 3.10 and
            later), and an iterator of data. Returns the iterator to use.
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
    """Advances the data past an epoch that was trained before.

    Data that restart with each epoch are only started, exactly as often as Keras starts them,
    because that is when they are shuffled.
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
        if is_unknown:  # Keras detects the end of the data by asking for more
            epoch._num_batches, epoch._current_iterator = num_batches, None
            epoch.data_adapter.on_epoch_end()
            return


def global_seed_state(make: bool = False) -> Any | None:
    """State of the seed generator of unseeded Keras random functions; None if not made yet."""
    known = global_state.get_global_attribute(_GLOBAL_SEED_GENERATOR)
    if known is None and make:
        known = seed_generator.global_seed_generator()
    return None if known is None else known.state


def backup_path(callback: Any) -> str:
    """The path of the weights file that a BackupAndRestore callback writes."""
    return str(callback._weights_path)
