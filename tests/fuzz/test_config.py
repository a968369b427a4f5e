"""What `smp.init` is given: a dict, variables, the parameters of a training service."""

from __future__ import annotations

import decimal
import fractions
import json
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.bounds import cases, taken
from fuzz.strategies import (
    GREAT,
    NUMBER_TEXTS,
    ODD_TEXTS,
    either,
    great,
    json_texts,
    json_values,
    mutated,
    nested,
    numbers,
    texts,
)
from hypothesis import given
from hypothesis import strategies as st

from opensmp.api.init import _flags
from opensmp.config import ENVIRONMENT_PREFIX, SERVICE_VARIABLE, Config
from opensmp.config.keys import KEYS
from opensmp.config.pipelines import PIPELINES
from opensmp.config.sources import ALIASES

RIGHT: dict[str, tuple[Any, ...]] = {
    "partitions": (1, 2, 3, 4, 6),
    "microbatches": (1, 2, 4, 8),
    "pipeline": (*sorted(PIPELINES), "mine.json", len),
    "optimize": ("memory", "speed"),
    "placement_strategy": ("cluster", "spread"),
    "auto_partition": (True, False),
    "default_partition": (0, 1),
    "contiguous": (True, False),
    "horovod": (True, False),
    "active_microbatches": (1, 4, 8),
    "devices": ("cpu", "gpu", None, ["CPU:0", "CPU:1"], ["CPU:1"]),
    "plan": (None, "plan.json", {"net": "plan.json"}),
    "processes_per_replica": (None, 1, 2),
    "transport": ("auto", "collective"),
    "pieces_per_partition": (1, 2),
    "check_finite": (True, False),
    "shard_optimizer_state": (True, False),
    "recompute": ("none", "selective", "full", "auto", {"partitions": {0: "full"}}),
    "offload": ("none", "residuals", {0: "residuals"}),
    "offload_folder": (None, "scratch"),
    "wire_dtype": ("none", "bfloat16", "float16"),
    "device": (None, "h100", "A100", {"memory": "16GiB"}, {"flops": 1e13, "bandwidth": 9e11}),
}
NAMES = (*RIGHT, *ALIASES)


class Unprintable:
    """What cannot be shown, compared or counted."""

    def __repr__(self) -> str:
        raise RuntimeError("unprintable")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("incomparable")

    __hash__ = object.__hash__


def ring(kind: str) -> Any:
    """A list or a dict that holds itself."""
    if kind == "list":
        values: list[Any] = [1]
        values.append(values)
        return values
    items: dict[str, Any] = {"a": 1}
    items["b"] = items
    return items


ODD_OBJECTS = st.one_of(
    st.sampled_from(
        (
            *(b"cpu", bytearray(b"2"), 2j, decimal.Decimal("2"), fractions.Fraction(2), Path("a")),
            *(np.int64(2), np.float32(2), np.bool_(True), np.int8(-1), np.uint64(2**64 - 1)),
            *(range(3), range(10**12), frozenset({1}), (), ("CPU:0",), (("a", "b"),), (("a",),)),
            *(int, object(), Unprintable(), Path("\x00"), Path("a" * 5000), {1: "a"}, {"": "a"}),
        )
    ),
    st.builds(lambda: np.array([1, 2])),
    st.builds(lambda: np.zeros((0,))),
    st.builds(ring, st.sampled_from(("list", "dict"))),
    st.builds(nested, st.sampled_from((50, 5_000, 100_000)), st.sampled_from(("list", "dict"))),
    st.builds(lambda n: ["CPU:0"] * n, st.sampled_from(GREAT)),
    st.builds(lambda n: [f"CPU:{i}" for i in range(n)], st.sampled_from((5, 2_000, 100_000))),
    st.builds(lambda n: {f"net{i}": "a.json" for i in range(n)}, st.sampled_from((5, 50_000))),
    st.builds(lambda n: iter(range(n)), st.integers(0, 3)),
)


ODD = numbers() | texts("2", "cpu") | json_values() | ODD_OBJECTS
VALUES = {key: either(st.sampled_from(RIGHT[ALIASES.get(key, key)]), ODD) for key in NAMES}


ODD_KEYS = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.sampled_from((None, 1, 2.5, True, b"partitions", (), ("a",), "Partitions", "partition")),
    great(("partitions", "a", "\ud800")),
    st.builds(Unprintable),
)


@st.composite
def dicts(draw: st.DrawFn) -> Any:
    if draw(st.integers(0, 19)) == 0:
        return draw(json_values() | ODD_OBJECTS)
    found = {key: draw(VALUES[key]) for key in draw(st.sets(st.sampled_from(NAMES), max_size=6))}
    for key in draw(st.lists(ODD_KEYS, max_size=2)) if draw(st.integers(0, 4)) == 0 else ():
        found[key] = draw(numbers() | texts())
    if draw(st.integers(0, 99)) == 0:
        found.update({f"key{i}": i for i in range(20_000)})
    return found


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def text_of(key: str) -> st.SearchStrategy[str]:
    values = RIGHT[ALIASES.get(key, key)]
    right = [as_text(value) for value in values if value is not None]
    return either(st.sampled_from(right), texts(*right) | json_texts(json_values(*values)))


TEXTS = {key: text_of(key) for key in NAMES}


@st.composite
def variables(draw: st.DrawFn) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in draw(st.sets(st.sampled_from(NAMES), max_size=6)):
        found[ENVIRONMENT_PREFIX + key.upper()] = draw(TEXTS[key])
    for key in draw(st.lists(texts("PARTITONS", "PLAN_"), max_size=1)):
        found[ENVIRONMENT_PREFIX + key] = draw(texts("2"))
    return found


SERVICE = mutated(
    st.sampled_from(
        (
            {"partitions": 2, "microbatches": "4", "pipeline": "simple", "optimize": "speed"},
            {"pipeline_parallel_degree": 2, "horovod": "true", "devices": ["CPU:0", "CPU:1"]},
            {"partitions": 2, "pipeline_parallel_degree": 2, "plan": {"net": "plan.json"}},
            {"partitions": "2", "auto_partition": "False", "default_partition": "0"},
        )
    )
)
COUNTS = either(st.integers(1, 12), numbers())
FLAGS = mutated(
    st.sampled_from(
        (
            {"partitions": 2, "microbatches": 4, "pipeline": "simple", "horovod": True},
            {"devices": ["CPU:0", "CPU:1"], "auto_partition": False, "default_partition": 0},
        )
    )
)


def resolved(*args: Any, **kwargs: Any) -> Config | None:
    """What is taken comes back from its own dict."""
    result = taken(lambda: Config.resolve(*args, **kwargs))
    if result.error is not None:
        return None
    config: Config = result.value
    assert Config.resolve(config.to_dict()) == config
    assert str(config)
    assert hash(config) == hash(Config(**{key: getattr(config, key) for key in KEYS}))
    return config


@cases()
@given(explicit=dicts(), flags=st.none() | dicts().filter(lambda given: isinstance(given, dict)))
def test_dicts_are_taken_or_refused(explicit, flags):
    resolved(explicit, flags=flags)


@cases()
@given(keys=st.fixed_dictionaries({}, optional={key: VALUES[key] for key in RIGHT}))
def test_configurations_are_taken_or_refused(keys):
    taken(lambda: Config(**{"partitions": 2, **keys}))


@cases()
@given(partitions=COUNTS, processes=COUNTS, microbatches=COUNTS, active=COUNTS)
def test_numbers_that_belong_together_are_taken_or_refused(
    partitions, processes, microbatches, active
):
    keys = {
        "partitions": partitions,
        "processes_per_replica": processes,
        "microbatches": microbatches,
        "active_microbatches": active,
    }
    resolved(keys)


@cases()
@given(environ=variables())
def test_variables_are_taken_or_refused(environ):
    resolved(environ=environ)


@cases()
@given(text=json_texts(SERVICE))
def test_parameters_of_a_service_are_taken_or_refused(text):
    resolved(environ={SERVICE_VARIABLE: text})


@cases()
@given(text=json_texts(FLAGS | json_values()))
def test_flags_of_the_launcher_are_taken_or_refused(text):
    taken(lambda: Config.resolve(None, flags=_flags({"OPENSMP_RUN_FLAGS": text})))


def test_every_key_and_every_odd_number_has_been_thought_of():
    assert KEYS.keys() == RIGHT.keys()
    assert len(set(NUMBER_TEXTS)) == len(NUMBER_TEXTS)
