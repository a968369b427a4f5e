from __future__ import annotations

from opensmp.compiler.schedule.actions import Action, TaskGraph


def test_numbers_stand_for_the_actions_in_their_order() -> None:
    graph = TaskGraph.chain(2, 3, split_backward=True)
    table = graph.table
    assert list(table.actions) == sorted(graph.device)
    for i, action in enumerate(table.actions):
        assert table.number[action] == i
        assert table.device[i] == graph.device[action]
        assert table.seconds[i] == graph.seconds[action]
        assert graph.microbatches[table.microbatch[i]] == action.microbatch
        assert {table.actions[j] for j in table.needs[i]} == graph.needs[action]
        assert {table.actions[j] for j in table.dependents[i]} == set(graph.dependents[action])


def test_microbatches_are_numbered_without_gaps() -> None:
    device = {Action("F", 0, 7): 0, Action("F", 0, 3): 0}
    assert TaskGraph(device, {}).table.microbatch == [0, 1]
