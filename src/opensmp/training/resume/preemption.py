"""`smp.checkpoint_on_preemption`: saves a checkpoint before the machine is taken away."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Model
from opensmp.distributed import world
from opensmp.distributed.collectives import objects
from opensmp.distributed.watchdog import preemption
from opensmp.distributed.watchdog.monitor import PREEMPTED
from opensmp.distributed.watchdog.preemption import DEFAULT_SECONDS
from opensmp.errors import CheckpointError, StepError
from opensmp.saving.checkpoint.manager import CheckpointManager
from opensmp.saving.checkpoint.restoring.deferred import reaches
from opensmp.saving.gather import gathered
from opensmp.training.resume.progress import Progress, progress_of

Logs = Any

_KEY = re.compile(r"smp_fit_\d+/\.ATTRIBUTES/VARIABLE_VALUE")
_FUNCTION, _CALLBACK = "smp.checkpoint_on_preemption", "smp.CheckpointOnPreemption"


def checkpoint_on_preemption(
    manager: CheckpointManager,
    *,
    signals: Sequence[int] = (signal.SIGTERM,),
    seconds: float = DEFAULT_SECONDS,
) -> None:
    """Saves a checkpoint and ends the program if SIGTERM was received. Call it after each step.

    Clusters send SIGTERM some time before they take a machine away. From the first call on, the
    signal no longer ends the program directly: at the next call at which all ranks have done the
    same steps, the program saves a checkpoint and ends with exit code 143, which asks for a
    restart; `opensmp run --max-restarts` restarts it. One rank may receive the signal, or all ranks
    at different steps. A call without a pending signal takes a few microseconds. Before the first
    call, while the program starts and the first step is traced, the signal ends the program as
    usual; nothing is lost, because no step has been done.

    All ranks must call it equally often, at the same places of the program, where everything that
    belongs to a step is done and the next batch has not been read.

    Args:
        manager: Saves the state to resume from, in the background or not.
        signals: Numbers of the signals, such as `signal.SIGUSR1` for Slurm's `--signal=USR1@120`.
            Replaces existing handlers of these signals.
        seconds: Time in which a rank must reach the next call after the signal. Otherwise the
            program ends without a new checkpoint, with the same exit code.

    Raises:
        SystemExit: A signal was received, and the checkpoint is complete.
        CheckpointError: The checkpoint could not be saved, or an argument is invalid.
        StepError: This is not the main thread, or a `tf.function` is being traced.

    Example:
        ```python
        manager = smp.CheckpointManager(checkpoint, "checkpoints", max_to_keep=3)
        manager.restore()
        while optimizer.iterations < 1000:
            train_step(next(batches))
            smp.checkpoint_on_preemption(manager)
        ```
    """
    if not tf.executing_eagerly():
        raise StepError(
            f"{_FUNCTION} was called while a tf.function is traced, where it would run once and "
            "not with each call. Call it outside of tf.function and smp.step, after each step."
        )
    _check(_FUNCTION, manager, signals, seconds)
    _listen(_FUNCTION, signals, seconds)
    name = preemption.arrive()
    if name is not None:
        _end(manager, manager._save_always(), name)


class CheckpointOnPreemption(keras.callbacks.Callback):
    """Lets `fit` resume exactly where it stopped: after SIGTERM, a crash or the end of a program.

    When training begins, the newest checkpoint is restored, and `fit` continues after the batch at
    which it was saved, even in the middle of an epoch, with the numbers of an uninterrupted run:
    weights, slots and learning rate of the optimizer, random layers, metrics, the order of the
    data, and the counters of EarlyStopping and ReduceLROnPlateau. See the page Checkpoints for the
    requirements on your data.

    After SIGTERM, all ranks save before the next batch of training or validation, and the program
    ends with exit code 143, which asks for a restart. Before the first batch of a program there is
    nothing to save; the checkpoint that it was restored from, if any, remains the newest. See
    `smp.checkpoint_on_preemption`.

    It runs after all other callbacks, regardless of its position in the list.

    Args:
        manager: Manager of a `tf.train.Checkpoint` that contains the model and its optimizer. Use
            one directory per `fit`.
        save_freq: `"epoch"`: also save after each epoch; a number: after that many batches; None:
            save only when a signal is received. A `checkpoint_interval` of the manager applies as
            well, except when a signal is received.
        signals: See `smp.checkpoint_on_preemption`.
        seconds: See `smp.checkpoint_on_preemption`.

    Raises:
        CheckpointError: An argument is invalid; when training begins: the checkpoint does not
            contain the model and its optimizer, or cannot be restored.
        StepError: This is not the main thread.

    Example:
        ```python
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        manager = smp.CheckpointManager(checkpoint, "checkpoints", max_to_keep=3)
        model.fit(x, y, epochs=10, callbacks=[smp.CheckpointOnPreemption(manager)])
        ```
    """

    def __init__(
        self,
        manager: CheckpointManager,
        save_freq: str | int | None = "epoch",
        *,
        signals: Sequence[int] = (signal.SIGTERM,),
        seconds: float = DEFAULT_SECONDS,
    ) -> None:
        super().__init__()
        _check(_CALLBACK, manager, signals, seconds, save_freq)
        self.manager, self.save_freq = manager, save_freq
        self._saved_after = 0  # batches of this program
        _listen(_CALLBACK, signals, seconds)

    def on_train_begin(self, logs: Logs = None) -> None:
        """Restores the newest checkpoint, if there is one."""
        progress = self._progress()
        for name, thing in (("model", self.model), ("optimizer", self.model.optimizer)):
            if thing is not None and not reaches(self.manager.checkpoint, thing):
                raise CheckpointError(
                    f"{_CALLBACK}: the checkpoint of the manager has not the {name} that is "
                    "trained, so that training could not go on from it. Expected: "
                    "tf.train.Checkpoint(model=model, optimizer=model.optimizer), made after "
                    "model.compile."
                )
        progress.at_boundary = self._at_boundary
        self._saved_after = 0
        path = self.manager.restore()
        text = None if path is None else _position_in(path)
        if text is not None:
            progress.resume(text, str(path))

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Saves after an epoch if a save is due."""
        self._pass(is_due=self.save_freq == "epoch")

    def _at_boundary(self) -> None:
        progress = self._progress()
        if progress.may_stop and not progress.is_replaying:
            self._pass(is_due=False)

    def _pass(self, is_due: bool) -> None:
        """Between two steps: saves if a save is due, and ends the program after a signal."""
        name = preemption.arrive()
        trained = self._progress().trained
        if name is not None and not trained:
            _end(self.manager, None, name)
        is_due |= isinstance(self.save_freq, int) and trained - self._saved_after >= self.save_freq
        if is_due or name is not None:
            path = self._save(always=name is not None)
            if name is not None:
                _end(self.manager, str(path), name)

    def _save(self, always: bool) -> str | None:
        """Saves a checkpoint with the position in `fit`, which plain restores ignore."""
        progress = self._progress()
        checkpoint = self.manager.checkpoint
        best, seed = _best_weights(self.model, progress.callbacks), _private.global_seed_state()
        with gathered([] if seed is None else [seed]) as reads_all:
            state = progress.state(best) if reads_all else b"\0"  # rank 0 writes its value
        data = np.frombuffer(state, np.uint8)
        # A new name each time: TensorFlow would restore a known name's value from an old
        # checkpoint.
        name = f"smp_fit_{int(checkpoint.save_counter.numpy()) + 1}"
        with tf.device("/device:CPU:0"):
            setattr(checkpoint, name, tf.Variable(data, trainable=False))
        try:
            self._saved_after = progress.trained
            return self.manager._save_always() if always else self.manager.save()
        finally:
            delattr(checkpoint, name)

    def _progress(self) -> Progress:
        progress = progress_of(self.model)
        if progress is None:
            raise CheckpointError(
                f"{_CALLBACK} is for model.fit of an smp.DistributedModel. Received: "
                f"{type(self.model).__name__} '{self.model.name}', or a CallbackList in place of "
                "callbacks=[...]. Make the model by smp.DistributedModel.from_keras(model)."
            )
        return progress


# --------------------------------------------------------------------------------- helpers


def _position_in(path: str) -> bytes | None:
    """The serialized position in `fit`; None if the checkpoint was not saved in `fit`."""
    reader = tf.train.load_checkpoint(path)
    found = [key for key in reader.get_variable_to_shape_map() if _KEY.fullmatch(key)]
    return reader.get_tensor(found[0]).tobytes() if len(found) == 1 else None


def _best_weights(model: Model, callbacks: Sequence[Any]) -> list[Any] | None:
    """The weights that an EarlyStopping keeps, gathered from all partitions."""
    kept = [getattr(each, "best_weights", None) for each in callbacks]
    own = next((weights for weights in kept if weights is not None), None)
    if own is None:
        return None
    here = [not _private.is_elsewhere(variable) for variable in model.weights]
    mine = {index: own[index] for index, is_here in enumerate(here) if is_here}
    tables = objects.allgather_objects(mine, world.current(_CALLBACK).mp_group, _CALLBACK)
    whole = {index: value for table in tables for index, value in table.items()}
    return [whole[index] for index in range(len(own))]


def _end(manager: CheckpointManager, path: str | None, name: str) -> None:
    """Ends the program by SystemExit when the checkpoint of all processes is complete.

    Waits for a save in the background. `path` is None if the program has trained nothing to save;
    `name` is that of the signal.
    """
    manager.wait()
    here = world.current(_FUNCTION)
    objects.meet(range(here.size), "the end after a signal")
    if here.rank == 0:
        saved = (
            "no batch has been trained, so that there is nothing to save"
            if path is None
            else f"training is saved as {path}"
        )
        print(
            f"opensmp: {name} came: {saved}, and the program ends with exit code {PREEMPTED}: "
            "start it again to go on.",
            file=sys.stderr,
            flush=True,
        )
    preemption.end()


def _listen(what: str, signals: Sequence[int], seconds: float) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise StepError(
            f"{what}: this is thread '{threading.current_thread().name}', and signals can be "
            "handled by the main thread only. Train in the main thread."
        )
    preemption.listen(signals, seconds)


def _check(what: str, manager: Any, signals: Any, seconds: Any, save_freq: Any = None) -> None:
    """Raises one CheckpointError that lists all invalid arguments."""
    faults = []
    if not isinstance(manager, CheckpointManager):
        faults.append(
            f"manager must be an smp.CheckpointManager; received {manager!r} of type "
            f"{type(manager).__name__}"
        )
    try:
        known = [signal.Signals(number) for number in signals]
        faults += [
            f"{each.name} cannot be handled"
            for each in known
            if each in (signal.SIGKILL, signal.SIGSTOP)
        ]
    except (TypeError, ValueError) as error:
        faults.append(f"signals must be numbers such as signal.SIGTERM; received {error}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        faults.append(f"seconds must be a number above 0; received {seconds!r}")
    whole = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq > 0
    if save_freq not in (None, "epoch") and not whole:
        faults.append(
            f'save_freq must be "epoch", a number of batches or None; received {save_freq!r}'
        )
    if faults:
        raise CheckpointError(f"{what}: {'; '.join(faults)}.")
