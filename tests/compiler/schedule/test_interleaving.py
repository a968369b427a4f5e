from __future__ import annotations

import pytest

from opensmp.compiler.schedule.actions import Action, TaskGraph
from opensmp.compiler.schedule.interleaving import by_turns, quickest
from opensmp.compiler.schedule.list_scheduling import Draft, Priority, draft, list_schedule
from opensmp.compiler.schedule.methods.interleaved import backward_first, interleaved
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate


def looped(devices: int, pieces: int, microbatches: int) -> TaskGraph:
    """A chain of segments that devices take by turns; F takes 1 s, B takes 2 s."""
    count = devices * pieces
    device: dict[Action, int] = {}
    needs: dict[Action, frozenset[Action]] = {}
    for microbatch in range(microbatches):
        for segment in range(count):
            forward, backward = (Action(kind, segment, microbatch) for kind in "FB")
            device[forward] = device[backward] = segment % devices
            before = [Action("F", segment - 1, microbatch)] if segment else []
            after = [Action("B", segment + 1, microbatch)] if segment < count - 1 else []
            needs[forward] = frozenset(before)
            needs[backward] = frozenset([forward, *after])
    seconds = {action: 1.0 if action.kind == "F" else 2.0 for action in device}
    return TaskGraph(device=device, needs=needs, seconds=seconds, num_devices=devices)


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("pieces", [2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_bubble_shrinks_with_the_pieces(devices: int, pieces: int, groups: int) -> None:
    microbatches = devices * groups
    graph = looped(devices, pieces, microbatches)
    schedule = interleaved(graph, active_microbatches=2 * devices)
    validate(schedule, graph)
    simulation = simulate(schedule, graph)
    # (devices - 1) * (F + B) of one piece, as Narayanan et al. say.
    assert simulation.makespan_seconds == 3 * (pieces * microbatches + devices - 1)
    assert simulation.peak_in_flight <= 2 * devices


def test_with_one_segment_each_it_is_one_forward_one_backward() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=4)
    by_turn = list_schedule(graph, name="turns", priority=by_turns(graph), active_microbatches=4)
    usual = interleaved(graph, active_microbatches=4)
    assert simulate(by_turn, graph).makespan_seconds == simulate(usual, graph).makespan_seconds


def test_of_equally_long_schedules_the_one_that_waits_less_for_transfers_is_quickest() -> None:
    graph = looped(2, 1, 2)

    def made(name: str, priority: Priority, bound: int) -> Draft:
        return draft(graph, name=name, priority=priority, active_microbatches=bound)

    good = made("good", backward_first, 2)
    assert quickest(graph, [good, made("same", backward_first, 2)]).name == "good"
    one_by_one = made("slow", lambda a: (a.microbatch,), 1)
    assert quickest(graph, [one_by_one, good]).name == "good"
