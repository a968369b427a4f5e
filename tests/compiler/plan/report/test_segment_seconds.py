from __future__ import annotations

from dataclasses import replace

import pytest
from compiler.plan.hand_made import chain, plan_of

from opensmp.compiler.plan.report.segment_seconds import segment_seconds


def test_units_count_by_the_share_of_their_operations():
    graph = replace(chain(2, tensors=[]), operations=(("a", "b"), ("c",)))
    plan = plan_of(graph, [0, 1], 2)
    forward, backward = graph.forward_seconds, graph.backward_seconds
    assert segment_seconds(plan, ["a", "b"]) == pytest.approx((forward[0], backward[0]))
    assert segment_seconds(plan, ["a", "c"]) == pytest.approx(
        (forward[0] / 2 + forward[1], backward[0] / 2 + backward[1])
    )
    assert segment_seconds(plan, ["unknown"]) == (0.0, 0.0)


def test_transfers_count_for_the_pass_that_waits_for_them():
    graph = replace(chain(2), operations=(("a", "b"), ("c",)))
    plan = plan_of(graph, [0, 1], 2)
    move = 1.5  # 0.5 s and 100 B at 100 B/s
    assert segment_seconds(plan, ["a", "b"]) == pytest.approx((1, 2 + move))
    assert segment_seconds(plan, ["c"]) == pytest.approx((1 + move, 2))


def test_plan_without_costs_has_no_times():
    plan = replace(plan_of(chain(2), [0, 1], 2), graph=None, make_graph=None)
    assert segment_seconds(plan, ["a"]) is None
