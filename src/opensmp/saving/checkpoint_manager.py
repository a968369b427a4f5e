"""`smp.CheckpointManager`: checkpoints of models that are spread over partitions."""

from __future__ import annotations

import functools
import os
from typing import Any

import tensorflow as tf

from opensmp.errors import CheckpointError
from opensmp.runtime import objects
from opensmp.runtime.world import World, current
from opensmp.saving import write
from opensmp.saving.background import Flight
from opensmp.saving.manifest import fault
from opensmp.saving.outcomes import Outcome, gathered, outcome_of
from opensmp.saving.restore import (
    DamagedError,
    is_eager,
    restore_from,
    warn_of_damage,
)
from opensmp.saving.shelf import Shelf
from opensmp.saving.staging import Staging


class CheckpointManager(tf.train.CheckpointManager):
    """Saves and restores training, whatever the number of partitions and processes.

    A checkpoint is what `tf.train.Checkpoint` writes, readable by plain TensorFlow, and knows
    nothing of partitions: it may be restored with other numbers of partitions, replicas and
    processes, and so may checkpoints that plain TensorFlow has written. Each process writes and
    reads only what it owns. All processes call `save` and `restore`.

    A crash at any moment leaves the checkpoints as they were; those that are damaged are
    recognised.

    Args:
        checkpoint: A `tf.train.Checkpoint` of what is to be saved: models, optimizers,
            variables, iterators of datasets, lists of these. Of a metric or a
            `keras.random.SeedGenerator` give the variables: `accuracy=accuracy.variables`,
            `seed=generator.state`.
        directory: Where checkpoints are; all processes must reach it.
        max_to_keep: How many are kept, None for all of them.
        checkpoint_name: What the names of the files begin with.
        background: Whether `save` returns when it has a hold on all values, and a thread copies
            and writes them while training goes on. There is one such write at a time; `wait`, and
            the next `save` or `restore`, wait for it and raise its error. A program that ends
            normally waits for it too. The memory of the copy, as much as this process saves, is
            kept for the next one until the manager goes.

    Raises:
        CheckpointError: An argument is not possible.

    Example:
        ```python
        checkpoint = tf.train.Checkpoint(optimizer=optimizer, model=model)
        manager = smp.CheckpointManager(checkpoint, "/tmp/checkpoints", max_to_keep=5)
        manager.restore()  # the latest one, if there is any
        for inputs in dataset:
            train_step(inputs)
            manager.save()
        ```
    """

    def __init__(
        self,
        checkpoint: Any,
        directory: str | os.PathLike[str] = "/opt/ml/checkpoints",
        max_to_keep: int | None = None,
        checkpoint_name: str = "ckpt",
        *,
        background: bool = False,
    ) -> None:
        _check(checkpoint, directory, max_to_keep, checkpoint_name, background)
        self._kept_checkpoint = checkpoint
        self._most = max_to_keep
        self._shelf = Shelf(os.path.abspath(directory), checkpoint_name, spares=background)
        self._staging = Staging() if background else None
        self._flight: Flight | None = None

    @property
    def checkpoint(self) -> Any:
        """The `tf.train.Checkpoint`."""
        return self._kept_checkpoint

    @property
    def directory(self) -> str:
        """Where checkpoints are."""
        return self._shelf.directory

    @property
    def max_to_keep(self) -> int | None:
        """How many checkpoints are kept, None for all of them."""
        return self._most

    @property
    def checkpoints(self) -> list[str]:
        """Paths of the checkpoints in the directory, oldest first."""
        return [path for path, _ in self._shelf.checkpoints()]

    @property
    def latest_checkpoint(self) -> str | None:
        """Path of the newest checkpoint, None if there is none."""
        return next(reversed(self.checkpoints), None)

    @property
    def checkpoint_interval(self) -> None:
        """None: each call of `save` writes a checkpoint."""
        return None

    def save(
        self, checkpoint_number: int | None = None, check_interval: bool = True, options: Any = None
    ) -> str:
        """Writes a new checkpoint. All processes call it.

        Args:
            checkpoint_number: Its number; the one after the newest by default. One that is there
                already is replaced.
            check_interval: No effect, for there is no interval: each call writes.
            options: None. `tf.train.CheckpointOptions` are for TensorFlow's own writer.

        Returns:
            Its path, such as `"/opt/ml/checkpoints/ckpt-3"`.

        Raises:
            NotInitializedError: Before `smp.init`.
            CheckpointError: It could not be written; earlier ones are as they were. All
                processes raise the same error. With `background=True` also: the one before could
                not be written; then this one was not begun.

        Example:
            ```python
            path = manager.save()
            tf.train.list_variables(path)
            ```
        """
        what = "smp.CheckpointManager.save"
        world = current(what)
        is_eager(what)
        _check_options(options)
        self.wait()
        counter = self._kept_checkpoint.save_counter
        before = int(counter.numpy())
        number = self._prepare(world, checkpoint_number, before)
        path = self._shelf.prefix(number)
        counter.assign(number)
        try:
            values = write.snapshot(self._kept_checkpoint, world, to_host=self._staging is not None)
            part = functools.partial(write.own_part, values, self._shelf, world, self._staging)
            whole = functools.partial(
                write.whole, shelf=self._shelf, number=number, max_to_keep=self._most
            )
            if self._staging is not None:
                self._flight = Flight(path, world.rank, world.size, part, whole)
                return path
            outcomes = gathered(part(), range(world.size), what)
            outcomes = whole(outcomes) if world.rank == 0 else outcomes
            outcomes = objects.broadcast_object(outcomes, range(world.size), 0, what)
            write.raise_errors(outcomes, path)
        except BaseException:
            counter.assign(before)
            if not world.rank:
                self._shelf.discard()
            raise
        return path

    def wait(self) -> None:
        """Waits until the checkpoint that is being written in the background is complete.

        All processes call it. Returns at once if there is none.

        Raises:
            CheckpointError: It could not be written; all processes raise the same error.

        Example:
            ```python
            path = manager.save()  # of a manager with background=True
            train_step(inputs)
            manager.wait()
            tf.train.load_checkpoint(path)
            ```
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        outcomes = flight.outcomes()
        outcomes = objects.broadcast_object(
            outcomes, range(flight.size), 0, "smp.CheckpointManager.wait"
        )
        write.raise_errors(outcomes, flight.path)

    def sync(self) -> None:
        """As `wait`, under the name that TensorFlow's manager has for it."""
        self.wait()

    def restore(
        self, save_path: str | os.PathLike[str] | None = None, *, partial: bool = False
    ) -> str | None:
        """Restores the latest checkpoint in the directory, or another one. All processes call it.

        It may be called at any time: before the first step, in a post-partition hook, between
        steps. Values of variables that do not exist yet, in a model that has not been called or
        an optimizer that has not been built, are assigned when these are made.

        If the newest checkpoint is damaged, the newest good one is restored, with a warning.

        Args:
            save_path: Path of a checkpoint, or of a directory with checkpoints; this one's by
                default.
            partial: Whether it is fine that variables are not in the checkpoint, or values of
                the checkpoint not in the program. Shapes must fit in any case.

        Returns:
            The path of the checkpoint; None if `save_path` is None and there is none.

        Raises:
            NotInitializedError: Before `smp.init`.
            CheckpointError: There is no checkpoint at `save_path`, all are damaged, or it does
                not fit: the message has the first variables that differ. Everything is as it
                was before.

        Example:
            ```python
            manager.restore()
            manager.restore("/tmp/other/ckpt-7")
            ```
        """
        what = "smp.CheckpointManager.restore"
        world = current(what)
        is_eager(what)
        self.wait()
        int(self._kept_checkpoint.save_counter.numpy())  # made at the first look
        found = self._candidates(save_path) if world.rank == 0 else None
        found = objects.broadcast_object(found, range(world.size), 0, what)
        if found.error is not None:
            raise CheckpointError(f"No checkpoint was restored. {found.error}")
        candidates: list[tuple[str, str | None]] = found.value
        if not candidates and save_path is None:
            return None
        if all(wrong for _, wrong in candidates):
            raise CheckpointError(self._nothing_good(candidates, save_path))
        place = write.place_of(world)
        for path, wrong in candidates:
            if wrong is None:
                try:
                    restore_from(path, self._kept_checkpoint, world, place, partial=partial)
                    return path
                except DamagedError as error:
                    wrong = str(error)
                    if path == candidates[-1][0]:
                        raise CheckpointError(wrong + self._offer(path)) from error
            warn_of_damage(path, wrong)
        raise CheckpointError(self._nothing_good(candidates, save_path))

    def restore_or_initialize(self) -> str | None:
        """As `restore()`."""
        return self.restore()

    # --- helpers -----------------------------------------------------------------------

    def _prepare(self, world: World, wanted: int | None, counter: int) -> int:
        """Makes room for a checkpoint; gives its number, the same in all processes."""
        outcome: Outcome | None = None
        if world.rank == 0:
            try:
                newest = max(self._shelf.numbers(), default=0)
                self._shelf.prepare()
                outcome = Outcome(max(newest, counter) + 1 if wanted is None else int(wanted))
            except (OSError, ValueError, TypeError) as error:
                outcome = outcome_of(error, self.directory)
        outcome = objects.broadcast_object(outcome, range(world.size), 0, "the number")
        assert outcome is not None
        write.raise_errors([outcome], self.directory)
        return int(outcome.value)

    def _candidates(self, save_path: str | os.PathLike[str] | None) -> Outcome:
        """Paths of checkpoints, newest first, and what is wrong with each."""
        try:
            if save_path is None:
                if not self.checkpoints:
                    self._shelf.recover()
                paths = self.checkpoints[::-1]
            elif os.path.isdir(save_path):
                paths = [p for p, _ in Shelf(os.fspath(save_path), self._shelf.name).checkpoints()][
                    ::-1
                ]
            else:
                path = os.path.abspath(save_path)
                paths = [path[: -len(".index")] if path.endswith(".index") else path]
            return Outcome([(path, fault(path)) for path in paths])
        except OSError as error:
            return outcome_of(error)

    def _nothing_good(
        self, candidates: list[tuple[str, str | None]], save_path: str | os.PathLike[str] | None
    ) -> str:
        where = self.directory if save_path is None else os.fspath(save_path)
        text = f"No checkpoint was restored from {where}, and nothing was changed. "
        if not candidates:
            text += "Expected: a directory with checkpoints, or the path of one without endings."
        text += "".join(f"\n  {path}: {wrong}" for path, wrong in candidates)
        return text + self._offer(*(path for path, _ in candidates))

    def _offer(self, *tried: str) -> str:
        """Tells of the newest good checkpoint in the directory that was not tried."""
        for path in reversed(self.checkpoints):
            if path not in tried and fault(path) is None:
                return f"\nThe newest good one here is {path}."
        return f"\nThere is no other good one in {self.directory}."


def _check_options(options: Any) -> None:
    if options is not None:
        raise CheckpointError(
            f"smp.CheckpointManager.save: expected no options, received {options!r}, which are "
            "for TensorFlow's own writer. To write in the background, make the manager with "
            "background=True."
        )


def _check(
    checkpoint: Any, directory: Any, max_to_keep: Any, checkpoint_name: Any, background: Any
) -> None:
    """Raises one error for all faults of the arguments."""
    faults = []
    if not isinstance(background, bool):
        faults.append(f"background must be True or False; received {background!r}")
    if not isinstance(checkpoint, tf.train.Checkpoint):
        faults.append(
            "checkpoint must be a tf.train.Checkpoint, such as tf.train.Checkpoint(model=model, "
            f"optimizer=optimizer); received {checkpoint!r} of type {type(checkpoint).__name__}"
        )
    try:
        if "://" in os.fspath(directory):
            faults.append(
                f"directory must be on a file system, for files are renamed there; received "
                f"{directory!r}"
            )
    except TypeError:
        faults.append(f"directory must be a path; received {directory!r}")
    whole = isinstance(max_to_keep, int) and not isinstance(max_to_keep, bool)
    if max_to_keep is not None and (not whole or max_to_keep < 1):
        faults.append(f"max_to_keep must be None or 1 or more; received {max_to_keep!r}")
    is_name = isinstance(checkpoint_name, str) and checkpoint_name
    if not is_name or os.path.basename(checkpoint_name) != checkpoint_name:
        faults.append(
            f"checkpoint_name must be the beginning of a file name; received {checkpoint_name!r}"
        )
    if faults:
        raise CheckpointError("smp.CheckpointManager: " + "; ".join(faults) + ".")
