"""The directory in which checkpoints lie: their numbers, the state file, what is thrown away."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.saving.atomic import to_disk
from opensmp.saving.manifest import data_files, fault, index_path, manifest_path, write_manifest

_DATA = ".data-?????-of-?????"
_MANIFEST = ".manifest"
_WORTH_KEEPING_BYTES = 1 << 20
_STATE = "checkpoint"  # the name that tf.train.latest_checkpoint looks for


class Shelf:
    """The checkpoints of one name in a directory.

    A checkpoint is made in a directory beside them and moved to its place file by file, the index
    last: without it the other files are no checkpoint. The state file, which
    `tf.train.latest_checkpoint` reads, is replaced after that.

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

    def prefix(self, number: int) -> str:
        """The path of a checkpoint, as TensorFlow means it: without endings."""
        return os.path.join(self.directory, f"{self.name}-{number}")

    @property
    def staging(self) -> str:
        """Where a checkpoint is made."""
        return os.path.join(self.directory, f".{self.name}.unfinished")

    def checkpoints(self) -> list[tuple[str, float]]:
        """Paths and times of the checkpoints, oldest first.

        They are those of the state file and newer ones that a process has completed, though it
        was killed before it could write the state file.
        """
        state = self._state()
        listed: dict[str, float] = {}
        if state is not None:
            times = list(state.all_model_checkpoint_timestamps)
            paths = list(state.all_model_checkpoint_paths)
            times += [0.0] * (len(paths) - len(times))
            for path, moment in zip(paths, times, strict=True):
                # A directory that was moved may have its old name in the file.
                here = os.path.join(self.directory, os.path.basename(path))
                listed[path if index_path(path).is_file() else here] = moment
        newest = max((self._number(path) or 0 for path in listed), default=0)
        for number in sorted(self.numbers()):
            path = self.prefix(number)
            complete = manifest_path(path).is_file() and fault(path) is None
            if number > newest and path not in listed and complete:
                with contextlib.suppress(FileNotFoundError):  # a thread has just removed it
                    listed[path] = index_path(path).stat().st_mtime
        return [(path, moment) for path, moment in listed.items() if index_path(path).is_file()]

    def numbers(self) -> set[int]:
        """Numbers of all checkpoints that have an index, listed or not."""
        numbers = (self._number(path) for path in self._files(".index"))
        return {number for number in numbers if number is not None}

    def prepare(self) -> None:
        """Makes the directory, and an empty one in it to make a checkpoint in.

        What a killed process has left unfinished is thrown away.
        """
        os.makedirs(self.directory, exist_ok=True)
        self.recover()
        self.discard()
        whole = self.numbers()
        for ending in (_DATA, _MANIFEST):
            for path in self._files(ending):
                if self._number(path) not in whole:
                    os.unlink(path)
        if not self._spares:
            pattern = os.path.join(glob.escape(self.directory), f".{glob.escape(self.name)}.spare-")
            for path in glob.glob(f"{pattern}*"):
                os.unlink(path)
        os.mkdir(self.staging)

    def discard(self) -> None:
        """Throws away what lies in `staging`."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def recover(self) -> None:
        """Ends a `commit` that a killed process has begun, if that took another's place.

        Then the one that had the number before is gone, and this one is complete.
        """
        for path in glob.glob(os.path.join(glob.escape(self.staging), "*.index")):
            made = path.removesuffix(".index")
            prefix = os.path.join(self.directory, os.path.basename(made))
            has_begun = not index_path(prefix).is_file()
            if has_begun and any(manifest_path(p).is_file() for p in (made, prefix)):
                self._move(made, self.directory)
                if fault(prefix) is not None:
                    self.remove(prefix)

    def commit(self, number: int, max_to_keep: int | None) -> None:
        """Moves the finished checkpoint in `staging` to its place, and removes old ones.

        All of it is on the disk before anything else changes, and an old checkpoint goes after
        the new one and the state file are on the disk.

        Args:
            number: Its number. Its files have their names already, there is no manifest yet. The
                data files are on the disk.
            max_to_keep: How many checkpoints are kept, None for all.

        Raises:
            OSError, tf.errors.OpError: It is not possible; earlier ones are there as before.
        """
        made, prefix = os.path.join(self.staging, f"{self.name}-{number}"), self.prefix(number)
        write_manifest(made)
        for file in (index_path(made), manifest_path(made)):
            to_disk(file)
        to_disk(self.staging)
        earlier = [(path, moment) for path, moment in self.checkpoints() if path != prefix]
        replaced = os.path.join(self.staging, "replaced")
        os.mkdir(replaced)
        try:
            self._move(prefix, replaced, order=-1)
            try:
                self._move(made, self.directory)
                to_disk(self.directory)
                old = earlier[: len(earlier) + 1 - max_to_keep] if max_to_keep is not None else []
                self._record([*earlier[len(old) :], (prefix, time.time())])
            except BaseException:
                self.remove(prefix)
                raise
        except BaseException:
            self._move(os.path.join(replaced, os.path.basename(prefix)), self.directory)
            raise
        for path, _ in old:
            with contextlib.suppress(OSError):
                if self._spares:
                    self._keep_spares(path)
                self.remove(path)

    def _move(self, prefix: str, directory: str, order: int = 1) -> None:
        """Moves what there is of a checkpoint's files, the index last, or first with -1."""
        files = (*data_files(prefix), manifest_path(prefix), index_path(prefix))
        for file in files[::order]:
            if file.is_file():
                os.replace(file, os.path.join(directory, file.name))

    def _record(self, checkpoints: Sequence[tuple[str, float]]) -> None:
        """Writes the state file, at once as a whole."""
        paths = [path for path, _ in checkpoints]
        # Its recommended successor writes checkpoints itself.
        with _private.silence_deprecations():
            tf.compat.v1.train.update_checkpoint_state(
                self.directory,
                model_checkpoint_path=paths[-1],
                all_model_checkpoint_paths=paths,
                all_model_checkpoint_timestamps=[moment for _, moment in checkpoints],
            )
        to_disk(os.path.join(self.directory, _STATE))
        to_disk(self.directory)

    def remove(self, path: str) -> None:
        """Removes a checkpoint, the index first: without it the rest is none."""
        for file in (index_path(path), manifest_path(path), *data_files(path)):
            file.unlink(missing_ok=True)

    def take_spare(self, number: int, path: str) -> None:
        """Gives a file that a removed checkpoint has left another name, if there is one.

        Args:
            number: Which one.
            path: The name, of a file to write over.
        """
        with contextlib.suppress(OSError):
            os.replace(self._spare(number), path)

    def _keep_spares(self, path: str) -> None:
        """Takes the large files from a checkpoint that is to be removed.

        Without an index on the disk it is none any more, whatever happens to them. Files that have
        another name as well are somebody's copy.
        """
        index_path(path).unlink(missing_ok=True)
        to_disk(self.directory)
        files = [(file, file.stat()) for file in data_files(path)]
        large = [f for f, s in files if s.st_size >= _WORTH_KEEPING_BYTES and s.st_nlink == 1]
        for number, file in enumerate(large):
            os.replace(file, self._spare(number))
        to_disk(self.directory)

    def _spare(self, number: int) -> str:
        return os.path.join(self.directory, f".{self.name}.spare-{number}")

    def _state(self) -> Any:
        return tf.train.get_checkpoint_state(self.directory)

    def _files(self, ending: str) -> list[str]:
        pattern = os.path.join(glob.escape(self.directory), glob.escape(self.name)) + "-*" + ending
        return glob.glob(pattern)

    def _number(self, path: str) -> int | None:
        """The number in the name of a checkpoint or of one of its files."""
        match = re.fullmatch(
            re.escape(self.name) + r"-(\d+)(\.index|\.manifest|\.data-.*)?", os.path.basename(path)
        )
        return int(match[1]) if match else None
