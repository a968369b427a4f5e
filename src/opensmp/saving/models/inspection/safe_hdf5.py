"""Reads untrusted HDF5 files; all HDF5 reads of opensmp must go through this module.

An HDF5 file can refer to values in other files, through external or virtual datasets or links, so
that loading a model would read files that the process may read and the file's author may not. It
can also declare arrays that are more than a thousand times its own size. Keras writes neither.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np

from opensmp.errors import SavingError, SmpError
from opensmp.saving.models.inspection.damage import half
from opensmp.saving.models.inspection.json_text import configuration_of, object_of

Shape = tuple[int, ...]

# DEFLATE compresses at most 1032:1; below the floor expansion is harmless.
_MOST_EXPANSION = 1100
_FLOOR_BYTES = 64 << 20
_NUMBERS = "biufcV"  # V: two-byte dtypes unknown to NumPy, such as bfloat16


class Hdf5(NamedTuple):
    """An open HDF5 file.

    Attributes:
        root: The `h5py.File`; access its items only through the methods of this class.
        name: Name of the file for messages.
        what: Name of the operation for messages.
    """

    root: Any
    name: str
    what: str

    def group(self, path: str, within: Any = None) -> Any:
        """A group by its path in the file, or relative to another group."""
        return self._item(path, h5py.Group, "group", within)

    def dataset(self, path: str, within: Any = None) -> Any:
        """A dataset by its path, not read yet, whose values are stored in this file."""
        found = self._item(path, h5py.Dataset, "dataset", within)
        self._check(found, path)
        return found

    def array(self, dataset: Any, shape: Shape) -> Any:
        """Reads a result of `dataset`; refuses other shapes than the expected one unread."""
        if tuple(dataset.shape or ()) != tuple(shape) or dataset.dtype.kind not in _NUMBERS:
            raise SavingError(
                f"{self.what}: the dataset {dataset.name} in {self.name} is not what belongs "
                f"there: expected numbers of the shape {tuple(shape)}, received "
                f"{dataset.dtype} of the shape {dataset.shape}."
            )
        return np.asarray(dataset[()])

    def shapes(self) -> dict[str, Shape]:
        """Validates all objects in the file; returns the shape of each dataset by its path.

        Refuses soft and external links, values in other files, and datasets that declare far more
        bytes than are stored.
        """
        found: dict[str, Shape] = {}
        seen: set[Any] = set()
        pending: list[tuple[str, Any]] = [("", self.root)]
        while pending:  # not recursive, since the nesting depth is untrusted
            above, group = pending.pop()
            info = h5py.h5o.get_info(group.id)
            if (info.fileno, info.addr) in seen:
                continue
            seen.add((info.fileno, info.addr))
            inner: list[tuple[str, Any]] = []
            for label in group:
                path = f"{above}/{label}" if above else label
                item = self._follow(group, label, path)
                if isinstance(item, h5py.Group):
                    inner.append((path, item))
                elif isinstance(item, h5py.Dataset):
                    self._check(item, path)
                    found[path] = tuple(item.shape or ())
            pending += reversed(inner)
        return found

    def text(self, attribute: str) -> str | None:
        """A string attribute of the file; None if it does not exist."""
        value = self.root.attrs.get(attribute)
        if value is None:
            return None
        try:
            if isinstance(value, bytes):
                return value.decode("utf-8")
            if isinstance(value, str):
                value.encode("utf-8")  # h5py decodes invalid UTF-8 to surrogates
                return str(value)
        except UnicodeError as error:
            raise SavingError(
                f"{self.what}: {attribute} in {self.name} is not UTF-8 ({error}). The file "
                "is damaged, or half a file: write it again."
            ) from error
        raise SavingError(
            f"{self.what}: {attribute} in {self.name} is no text, but {type(value).__name__}. The "
            "file is damaged, or half a file: write it again."
        )

    def json(self, attribute: str) -> dict[str, Any] | None:
        """The JSON object in an attribute; None if it does not exist."""
        text = self.text(attribute)
        if text is None:
            return None
        return object_of(text, f"{attribute} in {self.name}", self.what)

    def configuration(self, attribute: str) -> dict[str, Any] | None:
        """The configuration of a model in an attribute; None if it does not exist."""
        text = self.text(attribute)
        if text is None:
            return None
        return configuration_of(text, f"{attribute} in {self.name}", self.what)

    def names(self, group: Any, attribute: str) -> list[str]:
        """A list of names in a group's attribute; Keras splits long lists over several ones."""
        attributes: Mapping[str, Any] = group.attrs
        if attribute in attributes:
            pieces: list[Any] = [attributes[attribute]]
        else:
            pieces = []
            while f"{attribute}{len(pieces)}" in attributes:
                pieces.append(attributes[f"{attribute}{len(pieces)}"])
        return [_name(each) for piece in pieces for each in np.ravel(piece)]

    def _item(self, path: str, kind: Any, kind_name: str, within: Any) -> Any:
        item = self.root if within is None else within
        above = "" if within is None else str(within.name)
        for label in filter(None, path.split("/")):
            above = f"{above}/{label}"
            if not isinstance(item, h5py.Group) or label not in item:
                item = None
                break
            item = self._follow(item, label, above)
        if not isinstance(item, kind):
            raise SavingError(half(self.name, self.what, f"it has no {kind_name} {path!r}"))
        return item

    def _follow(self, group: Any, label: str, path: str) -> Any:
        link = group.get(label, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise self._refusal(path, f"leads to another file, {link.filename!r}")
        if not isinstance(link, h5py.HardLink):
            raise self._refusal(path, "leads to another place")
        return group[label]

    def _check(self, dataset: Any, path: str) -> None:
        """Refuses datasets with values in other files, incomplete or oversized ones."""
        if dataset.external:
            others = ", ".join(repr(os.fsdecode(name)) for name, *_ in dataset.external)
            raise self._refusal(path, f"has its values in another file, {others}")
        if dataset.is_virtual:
            raise self._refusal(path, "is virtual: it has its values in other datasets or files")
        if dataset.shape is None:
            return
        declared = math.prod(dataset.shape) * dataset.dtype.itemsize
        stored = dataset.id.get_storage_size()
        if declared == 0:
            return
        if stored > self.root.id.get_filesize() or not _is_complete(dataset, declared, stored):
            raise SavingError(
                half(
                    self.name,
                    self.what,
                    f"the dataset {path!r} declares {declared:,} bytes, which are not all there",
                )
            )
        if declared > max(_FLOOR_BYTES, _MOST_EXPANSION * stored):
            raise self._refusal(
                path, f"declares {declared:,} bytes, of which {stored:,} are stored"
            )

    def _refusal(self, path: str, why: str) -> SavingError:
        return SavingError(
            f"{self.what}: {self.name} is not read: {path!r} in it {why}. Keras writes no such "
            "files; ask for one that has all its values in itself, from somebody you trust."
        )


@contextlib.contextmanager
def opened(source: Any, name: str | os.PathLike[str], what: str, mode: str = "r") -> Iterator[Hdf5]:
    """Opens an HDF5 file and converts errors of reading it."""
    try:
        with h5py.File(source, mode) as root:
            yield Hdf5(root, os.fspath(name), what)
    except (SmpError, PermissionError):
        raise
    except Exception as error:  # h5py raises many kinds for damaged files
        raise SavingError(half(name, what, str(error) or type(error).__name__)) from error


def _is_complete(dataset: Any, declared: int, stored: int) -> bool:
    """Whether all values have been written; missing ones would read as zeros."""
    chunks: Sequence[int] | None = dataset.chunks
    if chunks is None:
        return stored >= declared
    sizes = zip(dataset.shape, chunks, strict=True)
    wanted = math.prod(-(-length // size) for length, size in sizes)
    return bool(dataset.id.get_num_chunks() == wanted)


def _name(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
