"""What a run leaves behind, and how two runs compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

# A tensor whose values are tiny beside the rest of its group is mostly rounding: its
# differences count relative to this share of the largest value in the group.
_SHARE = 1e-3


class Key(NamedTuple):
    """Where a value comes from.

    Attributes:
        moment: "start", "step 1", ...
        group: "state", "gradients", "results", "average".
        path: The place in its nest, and the microbatch.
    """

    moment: str
    group: str
    path: str

    def __str__(self) -> str:
        return f"{self.moment}, {self.group}, {self.path}"


class Sparse(NamedTuple):
    """A gradient that came as `tf.IndexedSlices`."""

    values: np.ndarray
    indices: np.ndarray


Record = dict[Key, Any]


def add(record: Record, moment: str, group: str, path: str, nest: Any) -> None:
    """Adds every leaf of a nest of tensors, variables and None."""
    if isinstance(nest, Mapping):
        for name in nest:
            add(record, moment, group, f"{path}/{name}", nest[name])
    elif isinstance(nest, (list, tuple)):
        for i, item in enumerate(nest):
            add(record, moment, group, f"{path}/{i}", item)
    else:
        key = Key(moment, group, path)
        assert key not in record, f"two values for {key}"
        record[key] = _leaf(nest)


def _leaf(value: Any) -> Any:
    if isinstance(value, tf.IndexedSlices):
        return Sparse(value.values.numpy(), value.indices.numpy())
    return value if value is None else tf.convert_to_tensor(value).numpy()


@dataclass(frozen=True)
class Difference:
    """One value that is not the same.

    Attributes:
        key: Which one.
        relative: How far apart, relative to the value's scale; infinite where the two
            are not comparable.
        what: In words.
    """

    key: Key
    relative: float
    what: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


def compare(expected: Record, received: Record) -> list[Difference]:
    """All values in which two runs differ, in the order of the expected record.

    Numbers differ relative to the largest value of the expected tensor, or to a small
    share of the largest value in its group where that is more.
    """
    differences = [
        Difference(key, np.inf, "is missing" if key in expected else "should not be there")
        for key in [*expected, *received]
        if (key in expected) != (key in received)
    ]
    scales = _scales(expected)
    for key, value in expected.items():
        if key in received:
            differences += _compare(key, value, received[key], scales[key.moment, key.group])
    return differences


def worst(differences: list[Difference]) -> float:
    """The largest relative difference, 0 if there is none."""
    return max((d.relative for d in differences), default=0.0)


def _scales(record: Record) -> dict[tuple[str, str], float]:
    scales: dict[tuple[str, str], float] = {}
    for key, value in record.items():
        group = key.moment, key.group
        scales[group] = max(scales.get(group, 0.0), _largest(value))
    return scales


def _largest(value: Any) -> float:
    value = value.values if isinstance(value, Sparse) else value
    if value is None or value.size == 0 or not _is_number(value):
        return 0.0
    return float(np.max(np.abs(value.astype(np.float64))))


def _is_number(value: np.ndarray) -> bool:
    return value.dtype.kind not in "biuOSU" and value.dtype != np.complex128


def _compare(key: Key, expected: Any, received: Any, group_scale: float) -> list[Difference]:
    if (expected is None) != (received is None) or type(expected) is not type(received):
        names = " instead of ".join(_describe(v) for v in (received, expected))
        return [Difference(key, np.inf, f"is {names}")]
    if expected is None:
        return []
    if isinstance(expected, Sparse):
        found = _compare(key, expected.indices, received.indices, group_scale)
        return found + _compare(key, expected.values, received.values, group_scale)
    if expected.shape != received.shape or expected.dtype != received.dtype:
        names = " instead of ".join(_describe(v) for v in (received, expected))
        return [Difference(key, np.inf, f"is {names}")]
    if not _is_number(expected):
        if np.array_equal(expected, received):
            return []
        return [Difference(key, np.inf, f"is {received!r} instead of {expected!r}")]
    if np.array_equal(expected, received, equal_nan=True):
        return []
    if not np.array_equal(np.isfinite(expected), np.isfinite(received)):
        return [Difference(key, np.inf, "has other values that are not finite")]
    wide, other = expected.astype(np.float64), received.astype(np.float64)
    distance = float(np.nanmax(np.abs(np.where(np.isfinite(wide), wide - other, 0.0))))
    scale = max(_largest(expected), _SHARE * group_scale)
    relative = distance / scale if scale else np.inf
    return [Difference(key, relative, f"differs by {relative:.2e} relative ({distance:.2e})")]


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, Sparse):
        return f"slices {_describe(value.values)}"
    return f"{value.dtype.name}{list(value.shape)}"
