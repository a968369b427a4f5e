from __future__ import annotations

import pytest

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.methods.interleaved import interleaved
from opensmp.compiler.schedule.methods.simple import simple
from opensmp.compiler.schedule.simulate import simulate
from opensmp.errors import ScheduleError


def written(*orders: str) -> Schedule:
    return Schedule("mine", tuple(tuple(map(Action.parse, order.split())) for order in orders))


def by_text(times: dict[Action, float]) -> dict[str, float]:
    return {str(action): seconds for action, seconds in times.items()}


def test_every_action_starts_as_early_as_it_can() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
    simulation = simulate(simple(graph), graph)
    assert by_text(dict(simulation.start)) == {
        "0F0": 0.0,
        "0F1": 1.0,
        "1F0": 1.0,
        "1F1": 2.0,
        "1B0": 3.0,
        "1B1": 5.0,
        "0B0": 5.0,
        "0B1": 7.0,
    }
    assert all(
        simulation.end[action] == simulation.start[action] + graph.seconds[action]
        for action in graph.device
    )
    assert simulation.makespan_seconds == 9.0
    assert simulation.busy_seconds == (6.0, 6.0)
    assert simulation.bubble == 1 / 3
    assert simulation.peak_in_flight == 2


def test_transfer_delays_only_what_comes_from_another_device() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=1)
    simulation = simulate(simple(graph), graph, transfer_seconds=0.5)
    assert by_text(dict(simulation.start)) == {"0F0": 0.0, "1F0": 1.5, "1B0": 2.5, "0B0": 5.0}
    assert simulation.makespan_seconds == 7.0


def test_releases_are_waited_for() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=2, backward=False)
    simulation = simulate(interleaved(graph, active_microbatches=1), graph)
    assert by_text(dict(simulation.start)) == {"0F0": 0.0, "1F0": 1.0, "0F1": 2.0, "1F1": 3.0}
    assert simulation.peak_in_flight == 1


def test_durations_may_be_others_than_those_of_the_schedule() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
    slow = TaskGraph(graph.device, graph.needs, dict.fromkeys(graph.device, 10.0))
    assert simulate(simple(graph), slow).makespan_seconds == 60.0


def test_forward_results_are_held_until_the_end_of_their_backward() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=3)
    assert simulate(simple(graph), graph).live_activations == (3, 3)
    assert simulate(interleaved(graph, 2), graph).live_activations == (2, 1)


def test_forward_results_are_held_until_the_last_of_two_backwards() -> None:
    forward, once, again = map(Action.parse, ("0F0", "0B0", "0B0.1"))
    other = Action.parse("0F1")
    device = dict.fromkeys((forward, once, again, other), 0)
    graph = TaskGraph(device, {once: frozenset({forward}), again: frozenset({forward})})
    assert simulate(written("0F0 0B0 0F1 0B0.1"), graph).live_activations == (2,)
    assert simulate(written("0F0 0B0 0B0.1 0F1"), graph).live_activations == (1,)


def test_forward_results_are_held_until_weight_gradients_are_done() -> None:
    device = dict.fromkeys(map(Action.parse, ("0F0", "0B0", "0W0", "0F1")), 0)
    graph = TaskGraph(device, {Action.parse("0B0"): frozenset({Action.parse("0F0")})})
    assert simulate(written("0F0 0B0 0F1 0W0"), graph).live_activations == (2,)
    assert simulate(written("0F0 0B0 0W0 0F1"), graph).live_activations == (1,)


def test_forward_results_without_backward_are_held_until_their_consumers_are_done() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=4, backward=False)
    # The consumer of a result is its neighbour, one time unit later.
    assert simulate(simple(graph), graph).live_activations == (2, 1)
    slow = TaskGraph(graph.device, graph.needs, {a: 1.0 + 9 * a.segment for a in graph.device})
    assert simulate(simple(slow), slow).live_activations == (4, 1)


def test_idle_device_counts_in_the_bubble() -> None:
    action = Action.parse("0F0")
    graph = TaskGraph({action: 0}, {}, num_devices=4)
    simulation = simulate(simple(graph), graph)
    assert simulation.busy_seconds == (1.0, 0.0, 0.0, 0.0)
    assert simulation.bubble == 0.75
    assert simulation.live_activations == (1, 0, 0, 0)


def test_nothing_to_do_takes_no_time() -> None:
    graph = TaskGraph({}, {}, num_devices=2)
    simulation = simulate(simple(graph), graph)
    assert (simulation.makespan_seconds, simulation.bubble, simulation.peak_in_flight) == (0, 0, 0)


def test_actions_of_no_duration_are_run_in_order() -> None:
    chain = TaskGraph.chain(num_partitions=3, num_microbatches=4)
    free = {a: 0.0 for a in chain.device if a.segment == 1}
    graph = TaskGraph(chain.device, chain.needs, free)
    simulation = simulate(interleaved(graph, active_microbatches=2), graph)
    assert simulation.busy_seconds == (12.0, 0.0, 12.0)
    assert simulation.peak_in_flight == 2


def test_schedule_that_deadlocks_is_refused() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
    with pytest.raises(ScheduleError, match="deadlock: device 0 waits at 0B0 for 1B0"):
        simulate(written("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), graph)


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_impossible_transfer_is_refused(seconds: float) -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    with pytest.raises(ScheduleError, match=f"transfer_seconds={seconds} is not possible"):
        simulate(simple(graph), graph, transfer_seconds=seconds)
