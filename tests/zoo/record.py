"""What a training step left behind, kept on disk, and how another one compares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

# Where the values of a tensor are tiny beside the rest of its group they are mostly rounding
# (the gradient of a bias before a normalisation is zero in exact arithmetic): its differences
# count relative to this share of the largest value in the group.
SHARE = 1e-3


class Value(NamedTuple):
    """One tensor of a step.

    Attributes:
        group: "loss", "gradient" or "state".
        name: The variable that it belongs to, or the microbatch.
        value: A tensor, a variable, `tf.IndexedSlices` or None.
    """

    group: str
    name: str
    value: Any


class Difference(NamedTuple):
    """The largest difference found in one group.

    Attributes:
        relative: Relative to the largest value of its tensor, or to `SHARE` of the largest
            value of the group where that is more; infinite where not comparable.
        name: The tensor.
    """

    relative: float
    name: str


class Record:
    """The values of a step, one file each: the gradients of the largest models fill memory.

    Args:
        folder: An empty folder.
        values: In an order that is the same for every run.
    """

    def __init__(self, folder: Path, values: Iterable[Value]) -> None:
        self._folder = folder
        self._names: list[tuple[str, str]] = []
        self._scales: dict[str, float] = {}
        for index, (group, name, value) in enumerate(values):
            self._names.append((group, name))
            array = _array(value)
            if array is not None:
                np.save(folder / f"{index}.npy", array)
                if array.dtype.kind == "f" and array.size:
                    scale = float(np.max(np.abs(array)))
                    self._scales[group] = max(self._scales.get(group, 0.0), scale)

    def differences(self, values: Iterable[Value]) -> dict[str, Difference]:
        """The largest difference of each group.

        Raises:
            ValueError: if the other step has other groups, names or an order of its own.
        """
        worst: dict[str, Difference] = {}
        for (group, name), array, other in zip(self._names, self._load(), values, strict=True):
            if (group, name) != (other.group, other.name):
                raise ValueError(f"expected {group} {name}, received {other.group} {other.name}")
            relative = _relative(array, _array(other.value), self._scales.get(group, 0.0))
            if group not in worst or relative > worst[group].relative:
                worst[group] = Difference(relative, name)
        return worst

    def _load(self) -> Iterator[np.ndarray | None]:
        for index in range(len(self._names)):
            path = self._folder / f"{index}.npy"
            yield np.load(path) if path.exists() else None


def _array(value: Any) -> np.ndarray | None:
    return None if value is None else tf.convert_to_tensor(value).numpy()


def _relative(
    expected: np.ndarray | None, received: np.ndarray | None, group_scale: float
) -> float:
    if expected is None or received is None:
        return 0.0 if expected is received else float("inf")
    if expected.shape != received.shape or expected.dtype != received.dtype:
        return float("inf")
    if np.array_equal(expected, received):
        return 0.0
    if expected.dtype.kind != "f" or not np.isfinite(expected).all():
        return float("inf")
    scale = max(float(np.max(np.abs(expected))), SHARE * group_scale)
    distance = float(np.max(np.abs(expected.astype(np.float64) - received)))
    return distance / scale if np.isfinite(distance) and scale else float("inf")
