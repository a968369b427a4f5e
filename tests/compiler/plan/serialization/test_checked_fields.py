from __future__ import annotations

import json
from typing import Any

import pytest
from compiler.plan.hand_made import chain, plan_of

from opensmp.base.message_text import shown
from opensmp.compiler.plan.serialization.plan_file import from_json, to_json
from opensmp.compiler.plan.unit_graph import SharedVariable
from opensmp.errors import PlanError


def refused(part: str, name: str, value: Any) -> str:
    """The message that a plan gets with this value in a part of its file."""
    shared = [SharedVariable((0, 2), 8, 8, "tied")]
    data = json.loads(json.dumps(to_json(plan_of(chain(3, shared=shared), [0, 0, 1], 2))))
    holder = data["settings"]["machine"] if part == "machine" else data[part]
    holder[name] = value
    with pytest.raises(PlanError) as caught:
        from_json(data, "plan.json")
    assert "has one fault." in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("names", ["a", "b", 3]),
        ("layers", ["a"]),
        ("forward_seconds", [1, 2]),
        ("forward_seconds", ["1", "2", "3"]),
        ("forward_seconds", [[1], [2], [3]]),
        ("forward_seconds", [1, True, 3]),
        ("backward_seconds", [1, -1, 3]),
        ("backward_seconds", [1, 1e300, 3]),
        ("forward_flops", [1, float("nan"), 3]),
        ("parameter_bytes", [1, 2**63, 3]),
        ("parameter_bytes", [1, 10**5000, 3]),
        ("state_bytes", [1, 1.5, 3]),
        ("residual_bytes", [1, -1, 3]),
        ("operations", [[[0, 10**12]], [], []]),
        ("operations", [[[-2, 1]], [], []]),
        ("operations", [[[0, 5]], [[0, 5]], []]),
        ("operations", [[[1, 0]], [], []]),
        ("operations", [[[0, 1]]]),
        ("operations", [[[0, 1, 2]], [], []]),
        ("operations", 3),
        ("tensors", [[0, [1], 1]]),
        ("tensors", [[0, [0], 1, 1, "t"]]),
        ("tensors", [[2, [1], 1, 1, "t"]]),
        ("tensors", [[0, [7], 1, 1, "t"]]),
        ("tensors", [[0, [], 1, 1, "t"]]),
        ("tensors", [[0, [2, 1], 1, 1, "t"]]),
        ("tensors", [[0, [1], -1, 1, "t"]]),
        ("tensors", [[0, [1], "1", 1, "t"]]),
        ("tensors", [[0, [1], 1, 1, 3]]),
        ("shared", [[[], 1, 1, "v"]]),
        ("shared", [[[-1, 0], 1, 1, "v"]]),
        ("shared", [[[0, 3], 1, 1, "v"]]),
        ("shared", {"a": 1}),
    ],
    ids=shown,
)
def test_costs_that_cannot_be_computed_with_are_named(name, value):
    message = refused("costs", name, value)
    assert f"costs: this part is broken; take it out, or write a new file ({name}: " in message


def test_bytes_that_cannot_be_counted_are_refused():
    data = json.loads(json.dumps(to_json(plan_of(chain(3), [0, 0, 1], 2))))
    data["costs"]["residual_bytes"] = [2**50] * 3
    data["settings"]["microbatches"] = 10**6
    with pytest.raises(PlanError, match="more than can be counted"):
        from_json(data)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("settings", "microbatches", 0),
        ("settings", "microbatches", "4"),
        ("settings", "microbatches", 10**30),
        ("settings", "pipeline", "fast"),
        ("settings", "optimize", None),
        ("settings", "contiguous", 1),
        ("settings", "active_microbatches", -1),
        ("settings", "pieces", 2.0),
        ("machine", "flops_per_second", 0),
        ("machine", "flops_per_second", "5e10"),
        ("machine", "bytes_per_second", float("inf")),
        ("machine", "bytes_per_second", float("nan")),
        ("machine", "transfer_bytes_per_second", True),
        ("machine", "transfer_seconds", -1e-9),
        ("machine", "memory_bytes", 1.5),
        ("machine", "memory_bytes", 10**5000),
        ("machine", "narrow_flops_per_second", 0),
        ("machine", "speed", 1),
    ],
    ids=shown,
)
def test_settings_that_no_plan_can_be_made_for_are_named(part, name, value):
    message = refused(part, name, value)
    assert "1. settings: " in message
    assert name in message


def test_settings_may_leave_out_what_has_a_default():
    data = json.loads(json.dumps(to_json(plan_of(chain(3), [0, 0, 1], 2))))
    data["settings"] = {"machine": {"transfer_seconds": 0, "memory_bytes": None}}
    assert from_json(data).settings.machine.transfer_seconds == 0
    data["settings"] = {}
    assert from_json(data).settings.microbatches == 1
