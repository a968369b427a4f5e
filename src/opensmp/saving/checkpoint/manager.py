"""`smp.CheckpointManager`: checkpoints of models that are distributed over partitions."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import tensorflow as tf

from opensmp.distributed.collectives import objects
from opensmp.distributed.collectives.scalars import scalar
from opensmp.distributed.world import World, current
from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint import writer
from opensmp.saving.checkpoint.arguments import check_arguments, check_options, whole_number
from opensmp.saving.checkpoint.background.async_write import BackgroundWrite, settle
from opensmp.saving.checkpoint.background.staging import Staging
from opensmp.saving.checkpoint.directory.directory import CheckpointDirectory
from opensmp.saving.checkpoint.directory.manifest import fault
from opensmp.saving.checkpoint.directory.names import LARGEST_NUMBER, index_path, without_ending
from opensmp.saving.checkpoint.interval import Interval
from opensmp.saving.checkpoint.restoring.restore import is_eager, restore_from, warn_of_damage
from opensmp.saving.collective_errors import DamagedError, RankResult, gathered, result_of_error

T = TypeVar("T")


class CheckpointManager(tf.train.CheckpointManager):
    """Saves and restores training, independently of the number of partitions and processes.

    A checkpoint has the format of `tf.train.Checkpoint`, is readable by plain TensorFlow, and does
    not depend on partitions: it can be restored with other numbers of partitions, replicas and
    processes, and so can checkpoints written by plain TensorFlow. Each process writes and reads
    only the values that it owns. `save` and `restore` are collective calls.

    A crash at any time leaves the existing checkpoints intact; damaged ones are detected. Only
    files whose names consist of exactly `checkpoint_name`, a number and a checkpoint suffix are
    ever removed from the directory. The first `save` takes a lock of the directory for that name,
    which is held as long as the manager lives.

    Args:
        checkpoint: A `tf.train.Checkpoint` of the objects to save: models, optimizers, variables,
            dataset iterators, lists of these. For a metric or a `keras.random.SeedGenerator` pass
            the variables: `accuracy=accuracy.variables`, `seed=generator.state`.
        directory: The checkpoint directory, accessible to all processes. `~` is expanded.
        max_to_keep: Number of checkpoints to keep; None for all.
        checkpoint_name: Prefix of the file names.
        keep_checkpoint_every_n_hours: Of the checkpoints that `max_to_keep` would remove, one is
            preserved permanently if it was saved at least this many hours after the previously
            preserved one. Preserved checkpoints are no longer in `checkpoints`. None to preserve
            none.
        step_counter: A variable with the current step, for `checkpoint_interval`.
        checkpoint_interval: Minimum number of steps between two checkpoints: earlier calls of
            `save` write none. None if every call writes one.
        init_fn: Called by `restore_or_initialize` if there is no checkpoint.
        last_checkpoint_step: The step from which `checkpoint_interval` counts; None if the first
            call of `save` writes.
        background: Whether `save` returns as soon as it holds references to all values, while a
            thread copies and writes them during further training. Only one such write runs at a
            time; `wait`, and the next `save` or `restore`, wait for it and raise its error. So does
            a program that exits normally. The memory for the copy, as large as what this process
            saves, is reused until the manager is deleted.

    Raises:
        CheckpointError: An argument is invalid.

    Example:
        ```python
        checkpoint = tf.train.Checkpoint(optimizer=optimizer, model=model)
        manager = smp.CheckpointManager(checkpoint, "checkpoints", max_to_keep=5)
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
        keep_checkpoint_every_n_hours: float | None = None,
        step_counter: Any = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], Any] | None = None,
        last_checkpoint_step: int | None = None,
        background: bool = False,
    ) -> None:
        check_arguments(
            checkpoint,
            directory,
            max_to_keep,
            checkpoint_name,
            every_n_hours=keep_checkpoint_every_n_hours,
            step_counter=step_counter,
            checkpoint_interval=checkpoint_interval,
            init_fn=init_fn,
            background=background,
        )
        self._kept_checkpoint = checkpoint
        self._most = None if max_to_keep is None else int(max_to_keep)
        self._every_n_hours = keep_checkpoint_every_n_hours
        self._interval = Interval(checkpoint_interval, step_counter, last_checkpoint_step)
        self._initialize = init_fn
        self._shelf = CheckpointDirectory(_absolute(directory), checkpoint_name, spares=background)
        self._staging = Staging() if background else None
        self._flight: BackgroundWrite | None = None

    @property
    def checkpoint(self) -> Any:
        """The `tf.train.Checkpoint`."""
        return self._kept_checkpoint

    @property
    def directory(self) -> str:
        """The checkpoint directory."""
        return self._shelf.directory

    @property
    def max_to_keep(self) -> int | None:
        """Number of checkpoints to keep; None for all."""
        return self._most

    @property
    def checkpoints(self) -> list[str]:
        """Paths of the checkpoints that count for `max_to_keep`, oldest first.

        Raises:
            CheckpointError: The directory exists and cannot be read.
        """
        return [path for path, _ in self._looked(self._shelf.checkpoints)]

    @property
    def latest_checkpoint(self) -> str | None:
        """Path of the newest checkpoint; None if there is none.

        Raises:
            CheckpointError: The directory exists and cannot be read.
        """
        return self._looked(self._shelf.newest)

    @property
    def checkpoint_interval(self) -> int | None:
        """Minimum number of steps between two checkpoints; None if every `save` writes one."""
        return self._interval.steps

    def save(
        self, checkpoint_number: int | None = None, check_interval: bool = True, options: Any = None
    ) -> str | None:
        """Writes a new checkpoint. Collective: all processes must call it.

        Args:
            checkpoint_number: Its number; by default one more than the newest and than the save
                counter. An existing
                checkpoint of this number is replaced.
            check_interval: Whether to respect `checkpoint_interval`, if set. Otherwise a checkpoint
                is written unless the current step already has one.
            options: Must be None. `tf.train.CheckpointOptions` are for TensorFlow's own writer.

        Returns:
            Its path, such as `"/opt/ml/checkpoints/ckpt-3"`; None if `checkpoint_interval` has not
            passed.

        Raises:
            NotInitializedError: `smp.init` has not been called.
            CheckpointError: It could not be written, or another program writes checkpoints of this
                name to the directory; earlier checkpoints are unchanged. All processes raise the
                same error. With `background=True` also: the previous checkpoint could not be
                written; then this one was not started.

        Example:
            ```python
            path = manager.save()
            tf.train.list_variables(path)
            ```
        """
        what = "smp.CheckpointManager.save"
        world = current(what)
        is_eager(what)
        check_options(options)
        is_due, step = self._due(world, check_interval)
        if not is_due:
            return None
        self.wait()
        settle(self._shelf.staging)
        counter = self._kept_checkpoint.save_counter
        before = int(counter.numpy())
        number = self._prepare(world, checkpoint_number, before)
        path = self._shelf.prefix(number)
        counter.assign(scalar(number, tf.int64))
        try:
            values = writer.snapshot(
                self._kept_checkpoint, world, to_host=self._staging is not None
            )
            part = functools.partial(writer.own_part, values, self._shelf, world, self._staging)
            whole = functools.partial(
                writer.whole,
                shelf=self._shelf,
                number=number,
                max_to_keep=self._most,
                every_n_hours=self._every_n_hours,
            )
            if self._staging is not None:
                self._flight = BackgroundWrite(
                    path, world.rank, world.size, part, whole, place=self._shelf.staging
                )
                self._interval.last = step
                return path
            outcomes = gathered(part(), range(world.size), what)
            outcomes = whole(outcomes) if world.rank == 0 else outcomes
            outcomes = objects.broadcast_object(outcomes, range(world.size), 0, what)
            writer.raise_errors(outcomes, path)
        except BaseException:
            counter.assign(scalar(before, tf.int64))
            if not world.rank:
                self._shelf.discard()
            raise
        self._interval.last = step
        return path

    def _save_always(self) -> str:
        """Like `save`, but always writes, since it is the last save of the program."""
        self._interval.last = None
        path = self.save()
        assert path is not None
        return path

    def wait(self) -> None:
        """Waits until the background write of a checkpoint, if any, is complete.

        Collective: all processes must call it.

        Raises:
            CheckpointError: The checkpoint could not be written; all processes raise the same
                error.

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
        writer.raise_errors(outcomes, flight.path)

    def sync(self) -> None:
        """Alias of `wait`, as named in TensorFlow's manager."""
        self.wait()

    def restore(
        self, save_path: str | os.PathLike[str] | None = None, *, partial: bool = False
    ) -> str | None:
        """Restores the latest checkpoint, or another one. Collective: all processes must call it.

        It may be called at any time: before the first step, in a post-partition hook, or between
        steps. Values of variables that do not exist yet, of a model that has not been called or an
        optimizer that has not been built, are assigned when the variables are created.

        If the newest checkpoint is damaged, the newest intact one is restored, with a warning.

        Args:
            save_path: Path of a checkpoint, or of a directory with checkpoints; by default the
                manager's directory.
            partial: Whether to accept variables that are not in the checkpoint and values of the
                checkpoint that are not in the program. Shapes must match in any case.

        Returns:
            The path of the checkpoint; None if `save_path` is None and the directory does not exist
            or has no checkpoint.

        Raises:
            NotInitializedError: `smp.init` has not been called.
            CheckpointError: There is no checkpoint at `save_path`, all are damaged, the directory
                cannot be read, or the checkpoint does not match: the message lists the first
                variables that differ. Nothing was changed.

        Example:
            ```python
            manager.restore()
            manager.restore("other/ckpt-7")
            ```
        """
        what = "smp.CheckpointManager.restore"
        world = current(what)
        is_eager(what)
        self.wait()
        int(self._kept_checkpoint.save_counter.numpy())  # creates the save counter
        found = self._candidates(save_path) if world.rank == 0 else None
        found = objects.broadcast_object(found, range(world.size), 0, what)
        if found.error is not None:
            raise CheckpointError(f"No checkpoint was restored. {found.error}")
        candidates: list[tuple[str, str | None]] = found.value
        if not candidates and save_path is None:
            return None
        if all(wrong for _, wrong in candidates):
            raise CheckpointError(self._nothing_good(candidates, save_path))
        place = writer.place_of(world)
        for path, wrong in candidates:
            if wrong is None:
                try:
                    restore_from(path, self._kept_checkpoint, world, place, partial=partial)
                    if world.rank == 0:
                        self._interval.last = self._interval.now()
                    return path
                except DamagedError as error:
                    wrong = str(error)
                    if path == candidates[-1][0]:
                        raise CheckpointError(wrong + self._offer(path)) from error
            self._shelf.note_damage(path)
            warn_of_damage(path, wrong)
        raise CheckpointError(self._nothing_good(candidates, save_path))

    def restore_or_initialize(self) -> str | None:
        """Like `restore()`; if there is no checkpoint, calls `init_fn`."""
        path = self.restore()
        if path is None and self._initialize is not None:
            self._initialize()
        return path

    # --- helpers -----------------------------------------------------------------------

    def _looked(self, look: Callable[[], T]) -> T:
        try:
            return look()
        except OSError as error:
            raise CheckpointError(_unreadable(error, self.directory)) from error

    def _due(self, world: World, check: bool) -> tuple[bool, int | None]:
        """Whether `save` must write, and the step, as rank 0 decides for all processes."""
        if self._interval.steps is None:
            return True, None
        outcome: RankResult | None = None
        if world.rank == 0:
            try:
                step = self._interval.now()
                outcome = RankResult((self._interval.is_due(step, check), step))
            except Exception as error:
                outcome = result_of_error(error)
        outcome = objects.broadcast_object(outcome, range(world.size), 0, "the step")
        assert outcome is not None
        writer.raise_errors([outcome], self.directory)
        is_due, step = outcome.value
        return bool(is_due), step

    def _prepare(self, world: World, wanted: int | None, counter: int) -> int:
        """Prepares the directory and chooses the checkpoint number, on rank 0 for all processes."""
        outcome: RankResult | None = None
        if world.rank == 0:
            try:
                self._shelf.prepare()
                newest = max(self._shelf.numbers(), default=0)
                number = max(newest, counter) + 1 if wanted is None else whole_number(wanted)
                if not 0 <= number <= LARGEST_NUMBER:
                    raise CheckpointError(
                        f"checkpoint_number must be from 0 to {LARGEST_NUMBER}; received {number}."
                    )
                outcome = RankResult(number)
            except Exception as error:  # even a warning raised as one: others wait
                outcome = result_of_error(error, self.directory)
        outcome = objects.broadcast_object(outcome, range(world.size), 0, "the number")
        assert outcome is not None
        writer.raise_errors([outcome], self.directory)
        return int(outcome.value)

    def _candidates(self, save_path: str | os.PathLike[str] | None) -> RankResult:
        """Paths of checkpoints, newest first, each with its fault or None."""
        shelf = self._shelf
        if save_path is not None:
            try:
                path = without_ending(_absolute(save_path))
            except TypeError:
                return RankResult(error=f"Expected a path as save_path; received {save_path!r}.")
            if index_path(path).is_file() or not os.path.isdir(path):
                return RankResult([(path, fault(path))])
            shelf = CheckpointDirectory(path, self._shelf.name)
        try:
            shelf.warn_of_state()
            if save_path is None:
                shelf.recover()
            return RankResult(shelf.candidates())
        except OSError as error:
            return RankResult(error=_unreadable(error, shelf.directory))
        except Exception as error:  # even a warning raised as an error: other ranks wait
            return result_of_error(error)

    def _nothing_good(
        self, candidates: list[tuple[str, str | None]], save_path: str | os.PathLike[str] | None
    ) -> str:
        where = self.directory if save_path is None else repr(os.fspath(save_path))
        text = f"No checkpoint was restored from {where}, and nothing was changed. "
        if not candidates:
            text += "Expected: a directory with checkpoints, or the path of one without endings."
        text += "".join(f"\n  {path}: {wrong}" for path, wrong in candidates)
        return text + self._offer(*(path for path, _ in candidates))

    def _offer(self, *tried: str) -> str:
        """Names the newest intact checkpoint in the directory that was not tried."""
        try:
            for path, wrong in self._shelf.candidates():
                if path not in tried and wrong is None:
                    return f"\nThe newest good one here is {path}."
        except OSError:
            return ""
        return f"\nThere is no other good one in {self.directory}."


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.path.expanduser(os.fspath(path)))


def _unreadable(error: OSError, directory: str) -> str:
    """Error message for a directory that exists and cannot be read."""
    if isinstance(error, NotADirectoryError):
        file = directory
        while not os.path.lexists(file):
            file = os.path.dirname(file)
        return f"{file} is a file; expected a directory with checkpoints, or nothing, of this name."
    return (
        f"The directory {directory} cannot be read: {error.strerror or error}. Expected: a "
        "directory that this process may list, or none. Mend its permissions, or choose another."
    )
