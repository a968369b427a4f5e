"""Keras callbacks with several processes: where they run, and what the processes agree on.

- Callbacks that write files or print run in rank 0: ModelCheckpoint, BackupAndRestore,
  TensorBoard, CSVLogger, RemoteMonitor, the progress bar, and callbacks in `OnRankZero`.
- All others run in all processes, with the logs of rank 0 at the end of an epoch.
- The processes agree on stopping, the learning rate and the first epoch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Model
from opensmp.errors import StepError
from opensmp.saving.own_weights import own_weights
from opensmp.training.callbacks.rank_zero import is_leader, run_in_one
from opensmp.training.callbacks.watcher import Watcher
from opensmp.training.sync.fit_settings import settings_of
from opensmp.training.sync.sync import agree_on_chance, in_call, is_shared, meet, meet_to_begin

Logs = Any

_KINDS = ("train", "test", "predict")
_RARE_HOOKS = (
    "on_epoch_begin",
    "on_epoch_end",
    *(f"on_{kind}_{end}" for kind in _KINDS for end in ("begin", "end")),
)
_BATCH_HOOKS = (
    "on_batch_begin",
    "on_batch_end",
    *(f"on_{kind}_batch_{end}" for kind in _KINDS for end in ("begin", "end")),
)

_kinds = keras.callbacks
_LOGGERS = (_kinds.CSVLogger, _kinds.RemoteMonitor)
_WRITERS = (_kinds.ModelCheckpoint, _kinds.BackupAndRestore, _kinds.TensorBoard, *_LOGGERS)
_ALIKE = (
    _kinds.EarlyStopping,
    _kinds.History,
    _kinds.LearningRateScheduler,
    _kinds.ProgbarLogger,
    _kinds.ReduceLROnPlateau,
    _kinds.SwapEMAWeights,
    _kinds.TerminateOnNaN,
)
_ORBAX = getattr(_kinds, "OrbaxCheckpoint", ())  # Keras 3.13 and later


class OnRankZero(keras.callbacks.Callback):
    """Runs a callback in rank 0 only, the process that prints and writes files.

    Wrap your own callbacks that write or print something. They may call methods of the model such
    as `save` and `evaluate`: the other processes take part. Keras' own callbacks that write files
    need no wrapper. With one process the wrapper has no effect.

    Args:
        callback: The callback. Its hooks get the usual arguments.

    Raises:
        TypeError: `callback` is not a `keras.callbacks.Callback`.

    Example:
        ```python
        class Diary(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                with open("diary.txt", "a") as file:
                    print(epoch, logs, file=file)


        model.fit(x, y, callbacks=[smp.OnRankZero(Diary())])
        ```
    """

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        super().__init__()
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(
                "smp.OnRankZero: expected a keras.callbacks.Callback, received "
                f"{callback!r} ({type(callback).__name__})."
            )
        self.callback = callback
        # Only the hooks that it overrides: Keras checks which exist, and batch hooks cost time.
        for name in (*_RARE_HOOKS, *_BATCH_HOOKS):
            if _private.overrides(callback, name):
                setattr(self, name, functools.partial(self._run, name))

    def set_model(self, model: Model) -> None:
        """Passes the model to the callback, in rank 0."""
        super().set_model(model)
        if is_leader():
            self.callback.set_model(model)

    def set_params(self, params: Any) -> None:
        """Passes the parameters of `fit` to the callback."""
        super().set_params(params)
        self.callback.set_params(params)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> None:
        callback = self.callback
        if not is_shared() or (is_leader() and _needs_nobody(callback, name)):
            getattr(callback, name)(*args, **kwargs)
        elif not _needs_nobody(callback, name):
            hook = functools.partial(getattr(callback, name), *args, **kwargs)
            what = f"{type(callback).__name__}.{name}"
            run_in_one(self.model, what, hook, weights=_reads_weights(callback, name, args))


def _needs_nobody(callback: Any, name: str) -> bool:
    """Whether a hook is known not to use the model, so that rank 0 can run it alone."""
    kind = type(callback)
    if kind in _LOGGERS or (kind is _kinds.TensorBoard and name in _BATCH_HOOKS):
        return True
    is_saver = kind in (_kinds.ModelCheckpoint, _kinds.BackupAndRestore)
    return is_saver and name in _BATCH_HOOKS and callback.save_freq == "epoch"


def _reads_weights(callback: Any, name: str, args: tuple[Any, ...]) -> bool:
    if not isinstance(callback, _kinds.TensorBoard) or name != "on_epoch_end":
        return False
    return bool(callback.histogram_freq and args[0] % callback.histogram_freq == 0)


class _InAll(keras.callbacks.Callback):
    """Runs a callback in all processes, within a context."""

    def __init__(self, callback: keras.callbacks.Callback, around: Callable[[Model], Any]) -> None:
        super().__init__()
        self._inner, self._around = callback, around
        for name in (*_RARE_HOOKS, *_BATCH_HOOKS):
            if _private.overrides(callback, name):
                setattr(self, name, functools.partial(self._run, name))

    def set_model(self, model: Model) -> None:
        super().set_model(model)
        self._inner.set_model(model)

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        self._inner.set_params(params)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> None:
        with self._around(self.model):
            getattr(self._inner, name)(*args, **kwargs)


class _First(keras.callbacks.Callback):
    """First callback in the list: calls `ready`, and gives the others the logs of rank 0."""

    def __init__(self, ready: Callable[[], None]) -> None:
        super().__init__()
        self._ready = ready

    def set_model(self, model: Model) -> None:
        super().set_model(model)
        self._ready()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        names = sorted(logs or {})
        news = meet(f"end epoch {epoch + 1}, whose logs are {', '.join(names)}", logs)
        if logs:
            logs.update(news[0])


class _Last(keras.callbacks.Callback):
    """Runs after all callbacks of the user, and makes the processes agree on their decisions.

    Args:
        each_batch: Whether a callback may decide to stop after any batch.
    """

    def __init__(self, each_batch: bool) -> None:
        super().__init__()
        if each_batch:
            for name in ("on_train_batch_end", "on_test_batch_end", "on_predict_batch_end"):
                setattr(self, name, self._after_batch)

    def on_train_begin(self, logs: Logs = None) -> None:
        epochs = meet("begin to train", _private.initial_epoch(self.model))
        if epochs[0] is not None:
            _private.set_initial_epoch(self.model, epochs[0])
        self._agree_on_rate()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._agree_on_rate()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._agree_on_rate()
        self._agree_on_stopping("stop_training")

    def _after_batch(self, batch: int, logs: Logs = None) -> None:
        for name in ("stop_training", "stop_evaluating", "stop_predicting"):
            if hasattr(self.model, name):
                self._agree_on_stopping(name)

    def _agree_on_stopping(self, name: str) -> None:
        if any(meet("see who stops", bool(getattr(self.model, name)))):
            setattr(self.model, name, True)

    def _agree_on_rate(self) -> None:
        own = [float(np.asarray(optimizer.learning_rate)) for optimizer in _with_rates(self.model)]
        rates = meet("compare learning rates", own)[0]
        for optimizer, rate, was in zip(_with_rates(self.model), rates, own, strict=True):
            if rate != was:
                optimizer.learning_rate = np.array(rate)  # TensorFlow caches each Python number


def _with_rates(model: Model) -> list[Any]:
    """Optimizers whose learning rate is a number that can be set."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    each = getattr(optimizer, "optimizers", [optimizer])
    return [o for o in each if isinstance(o, keras.optimizers.Optimizer) and _is_settable(o)]


def _is_settable(optimizer: Any) -> bool:
    try:
        given = optimizer.get_config().get("learning_rate")
    except Exception:  # a user's optimizer without a configuration
        return False
    return isinstance(given, (int, float, np.floating))


# ------------------------------------------------------------------------------- for a call


@contextlib.contextmanager
def shared_call(model: Model, name: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Context of a call of `fit`, `evaluate` or `predict` with several processes."""
    callbacks = arguments.get("callbacks")
    if isinstance(callbacks, keras.callbacks.CallbackList):
        _check_list(name, callbacks)
        yield arguments
        return
    if not is_leader():
        arguments = {**arguments, "verbose": 0}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_silence())
        shuffling = stack.enter_context(contextlib.ExitStack())
        stack.enter_context(in_call())
        settings = settings_of(model, name, arguments)
        if name != "fit":
            meet_to_begin(settings)
        else:
            seed = agree_on_chance(settings)
            if seed is not None:
                shuffling.enter_context(_private.arrays_shuffled_by(_shuffle(seed)))
        wrapped = [_wrapped(each) for each in flat(callbacks) if _is_wanted(each)]
        each_batch = any(map(_decides_in_batches, flat(callbacks)))
        ready = shuffling.close
        yield {**arguments, "callbacks": [_First(ready), *wrapped, _Last(each_batch)]}
    meet(f"end {name}")


def _check_list(name: str, callbacks: Any) -> None:
    if not any(isinstance(each, _First) for each in callbacks.callbacks):
        raise StepError(
            f"{name}: callbacks is a CallbackList, whose members know the model already. In "
            "several processes some of them run in rank 0 alone. Expected: a list of callbacks, "
            "callbacks=[...]."
        )


def flat(callbacks: Any) -> list[Any]:
    """The callbacks that a method of the trainer was given: one, a nest, or none."""
    return tf.nest.flatten(callbacks) if callbacks else []


def _is_wanted(callback: Any) -> bool:
    """Drops progress bars except in rank 0."""
    return is_leader() or not isinstance(callback, _kinds.ProgbarLogger)


def _wrapped(callback: Any) -> Any:
    if isinstance(callback, _ORBAX):
        raise StepError(
            "OrbaxCheckpoint saves models of several processes with JAX only. Use "
            "keras.callbacks.ModelCheckpoint, or smp.CheckpointManager."
        )
    if isinstance(callback, (OnRankZero, _kinds.ProgbarLogger)):
        return callback
    if isinstance(callback, _WRITERS):
        return OnRankZero(callback)
    if isinstance(callback, _kinds.EarlyStopping):
        return _InAll(callback, lambda model: own_weights())
    if isinstance(callback, _kinds.SwapEMAWeights):
        return _InAll(callback, lambda model: _private.averages_of_own(model.optimizer))
    return callback


def _decides_in_batches(callback: Any) -> bool:
    """Whether a callback may stop training after a batch in one process and not in another."""
    if type(callback) in _ALIKE or isinstance(callback, (*_WRITERS, OnRankZero, Watcher)):
        return False
    return any(_private.overrides(callback, hook) for hook in _BATCH_HOOKS)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Lets only rank 0 print the messages of Keras' callbacks."""
    if is_leader() or not keras.config.is_interactive_logging_enabled():
        yield
        return
    keras.config.disable_interactive_logging()
    try:
        yield
    finally:
        keras.config.enable_interactive_logging()


def _shuffle(seed: int) -> Callable[[Any], Any]:
    """A shuffling function with another order at each call, the same in all processes."""
    numbers = np.random.default_rng(seed)

    def draw() -> Any:
        return numbers.integers(2**31, size=2, dtype=np.int32)

    def shuffle(indices: Any) -> Any:
        pair = tf.ensure_shape(tf.numpy_function(draw, [], tf.int32), [2])
        return tf.random.experimental.stateless_shuffle(indices, pair)

    return shuffle
