from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from zoo.record import SHARE, Record, Value

_VALUES = [
    Value("gradient", "large", np.array([1.0, -4.0], "float32")),
    Value("gradient", "tiny", np.array([1e-6], "float32")),
    Value("gradient", "none", None),
    Value("state", "count", np.array(3)),
]


def _with(index: int, value: object) -> list[Value]:
    values = list(_VALUES)
    values[index] = values[index]._replace(value=value)
    return values


def test_equal_values_differ_by_nothing(tmp_path: Path) -> None:
    found = Record(tmp_path, _VALUES).differences(_VALUES)
    assert {group: d.relative for group, d in found.items()} == {"gradient": 0.0, "state": 0.0}


def test_a_difference_is_relative_to_the_largest_value_of_its_tensor(tmp_path: Path) -> None:
    other = _with(0, np.array([1.5, -4.0], "float32"))
    found = Record(tmp_path, _VALUES).differences(other)
    assert found["gradient"] == (0.125, "large")


def test_a_tiny_tensor_counts_by_its_share_of_the_group(tmp_path: Path) -> None:
    other = _with(1, np.array([0.0], "float32"))
    found = Record(tmp_path, _VALUES).differences(other)
    assert found["gradient"].relative == pytest.approx(1e-6 / (SHARE * 4.0))


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, None),
        (2, np.zeros(2, "float32")),
        (0, np.array([1.0, -4.0], "float64")),
        (0, np.array([1.0, np.nan], "float32")),
        (3, np.array(4)),
    ],
    ids=["gone", "new", "dtype", "not finite", "integer"],
)
def test_what_cannot_be_compared_differs_without_bound(
    tmp_path: Path, index: int, value: object
) -> None:
    found = Record(tmp_path, _VALUES).differences(_with(index, value))
    assert found[_VALUES[index].group].relative == float("inf")


def test_sparse_gradients_compare_as_dense_ones(tmp_path: Path) -> None:
    sparse = tf.IndexedSlices(tf.constant([[1.0], [2.0]]), tf.constant([1, 1]), tf.constant([3, 1]))
    dense = tf.constant([[0.0], [3.0], [0.0]])
    record = Record(tmp_path, [Value("gradient", "table", sparse)])
    assert record.differences([Value("gradient", "table", dense)])["gradient"].relative == 0


def test_other_names_are_refused(tmp_path: Path) -> None:
    record = Record(tmp_path, _VALUES[:1])
    with pytest.raises(ValueError, match="expected gradient large, received gradient other"):
        record.differences([_VALUES[0]._replace(name="other")])
