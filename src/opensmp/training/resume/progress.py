"""The position in `fit`, from which another program can resume with the same numbers.

In addition to the variables of a checkpoint, it consists of the epoch and batch, the metrics of
the epoch so far, the seeds of random layers, and the counters of Keras' callbacks.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Model, Variable
from opensmp.compiler.trace.variables import tf_variable
from opensmp.errors import CheckpointError

Logs = Any
State = dict[str, Any]

_VERSION = 1
_PROGRESS = "_smp_progress"
_kinds = keras.callbacks
_COUNTERS: dict[Any, tuple[str, ...]] = {
    _kinds.EarlyStopping: ("wait", "best", "best_epoch", "stopped_epoch"),
    _kinds.ReduceLROnPlateau: ("wait", "best", "cooldown_counter"),
    _kinds.ModelCheckpoint: ("best",),
}


class Progress:
    """The position of a call of `fit`, and the position to resume from.

    Args:
        model: The model.
        callbacks: The user's callbacks.
        first_epoch: The initial epoch that was passed to `fit`.
        last_epoch: The total number of epochs.

    Attributes:
        callbacks: The user's callbacks.
        epoch: The current epoch.
        batches: Number of batches trained in this epoch.
        trained: Number of batches trained in this program.
        logs: The logs of the last batch.
        is_replaying: Whether an earlier program has trained the next batch, whose logs are known.
        at_boundary: Called before each batch of training and validation.
    """

    def __init__(
        self, model: Model, callbacks: Sequence[Any], first_epoch: int, last_epoch: int
    ) -> None:
        self._model = model
        self.callbacks = callbacks
        self._first_epoch, self._last_epoch = first_epoch, last_epoch
        self._inside = 0  # nesting depth of evaluate and predict calls
        self._before_test: list[Any] | None = None
        self._resumed: State | None = None
        self._metrics: list[Any] | None = None
        self.epoch = first_epoch
        self.batches = self.trained = 0
        self.logs: Logs = {}
        self.is_replaying = False
        self._epoch: Any = None  # Keras' iterator over the batches of an epoch
        self.at_boundary: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------------- what is saved

    def state(self, best: Sequence[Any] | None = None, seeds: Sequence[Variable] = ()) -> bytes:
        """Serializes the position; all that it reads must be in this process: see `gathered`.

        `best` are the weights of the whole model that an EarlyStopping keeps, `seeds` those of
        random layers, if nothing else saves them.
        """
        metrics = self._before_test
        if metrics is None:
            metrics = [_text(tf_variable(v)) for v in _metrics_of(self._model)]
        seed = _private.global_seed_state()
        state = {
            "version": _VERSION,
            "epoch": self.epoch,
            "batches": self.batches,
            "steps": None if self._epoch is None else self._epoch.num_batches,
            "logs": _numbers(self.logs) if self.batches else {},
            "metrics": metrics if self.batches else [],
            "seed": None if seed is None else _text(tf_variable(seed)),
            "seeds": [_text(tf_variable(v)) for v in seeds],
            "stopped": bool(self._model.stop_training),
            "callbacks": [_counters(each) for each in self.callbacks],
            "best": None if best is None else [_text(value) for value in best],
        }
        return json.dumps(state).encode()

    # --------------------------------------------------------------------- where it goes on

    def resume(self, text: bytes, what: str) -> None:
        """Makes `fit` resume from a saved position; call it when training begins."""
        state = json.loads(text)
        if state.get("version") != _VERSION:
            raise CheckpointError(
                f"{what} was written by another version of opensmp: the position in fit has "
                f"version {state.get('version')!r}. Expected: {_VERSION}. Update opensmp."
            )
        self._resumed = state
        self._metrics = state["metrics"] if state["batches"] else None
        self.epoch, self.batches, self.logs = state["epoch"], state["batches"], state["logs"]
        seeds = list(zip(seeds_of(self._model), state["seeds"], strict=False))
        if state["seed"] is not None:
            seeds.append((_private.global_seed_state(make=True), state["seed"]))
        for variable, value in seeds:
            if not _private.is_elsewhere(variable):
                variable.assign(_value(value))
        _count_on(self.callbacks, state["callbacks"], state["best"])
        first = max(self.epoch, self._last_epoch) if state["stopped"] else self.epoch
        _private.set_initial_epoch(self._model, first)

    def begin_epoch(self, epoch: int) -> None:
        """Records the start of an epoch, after the metrics of the previous one were reset."""
        if self._metrics is None:
            self.epoch, self.batches, self.logs = epoch, 0, {}
        elif len(_metrics_of(self._model)) == len(self._metrics):
            self.set_metrics()

    @property
    def metrics_are_awaited(self) -> bool:
        """Whether restored metric values wait for their metrics to be created."""
        return self._metrics is not None

    def set_metrics(self) -> None:
        """Restores the metric values; call it when the metrics exist."""
        if self._metrics is not None:
            variables = _metrics_of(self._model)
            if len(variables) != len(self._metrics):
                raise CheckpointError(
                    "fit cannot go on within an epoch: the model has other metrics than when the "
                    f"checkpoint was written, with {len(variables)} variables and not "
                    f"{len(self._metrics)}. Expected: compile with the same metrics."
                )
            for variable, value in zip(variables, self._metrics, strict=True):
                variable.assign(_value(value))
            self._metrics = None

    def end_epoch(self, epoch: int) -> None:
        """Records the end of an epoch, including its validation."""
        self.epoch, self.batches, self.logs = epoch + 1, 0, {}
        self._before_test = None

    def begin_test(self) -> None:
        """Keeps the training metrics, which the validation of the epoch resets."""
        self._before_test = [_text(tf_variable(v)) for v in _metrics_of(self._model)]

    @property
    def may_stop(self) -> bool:
        """Whether training can resume from here: not within a separate `evaluate` or `predict`."""
        return not self._inside or self._before_test is not None

    def ran(self, batches: int, logs: Logs) -> None:
        """Records that batches have been trained."""
        self.batches += batches
        self.trained += batches
        self.logs = logs

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context of a call of `evaluate` or `predict`, whose batches do not count as training."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def steps_of(self, epoch: Any, make: Any) -> Iterator[Any]:
        """The steps of an epoch, skipping those already trained; see `_private.epochs_begun_by`."""
        if self._inside:
            yield from make()
            return
        self._epoch = epoch
        if self._resumed is None:
            yield from make()
            return
        steps = self._resumed["steps"]
        done = int(self._resumed["batches"])
        earlier = int(self._resumed["epoch"]) - self._first_epoch
        self._resumed = None
        execution = int(epoch.steps_per_execution)
        for _ in range(max(0, earlier)):
            _private.pass_over_epoch(epoch, make(), execution, steps)
        # Keras' loop over an epoch needs at least one batch to have logs.
        length = epoch.steps_per_epoch or epoch.data_adapter.num_batches
        replays = length is None or done >= int(length)
        known = math.ceil(done / execution)
        left = iter(make())
        for _ in range(known - (replays and known > 0)):
            self._pass_over(next(left, None), execution, done)
        self.is_replaying = bool(done and replays)
        yield from left

    def _pass_over(self, step: Any, execution: int, done: int) -> None:
        try:
            if step is None:
                raise StopIteration
            for _ in range(execution):
                next(step[-1])
        except (StopIteration, tf.errors.OutOfRangeError):
            raise CheckpointError(
                f"fit cannot go on after batch {done} of epoch {self.epoch + 1}: the data have "
                "ended before. Expected: the same data, in batches of the same size, as when the "
                "checkpoint was written."
            ) from None


def progress_of(model: Model) -> Progress | None:
    """The progress of the resumable `fit` call that is running for this model, if any."""
    found: Progress | None = model.__dict__.get(_PROGRESS)
    return found


@contextlib.contextmanager
def noted(model: Model, progress: Progress) -> Iterator[None]:
    """Context of a resumable call of `fit`."""
    before = _private.initial_epoch(model)
    model.__dict__[_PROGRESS] = progress
    try:
        with _private.epochs_begun_by(progress.steps_of):
            yield
    finally:
        del model.__dict__[_PROGRESS]
        _private.set_initial_epoch(model, before)


# --------------------------------------------------------------------------------- helpers


def _metrics_of(model: Model) -> list[Variable]:
    return [variable for metric in model.metrics for variable in metric.variables]


def seeds_of(model: Model) -> list[Variable]:
    """The states of the seed generators of a model's layers."""
    weights = {id(variable) for variable in model.weights}
    return [
        variable
        for variable in model.variables
        if id(variable) not in weights and variable.name == "seed_generator_state"
    ]


def _text(value: Any) -> str:
    tensor = tf.convert_to_tensor(value)
    data = tf.io.serialize_tensor(tensor).numpy()
    return f"{tensor.dtype.name} {base64.b64encode(data).decode()}"


def _value(text: str) -> Any:
    dtype, _, data = text.partition(" ")
    return tf.io.parse_tensor(base64.b64decode(data), tf.as_dtype(dtype)).numpy()


def _numbers(logs: Logs) -> dict[str, float]:
    return {name: float(np.asarray(value)) for name, value in dict(logs or {}).items()}


def _counters(callback: Any) -> State | None:
    for kind, names in _COUNTERS.items():
        if isinstance(callback, kind):
            found = {name: getattr(callback, name, None) for name in names}
            return {
                "kind": kind.__name__,
                **{n: v if v is None else float(np.asarray(v)) for n, v in found.items()},
            }
    return None


def _count_on(callbacks: Sequence[Any], states: Sequence[State | None], best: Any) -> None:
    """Restores the counters of callbacks, matched by class in order."""
    left = [state for state in states if state is not None]
    for callback in callbacks:
        for kind, names in _COUNTERS.items():
            state = next((s for s in left if s["kind"] == kind.__name__), None)
            if isinstance(callback, kind) and state is not None:
                left.remove(state)
                for name in names:
                    value = state[name]
                    whole = value is not None and name != "best"
                    setattr(callback, name, int(value) if whole else value)
        if best is not None and getattr(callback, "restore_best_weights", False):
            callback.best_weights = [_value(text) for text in best]
