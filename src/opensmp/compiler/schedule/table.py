"""A task graph by numbers: what scheduling, validating and simulating read in their loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from opensmp.compiler.schedule.actions import Action, TaskGraph


class TaskTable(NamedTuple):
    """The actions of a task graph, ascending, and by their numbers in this order all else.

    Attributes:
        actions: All actions, ascending.
        number: The number of each action.
        device: Device index of each action.
        seconds: Duration of each action.
        microbatch: Index of each action's microbatch in `TaskGraph.microbatches`.
        needs: Numbers of the direct dependencies of each action, ascending.
        dependents: The reverse of `needs`.
    """

    actions: tuple[Action, ...]
    number: dict[Action, int]
    device: list[int]
    seconds: list[float]
    microbatch: list[int]
    needs: list[tuple[int, ...]]
    dependents: list[list[int]]

    @classmethod
    def of(cls, graph: TaskGraph) -> TaskTable:
        """Numbers the actions of a graph."""
        actions = tuple(sorted(graph.device))
        number = {action: i for i, action in enumerate(actions)}
        position = {microbatch: i for i, microbatch in enumerate(graph.microbatches)}
        needs = [tuple(sorted([number[n] for n in graph.needs[action]])) for action in actions]
        dependents: list[list[int]] = [[] for _ in actions]
        for i, needed in enumerate(needs):
            for j in needed:
                dependents[j].append(i)
        return cls(
            actions=actions,
            number=number,
            device=[graph.device[action] for action in actions],
            seconds=[graph.seconds[action] for action in actions],
            microbatch=[position[action.microbatch] for action in actions],
            needs=needs,
            dependents=dependents,
        )
