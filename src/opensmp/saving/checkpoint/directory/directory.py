"""Manages a checkpoint directory: lists, commits and removes checkpoints."""

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
    """Checkpoint numbers in a directory: with an index, a manifest, any file, a link out of it."""

    whole: set[int]
    manifests: set[int]
    taken: set[int]
    outside: set[int]


class CheckpointDirectory:
    """The checkpoints of one name in a directory.

    A checkpoint is staged in a subdirectory and moved to its place file by file, the index last:
    without an index, the other files do not count as a checkpoint. The state file, which
    `tf.train.latest_checkpoint` reads, is replaced afterwards. Files whose names are not exactly
    those of a checkpoint of this name and a number are not touched.

    Args:
        directory: The directory; it need not exist yet.
        name: Prefix of the checkpoint names.
        spares: Whether to keep large files of a removed checkpoint, to be overwritten by the next
            one. Measurements showed that allocating disk blocks takes as long as the rest of a
            write, and freeing them takes that time again.
    """

    def __init__(self, directory: str, name: str, *, spares: bool = False) -> None:
        self.directory = directory
        self.name = name
        self._spares = spares
        self._began = time.time() - 1.0  # same margin as in tf.train.CheckpointManager
        self._lock = DirectoryLock(os.path.join(directory, f".{name}.lock"))
        self._damaged: set[str] = set()

    def prefix(self, number: int) -> str:
        """The path of a checkpoint in TensorFlow's sense: without suffixes."""
        return os.path.join(self.directory, f"{self.name}-{number}")

    def note_damage(self, path: str) -> None:
        """Marks a damaged checkpoint, to be removed first.

        Otherwise it would count for `max_to_keep` in place of a good one.
        """
        self._damaged.add(path)

    @property
    def staging(self) -> str:
        """The directory in which a checkpoint is written until it is complete."""
        return os.path.join(self.directory, f".{self.name}.unfinished")

    def checkpoints(self) -> list[tuple[str, float]]:
        """Paths and times of the checkpoints that count for `max_to_keep`, oldest first."""
        return [(self.prefix(number), moment) for number, moment in self._listing()[0].active]

    def newest(self) -> str | None:
        """Path of the newest checkpoint, None if there is none; may raise `OSError`."""
        listed, found = self._listing()
        return next((self.prefix(n) for n in listed.order if n in found.whole), None)

    def candidates(self) -> list[tuple[str, str | None]]:
        """Paths of all checkpoints that may be restored, newest first, each with its fault or None.

        Includes those in the state file whose files are missing, unless the directory has no
        checkpoints.
        """
        listed, found = self._listing()
        lost = found.manifests - found.whole  # without an index
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
        if self._state() is None:  # without a state file their age is unknown
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
        """Numbers in the names of all checkpoint files, complete or not; may raise `OSError`."""
        return self._scan().taken

    def prepare(self) -> None:
        """Creates the directory, takes its lock and creates an empty staging directory.

        From then on no other program may write checkpoints of this name to the directory. Removes
        what a killed process has left incomplete.
        """
        os.makedirs(self.directory, exist_ok=True)
        self._lock.take()
        self._recover()
        self.discard()
        found = self._scan()
        for number in found.manifests - found.whole - found.outside:  # its removal was interrupted
            self.remove(self.prefix(number))
        if not self._spares:
            for path in self._spare_files():
                os.unlink(path)
        os.mkdir(self.staging)
        self._state(warn=True)

    def discard(self) -> None:
        """Removes the staging directory."""
        if os.path.islink(self.staging) or os.path.isfile(self.staging):
            with contextlib.suppress(OSError):
                os.unlink(self.staging)
        else:
            shutil.rmtree(self.staging, ignore_errors=True)

    def recover(self) -> None:
        """Completes an interrupted `commit` that was replacing a checkpoint of the same number.

        In that case the old checkpoint is already gone, and the new one is complete. Does nothing
        if another program holds the lock or the directory is not writable.
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
            if not was_held:  # a program that only reads must not block others
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
        """Moves the finished checkpoint in `staging` to its place and removes old ones.

        The new files are flushed to disk before anything else changes; old checkpoints are removed
        only after the new one and the state file are on disk.

        Args:
            number: Its number. Its files have their final names and its data files are on disk; the
                manifest is written here.
            max_to_keep: Number of checkpoints to keep; None for all.
            every_n_hours: Of the checkpoints to remove, one is preserved permanently if it was
                saved at least this many hours after the previously preserved one; None to preserve
                none.

        Raises:
            OSError: The commit failed; the earlier checkpoints are unchanged.
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
            # Until then the state file lists removed checkpoints, which readers of this class skip.
            with contextlib.suppress(OSError):
                self._record(kept, last)

    def _sweep(
        self,
        active: Sequence[tuple[int, float]],
        last_preserved: float,
        max_to_keep: int | None,
        every_n_hours: float | None,
    ) -> tuple[list[tuple[int, float]], float]:
        """Removes or preserves the oldest checkpoints; returns the rest and `last_preserved`."""
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
            if index_path(path).is_file():  # retried by the next save
                stuck.append((number, moment))
        return _after(last_preserved, [*stuck, *kept]), last_preserved

    def _move(self, prefix: str, directory: str, order: int = 1) -> None:
        """Moves the existing files of a checkpoint, the index last, or first with `order=-1`."""
        files = (*data_files(prefix), manifest_path(prefix), index_path(prefix))
        for file in files[::order]:
            if file.is_file():
                os.replace(file, os.path.join(directory, file.name))

    def _record(self, checkpoints: Sequence[tuple[int, float]], last_preserved: float) -> None:
        """Writes the state file, unless its path is a directory."""
        if os.path.isdir(state_path(self.directory)):
            return
        names = tuple(f"{self.name}-{number}" for number, _ in checkpoints)
        times = tuple(moment for _, moment in checkpoints)
        write_state(self.directory, State(names, times, last_preserved), self.staging)
        to_disk(self.directory)

    def remove(self, path: str) -> None:
        """Removes the files of a checkpoint, the index first: without it, it does not count.

        The manifest goes last, so that files left by an interruption can be attributed.
        """
        for file in (index_path(path), *data_files(path), manifest_path(path)):
            if file.is_symlink() or not file.is_dir():
                file.unlink(missing_ok=True)

    def take_spare(self, number: int, path: str) -> None:
        """Renames the spare file of this number, if there is one, to `path`."""
        with contextlib.suppress(OSError):
            if _is_ours_alone(self._spare(number)):
                os.replace(self._spare(number), path)

    def _keep_spares(self, path: str) -> None:
        """Keeps the large files of a checkpoint that is being removed as spare files.

        The index is removed first and the removal flushed, so that the rest is no checkpoint any
        more. Files with other hard links are not reused: they may be the user's copies.
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
        """Reads the state file; None if it is missing or damaged (`warn` for a warning)."""
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
        """Lists the directory; raises `OSError` if it exists and cannot be read."""
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
                if name.ending:  # a directory named `ckpt-3` does no harm
                    found.taken.add(name.number)
                if entry.is_symlink() and not _is_below(entry.path, here):
                    found.outside.add(name.number)
                elif name.ending in kinds and entry.is_file():
                    kinds[name.ending].add(name.number)
        found.whole.difference_update(found.outside)
        return found


def _after(moment: float, active: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Raises times to after `moment`, since earlier ones would count as preserved."""
    first = math.nextafter(moment, math.inf)
    return [(number, max(first, when)) for number, when in active]


def _is_below(path: str, directory: str) -> bool:
    return os.path.realpath(path).startswith(os.path.join(directory, ""))


def _is_ours_alone(path: str | Path, least_bytes: int = 0) -> bool:
    """Whether a path is a regular file of at least `least_bytes` without other hard links."""
    found = os.stat(path, follow_symlinks=False)
    is_file = os.path.isfile(path) and not os.path.islink(path)
    return is_file and found.st_nlink == 1 and found.st_size >= least_bytes
