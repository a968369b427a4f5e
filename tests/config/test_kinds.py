from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensmp.base.message_text import shown
from opensmp.config import Config
from opensmp.errors import ConfigError


def faults_of(*args: Any, **kwargs: Any) -> list[str]:
    """The faults that resolving finds, without their numbers."""
    with pytest.raises(ConfigError) as caught:
        Config.resolve(*args, **kwargs)
    return [line.split(". ", 1)[1] for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize("key", ["partitions", "microbatches", "processes_per_replica"])
@pytest.mark.parametrize(
    "value",
    [10**9, 10**400, 10**5000, float("nan"), float("inf")],
    ids=lambda value: shown(value, 9),
)
def test_numbers_beyond_all_bounds_are_refused_at_once(key, value):
    (fault,) = faults_of({key: value})
    assert f"{key} (smp.init dict): received " in fault
    assert "accepted: an integer >= 1 and <= 1" in fault
    assert len(fault) < 300


def test_many_partitions_that_the_processes_do_not_divide_are_refused_at_once():
    (fault,) = faults_of({"partitions": 99_999, "processes_per_replica": 7})
    assert "accepted: 1, 3, 9, 41, 123, 271, 369, 813, 2439, 11111, 33333, 99999" in fault


@pytest.mark.parametrize("digits", ["\u0663", "\u00b2", "9" * 5000, "1_0", "0x2"], ids=shown)
def test_numbers_of_variables_are_written_in_ascii(digits):
    (fault,) = faults_of(environ={"OPENSMP_PARTITIONS": digits})
    assert "partitions (OPENSMP_PARTITIONS): received " in fault
    assert faults_of({"devices": [f"CPU:{digits}"]})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"partitions": 2, "partitions": 4}', "the key 'partitions' comes twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"partitions": ' + "9" * 5000 + "}", "too many digits"),
        ('{"partitions": NaN}', "NaN is no JSON number"),
        ('{"partitions": 1e999}', "1e999 is too large"),
    ],
    ids=shown,
)
def test_json_that_python_reads_otherwise_is_refused(text, part):
    (fault,) = faults_of(environ={"SM_HP_MP_PARAMETERS": text})
    assert part in fault
    (fault,) = faults_of(environ={"OPENSMP_PLAN": '{"net": ' + text + "}"})
    assert part in fault


def ring() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    "make",
    [
        *(ring, deep, Unprintable, lambda: np.array([1, 2]), lambda: range(10**30)),
        *(lambda: ["CPU:0"] * 200_000, lambda: {ring: "a"}, lambda: ((["a"], "b"),), lambda: "\0"),
        *(lambda: Path("\0"), lambda: b"cpu", lambda: {"a": ring()}),
    ],
)
@pytest.mark.parametrize("key", ["plan", "devices", "active_microbatches", "pipeline"])
def test_value_of_any_kind_is_refused_by_name(key, make):
    (fault,) = faults_of({key: make()})
    assert fault.startswith(f"{key} (smp.init dict): received ")
    assert len(fault) < 400
    with pytest.raises(ConfigError, match=key):
        Config(partitions=2, **{key: make()})


def test_key_of_any_kind_is_refused():
    (fault,) = faults_of({Unprintable(): 1})
    assert fault.startswith("<Unprintable> (smp.init dict)")
    (fault,) = faults_of({"a" * 1_000_000: 1})
    assert len(fault) < 500


def test_two_values_that_cannot_be_compared_are_not_the_same():
    (fault,) = faults_of({"partitions": 2, "pipeline_parallel_degree": Unprintable()})
    assert "both name the number of partitions" in fault


def test_of_very_many_faults_the_first_are_listed_and_the_others_counted():
    with pytest.raises(ConfigError, match="has 20000 faults") as caught:
        Config.resolve({f"key{number}": 1 for number in range(20_000)})
    assert str(caught.value).endswith("  and 19950 more.")
