"""What `chaos.py` trains, breaks and compares: one rank, in a process that was forked for it.

Importing TensorFlow takes longer than all the rest, so that ranks are forked from a process that
has imported it and has not used it yet.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp

STEPS = 12
BATCH = 8
SAVE_EVERY = 2
FAULTY_STEP = 7
"""The step in which a fault comes: the fourth checkpoint is not begun yet."""

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Task:
    """What one rank has to do.

    Attributes:
        way: `"manager"`, a loop of its own with `smp.CheckpointManager`, or `"fit"`, with
            `keras.callbacks.BackupAndRestore`.
        partitions: Number of partitions.
        folder: Where checkpoints and the final digest lie.
        fault: What goes wrong in this rank, "" for nothing.
        mark: Tells the parent where this rank is.
    """

    way: str
    partitions: int
    folder: Path
    fault: str
    mark: Callable[[str], None]

    @property
    def work(self) -> Path:
        """Where checkpoints lie."""
        return self.folder / "work"


def run(task: Task) -> None:
    """Trains to the end, from the last checkpoint if there is one."""
    task.mark("start")
    if task.fault.startswith("clock"):
        _jump(86_400.0 if "forward" in task.fault else -86_400.0)
    smp.init({"partitions": task.partitions, "microbatches": 2})
    keras.utils.set_random_seed(7)
    {"manager": _with_manager, "fit": _with_fit}[task.way](task)
    task.mark("shutdown")
    smp.barrier()


def _model() -> tuple[Any, Any]:
    layers = [
        keras.layers.Dense(24, activation="relu"),
        keras.layers.Dropout(0.3, seed=3),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(16, activation="gelu"),
        keras.layers.Dense(4),
    ]
    model = smp.DistributedModel.from_keras(keras.Sequential([keras.Input((12,)), *layers]))
    return model, keras.optimizers.Adam(0.01)


def _batches() -> tuple[Any, Any]:
    """All batches, shapes `[STEPS, BATCH, 12]` and `[STEPS, BATCH, 4]`, float32."""
    numbers = np.random.default_rng(11)
    x = numbers.normal(size=(STEPS, BATCH, 12)).astype("float32")
    return x, (x[..., :4] ** 2).astype("float32")


def _with_manager(task: Task) -> None:
    model, optimizer = _model()
    x, y = _batches()
    step = tf.Variable(0, dtype=tf.int64)
    seeds = [layer.seed_generator.state for layer in model.layers if hasattr(layer, "rate")]
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, step=step, seeds=seeds)
    manager = smp.CheckpointManager(checkpoint, task.work, max_to_keep=3)

    @smp.step
    def forward_backward(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(x: Any, y: Any) -> Any:
        gradients, loss = forward_backward(x, y)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss.reduce_mean()

    task.mark("restore")
    manager.restore()
    task.mark(f"restored {int(step)}")
    first = True
    while int(step) < STEPS:
        number = int(step)
        task.mark("trace" if first else "step")
        first = False
        _break(task, number)
        train_step(tf.constant(x[number]), tf.constant(y[number]))
        step.assign_add(1)
        if (number + 1) % SAVE_EVERY == 0:
            task.mark("save")
            manager.save()
            task.mark(f"saved {number + 1}")
    manager.wait()
    _write_digest(task, model, optimizer)


def _with_fit(task: Task) -> None:
    model, optimizer = _model()
    x, y = _batches()
    model.compile(optimizer, "mse")
    backup = keras.callbacks.BackupAndRestore(str(task.work), delete_checkpoint=False)
    model.fit(
        _data(task, x, y),
        epochs=STEPS // SAVE_EVERY,
        steps_per_epoch=SAVE_EVERY,
        verbose=0,
        callbacks=[backup, _Marks(task)],
    )
    _write_digest(task, model, optimizer)


def _data(task: Task, x: Any, y: Any) -> Any:
    """The batches of each epoch are the same ones, so that no position has to be restored."""

    def generate() -> Iterator[tuple[Any, Any]]:
        count = 0
        while True:
            if task.fault == "exception in the dataset" and count == FAULTY_STEP:
                raise ValueError("a fault in the dataset")
            yield x[count % SAVE_EVERY], y[count % SAVE_EVERY]
            count += 1

    shapes = tf.TensorSpec(x.shape[1:], tf.float32), tf.TensorSpec(y.shape[1:], tf.float32)
    return tf.data.Dataset.from_generator(generate, output_signature=shapes)


class _Marks(keras.callbacks.Callback):
    """Tells where `fit` is."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task
        self._first = True
        self._number = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self._task.mark("restore")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._number = epoch * SAVE_EVERY

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._task.mark("trace" if self._first else "step")
        self._first = False
        if self._task.fault == "exception in a callback" and self._number == FAULTY_STEP:
            raise ValueError("a fault in a callback")
        _break(self._task, self._number)
        self._number += 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._task.mark("save")  # callbacks of `fit` run in their order, and this one is last


def _write_digest(task: Task, model: Any, optimizer: Any) -> None:
    """Leaves a digest of all final values where the parent compares them."""
    digest = hashlib.sha256()
    for value in model.get_weights():
        digest.update(np.ascontiguousarray(value).tobytes())
    digest.update(str(int(optimizer.iterations)).encode())
    if smp.rank() == 0:
        path = task.folder / "digest"
        path.with_suffix(".new").write_text(digest.hexdigest())
        os.replace(path.with_suffix(".new"), path)


# ------------------------------------------------------------------------------------ faults


def _jump(seconds: float) -> None:
    """The clock of this process stands wrong from the next look on."""
    original = time.time
    time.time = lambda: original() + seconds


def _break(task: Task, number: int) -> None:
    """The fault of this rank, in its step."""
    if number != FAULTY_STEP:
        return
    fault = task.fault
    if fault == "SIGSTOP":
        task.mark("broken")
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "exception in the step":
        tf.debugging.assert_less(tf.constant(2.0), 1.0, message="a fault in the step")
    elif fault == "exception":
        raise ValueError("a fault of the program")
    elif fault == "exit with code 3":
        sys.exit(3)
    elif fault == "exit at once with code 0":
        os._exit(0)
    elif fault == "out of memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
        np.ones(1 << 26)
    elif fault == "directory removed":
        shutil.rmtree(task.work)


def own_mounts() -> bool:
    """Lets this process and its children mount what others do not see; whether it may."""
    new_namespace, private = 0x00020000, 0x00040000 | 0x4000
    return not (_LIBC.unshare(new_namespace) or _LIBC.mount(None, b"/", None, private, None))


def mount(folder: Path, options: str, *, again: bool = False, read_only: bool = False) -> None:
    """Makes a folder a file system of its own, or changes that one.

    Args:
        folder: It must be there.
        options: Of tmpfs, such as `"size=64k"`.
        again: Whether it is one already.
        read_only: Whether nothing may be written there.
    """
    flags = (32 if again else 0) | (1 if read_only else 0)
    if _LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount of {folder} with {options}")


def unmount(folder: Path) -> None:
    """Undoes `mount`, also while somebody reads there."""
    _LIBC.umount2(os.fsencode(folder), 2)
