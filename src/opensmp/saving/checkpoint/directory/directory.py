"""The directory in which checkpoints lie: what is there, what is added, what is thrown away."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from opensmp.errors import CheckpointError
from opensmp.saving.atomic import to_disk
from opensmp.saving.checkpoint.directory.listing import Listing, listing
from opensmp.saving.checkpoint.directory.lock import DirectoryLock
from opensmp.saving.checkpoint.directory.manifest import (
    History,
    fault,
    history_of,
    mark_preserved,
    write_manifest,
)
from opensmp.saving.checkpoint.directory.names import (
    INDEX,
    MANIFEST,
    data_files,
    index_path,
    manifest_path,
    parsed,
)
from opensmp.saving.checkpoint.directory.state_file import (
    State,
    StateFileError,
    read_state,
    state_path,
    write_state,
)

_WORTH_KEEPING_BYTES = 1 << 20
_HOUR_SECONDS = 3600.0


class _Found(NamedTuple):
    """Numbers in a directory: with an index, a manifest, any file, a link to elsewhere."""

    whole: set[int]
    manifests: set[int]
    taken: set[int]
    outside: set[int]


class Shelf:
    """The checkpoints of one name in a directory.

    A checkpoint is made in a directory beside them and moved to its place file by file, the index
    last: without it the other files are no checkpoint. The state file, which
    `tf.train.latest_checkpoint` reads, is replaced after that. Files whose names are not exactly
    those of a checkpoint of this name and a number are left alone.

    Args:
        directory: The directory; it need not exist yet.
        name: What the names of checkpoints begin with.
        spares: Whether large files of the checkpoint that goes are kept, for the next one to be
            written over them. The disk need not be asked for room then, which was measured to
            take as much time as the rest of a write, nor to free it, which took that time again.
    """

    def __init__(self, directory: str, name: str, *, spares: bool = False) -> None:
        self.directory = directory
        self.name = name
        self._spares = spares
        self._began = time.time() - 1.0  # as tf.train.CheckpointManager has it
        self._lock = DirectoryLock(os.path.join(directory, f".{name}.lock"))
        self._damaged: set[str] = set()

    def prefix(self, number: int) -> str:
        """The path of a checkpoint, as TensorFlow means it: without endings."""
        return os.path.join(self.directory, f"{self.name}-{number}")

    def note_damage(self, path: str) -> None:
        """Lets a checkpoint that was found damaged be the next one to be removed.

        It would take the place of a good one otherwise, as it counts for `max_to_keep`.
        """
        self._damaged.add(path)

    @property
    def staging(self) -> str:
        """Where a checkpoint is made."""
        return os.path.join(self.directory, f".{self.name}.unfinished")

    def checkpoints(self) -> list[tuple[str, float]]:
        """Paths and times of the checkpoints that `max_to_keep` counts, oldest first.

        Raises:
            OSError: The directory cannot be read.
        """
        return [(self.prefix(number), moment) for number, moment in self._listing()[0].active]

    def newest(self) -> str | None:
        """Path of the newest checkpoint, None if there is none.

        Raises:
            OSError: The directory cannot be read.
        """
        listed, found = self._listing()
        return next((self.prefix(n) for n in listed.order if n in found.whole), None)

    def candidates(self) -> list[tuple[str, str | None]]:
        """Paths of all that may be restored, newest first, and what is wrong with each.

        Those that the state file has and that are not there are among them, if anything is there.

        Raises:
            OSError: The directory cannot be read.
        """
        listed, found = self._listing()
        lost = found.manifests - found.whole  # of an index
        if not found.whole | found.outside | lost | (found.taken & set(listed.order)):
            if listed.order:
                warnings.warn(
                    f"{state_path(self.directory)} has checkpoints that are not there any more, "
                    f"such as {self.name}-{listed.order[0]}.",
                    stacklevel=5,
                )
            return []
        candidates = []
        rest = sorted(found.outside | lost, reverse=True)
        order = [*listed.order, *rest]
        if self._state() is None:  # nothing says that those are older
            order.sort(reverse=True)
        for number in dict.fromkeys(order):
            path = self.prefix(number)
            if number in found.outside:
                wrong: str | None = (
                    f"its files are links to a place outside of {self.directory}; give restore() "
                    "their own path"
                )
            else:
                wrong = fault(path)
            candidates.append((path, wrong))
        return candidates

    def numbers(self) -> set[int]:
        """Numbers that the name of any file in the directory has, of a checkpoint or not.

        Raises:
            OSError: The directory cannot be read.
        """
        return self._scan().taken

    def prepare(self) -> None:
        """Makes the directory, and an empty one in it to make a checkpoint in.

        From now on no other program may write checkpoints of this name into the directory. What a
        killed process has left unfinished is thrown away.

        Raises:
            CheckpointError: Another program writes into the directory.
            OSError: The directory cannot be made or written to.
        """
        os.makedirs(self.directory, exist_ok=True)
        self._lock.take()
        self._recover()
        self.discard()
        found = self._scan()
        for number in found.manifests - found.whole - found.outside:  # it was being removed
            self.remove(self.prefix(number))
        if not self._spares:
            for path in self._spare_files():
                os.unlink(path)
        os.mkdir(self.staging)
        self._state(warn=True)

    def discard(self) -> None:
        """Throws away what lies in `staging`."""
        if os.path.islink(self.staging) or os.path.isfile(self.staging):
            with contextlib.suppress(OSError):
                os.unlink(self.staging)
        else:
            shutil.rmtree(self.staging, ignore_errors=True)

    def recover(self) -> None:
        """Ends a `commit` that a killed process has begun, if that took another's place.

        Then the one that had the number before is gone, and this one is complete. Nothing happens
        while another program writes into the directory, or if this one may not.
        """
        if not os.path.isdir(self.staging):
            return
        was_held = self._lock.is_held()
        try:
            self._lock.take()
            self._recover()
        except (OSError, CheckpointError):
            return
        finally:
            if not was_held:  # a program that only reads is in nobody's way
                self._lock.release()

    def _recover(self) -> None:
        if os.path.islink(self.staging):
            return
        for path in glob.glob(os.path.join(glob.escape(self.staging), f"*{INDEX}")):
            made = path.removesuffix(INDEX)
            name = parsed(os.path.basename(path), self.name)
            if name is None:
                continue
            prefix = self.prefix(name.number)
            has_begun = not index_path(prefix).is_file()
            if has_begun and any(manifest_path(p).is_file() for p in (made, prefix)):
                self._move(made, self.directory)
                if fault(prefix) is not None:
                    self.remove(prefix)

    def commit(
        self, number: int, max_to_keep: int | None, every_n_hours: float | None = None
    ) -> None:
        """Moves the finished checkpoint in `staging` to its place, and removes old ones.

        All of it is on the disk before anything else changes, and an old checkpoint goes after
        the new one and the state file are on the disk.

        Args:
            number: Its number. Its files have their names already, there is no manifest yet. The
                data files are on the disk.
            max_to_keep: How many checkpoints are kept, None for all.
            every_n_hours: Of those that would go, one is kept for good if it was saved this many
                hours after the one before that was; None for none.

        Raises:
            OSError: It is not possible; earlier ones are there as before.
        """
        made, prefix = os.path.join(self.staging, f"{self.name}-{number}"), self.prefix(number)
        self._damaged.discard(prefix)
        listed, _ = self._listing()
        now, preserved = time.time(), listed.last_preserved
        if preserved > now:  # the clock was set back
            preserved = now - 1.0
        active = [(each, min(moment, now)) for each, moment in listed.active if each != number]
        active = _after(preserved, [*active, (number, now)])
        after = None if listed.newest is None else f"{self.name}-{listed.newest}"
        write_manifest(made, History(active[-1][1], after, preserved))
        for file in (index_path(made), manifest_path(made)):
            to_disk(file)
        to_disk(self.staging)
        replaced = os.path.join(self.staging, "replaced")
        os.mkdir(replaced)
        try:
            self._move(prefix, replaced, order=-1)
            try:
                self._move(made, self.directory)
                to_disk(self.directory)
                self._record(active, preserved)
            except BaseException:
                self.remove(prefix)
                raise
        except BaseException:
            self._move(os.path.join(replaced, os.path.basename(prefix)), self.directory)
            raise
        kept, last = self._sweep(active, preserved, max_to_keep, every_n_hours)
        if kept != active:
            # Until then the state file has names of checkpoints that are gone, which are left out.
            with contextlib.suppress(OSError):
                self._record(kept, last)

    def _sweep(
        self,
        active: Sequence[tuple[int, float]],
        last_preserved: float,
        max_to_keep: int | None,
        every_n_hours: float | None,
    ) -> tuple[list[tuple[int, float]], float]:
        """Removes the oldest checkpoints, or preserves them; what is left, and the last time."""
        kept, stuck = list(active), []
        while max_to_keep and len(kept) > max_to_keep:
            paths = [self.prefix(number) for number, _ in kept]
            damaged = [place for place, path in enumerate(paths) if path in self._damaged]
            number, moment = kept.pop(damaged[0] if damaged else 0)
            path = self.prefix(number)
            if (
                not damaged
                and every_n_hours
                and moment - every_n_hours * _HOUR_SECONDS >= last_preserved
            ):
                last_preserved = moment
                with contextlib.suppress(OSError, ValueError):
                    mark_preserved(path, self.staging)
                continue
            with contextlib.suppress(OSError):
                if self._spares:
                    self._keep_spares(path)
                self.remove(path)
            if index_path(path).is_file():  # the next save tries again
                stuck.append((number, moment))
        return _after(last_preserved, [*stuck, *kept]), last_preserved

    def _move(self, prefix: str, directory: str, order: int = 1) -> None:
        """Moves what there is of a checkpoint's files, the index last, or first with -1."""
        files = (*data_files(prefix), manifest_path(prefix), index_path(prefix))
        for file in files[::order]:
            if file.is_file():
                os.replace(file, os.path.join(directory, file.name))

    def _record(self, checkpoints: Sequence[tuple[int, float]], last_preserved: float) -> None:
        """Writes the state file, unless something that is no file has its name."""
        if os.path.isdir(state_path(self.directory)):
            return
        names = tuple(f"{self.name}-{number}" for number, _ in checkpoints)
        times = tuple(moment for _, moment in checkpoints)
        write_state(self.directory, State(names, times, last_preserved), self.staging)
        to_disk(self.directory)

    def remove(self, path: str) -> None:
        """Removes the files of a checkpoint, the index first: without it the rest is none.

        The manifest goes last, so that it is known whose the rest is.
        """
        for file in (index_path(path), *data_files(path), manifest_path(path)):
            if file.is_symlink() or not file.is_dir():
                file.unlink(missing_ok=True)

    def take_spare(self, number: int, path: str) -> None:
        """Gives a file that a removed checkpoint has left another name, if there is one.

        Args:
            number: Which one.
            path: The name, of a file to write over.
        """
        with contextlib.suppress(OSError):
            if _is_ours_alone(self._spare(number)):
                os.replace(self._spare(number), path)

    def _keep_spares(self, path: str) -> None:
        """Takes the large files from a checkpoint that is to be removed.

        Without an index on the disk it is none any more, whatever happens to them. Files that have
        another name as well are somebody's copy.
        """
        index_path(path).unlink(missing_ok=True)
        to_disk(self.directory)
        large = [f for f in data_files(path) if _is_ours_alone(f, _WORTH_KEEPING_BYTES)]
        for number, file in enumerate(large):
            if not os.path.isdir(self._spare(number)):
                os.replace(file, self._spare(number))
        to_disk(self.directory)

    def _spare(self, number: int) -> str:
        return os.path.join(self.directory, f".{self.name}.spare-{number}")

    def _spare_files(self) -> list[str]:
        pattern = re.compile(rf"\.{re.escape(self.name)}\.spare-[0-9]+")
        with os.scandir(self.directory) as entries:
            return [
                entry.path
                for entry in entries
                if pattern.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False)
            ]

    def _listing(self) -> tuple[Listing, _Found]:
        found = self._scan()
        state = self._state()
        listed = listing(
            self.name,
            state,
            found.whole,
            lambda n: history_of(self.prefix(n)) if n in found.manifests else None,
            self._began,
        )
        return listed, found

    def _state(self, *, warn: bool = False) -> State | None:
        """What the state file says; None if it is missing, or damaged, with a warning."""
        try:
            return read_state(self.directory)
        except StateFileError as error:
            if warn:
                advice = (
                    "Give that directory another name, for tf.train.latest_checkpoint looks there."
                    if os.path.isdir(state_path(self.directory))
                    else "The next save writes it anew."
                )
                warnings.warn(
                    f"{state_path(self.directory)} cannot be used: {error}. The checkpoints are "
                    f"those that are found in the directory. {advice}",
                    stacklevel=5,
                )
            return None

    def warn_of_state(self) -> None:
        """Warns if the state file is damaged."""
        self._state(warn=True)

    def _scan(self) -> _Found:
        """Looks through the directory.

        Raises:
            OSError: It is there and cannot be read.
        """
        found = _Found(set(), set(), set(), set())
        kinds = {INDEX: found.whole, MANIFEST: found.manifests}
        here = os.path.realpath(self.directory)
        try:
            entries = os.scandir(self.directory)
        except FileNotFoundError:
            return found
        with entries:
            for entry in entries:
                name = parsed(entry.name, self.name)
                if name is None:
                    continue
                if name.ending:  # a directory named `ckpt-3` is in nobody's way
                    found.taken.add(name.number)
                if entry.is_symlink() and not _is_below(entry.path, here):
                    found.outside.add(name.number)
                elif name.ending in kinds and entry.is_file():
                    kinds[name.ending].add(name.number)
        found.whole.difference_update(found.outside)
        return found


def _after(moment: float, active: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Checkpoints with times after a moment, for those before count as preserved."""
    first = math.nextafter(moment, math.inf)
    return [(number, max(first, when)) for number, when in active]


def _is_below(path: str, directory: str) -> bool:
    return os.path.realpath(path).startswith(os.path.join(directory, ""))


def _is_ours_alone(path: str | Path, least_bytes: int = 0) -> bool:
    """Whether a path is a file that has no other name, and that nobody else sees change."""
    found = os.stat(path, follow_symlinks=False)
    is_file = os.path.isfile(path) and not os.path.islink(path)
    return is_file and found.st_nlink == 1 and found.st_size >= least_bytes
