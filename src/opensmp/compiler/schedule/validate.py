"""Checks before execution that a schedule can run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from opensmp.base.message_text import MOST_FAULTS, counted
from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.table import TaskTable
from opensmp.errors import ScheduleError

_Places = Mapping[Action, list[tuple[int, int]]]
"""Maps an action to its (device, position) pairs in the orders, usually one."""

_Homes = Mapping[Action, tuple[int, int]]
"""Maps an action to its first place in the order of its own device, if any."""


def validate(schedule: Schedule, graph: TaskGraph) -> None:
    """Checks a schedule against its task graph.

    Every action must occur exactly once, on its own device, after its dependencies on that device.
    The devices, each running its order and blocking on unmet dependencies on other devices, must
    not deadlock.
    """
    if run_times(schedule, graph.table, graph.num_devices) is None:
        _tell_faults(schedule, graph)


def run_times(
    schedule: Schedule,
    table: TaskTable,
    num_devices: int,
    transfer_seconds: float | Sequence[float] = 0.0,
) -> tuple[list[float], list[float]] | None:
    """Runs the orders with blocking semantics; None if the schedule is invalid.

    `transfer_seconds` is what an action waits for results of other devices, or one number each.
    Returns the start and the end of each action of the table, each as early as possible.
    """
    number, device = table.number, table.device
    orders = []
    for order in schedule.orders:
        numbers = [number.get(action, -1) for action in order]
        orders.append(numbers)
        if any(i < 0 or device[i] != len(orders) - 1 for i in numbers):
            return None
    if len(orders) != num_devices or sum(map(len, orders)) != len(device):
        return None
    if any(action not in number for pair in schedule.releases for action in pair):
        return None
    releases = [(number[before], number[after]) for before, after in schedule.releases]
    return run_orders(orders, releases, table, transfer_seconds)


def run_orders(
    orders: Sequence[Sequence[int]],
    releases: Iterable[tuple[int, int]],
    table: TaskTable,
    transfer_seconds: float | Sequence[float],
) -> tuple[list[float], list[float]] | None:
    """Does the same as `run_times` for numbers of actions, each on its own device."""
    device, needs = table.device, table.needs
    count, num_devices = len(device), len(orders)
    waits = transfer_seconds if isinstance(transfer_seconds, Sequence) else None
    wait = 0.0 if isinstance(transfer_seconds, Sequence) else transfer_seconds
    released: dict[int, list[int]] = {}
    for before, after in releases:
        released.setdefault(after, []).append(before)
    start, end = [0.0] * count, [-1.0] * count  # negative: has not run
    heads, times = [0] * num_devices, [0.0] * num_devices
    waiting: dict[int, list[int]] = {}  # an action, and the devices that wait for it
    stack, done = list(range(num_devices)), 0
    while stack:
        own = stack.pop()
        order, position, now = orders[own], heads[own], times[own]
        while position < len(order):
            i = order[position]
            if end[i] >= 0:
                return None  # doubled
            first = now
            for j in (*needs[i], *released[i]) if i in released else needs[i]:
                ended = end[j]
                if ended < 0:
                    waiting.setdefault(j, []).append(own)
                    break
                if device[j] != own:
                    ended += wait if waits is None else waits[i]
                if ended > first:
                    first = ended
            else:
                start[i] = first
                end[i] = now = first + table.seconds[i]
                position += 1
                if i in waiting:
                    stack += waiting.pop(i)
                continue
            break
        done += position - heads[own]
        heads[own], times[own] = position, now
    return (start, end) if done == count else None


def _tell_faults(schedule: Schedule, graph: TaskGraph) -> None:
    """Raises the error that names all faults of a schedule."""
    places = _places(schedule)
    homes = {
        action: home
        for action, found in places.items()
        for home in [place for place in found if place[0] == graph.device.get(action)][:1]
    }
    blockers = blocking_needs(schedule, graph)
    faults = [
        *_count_faults(schedule, graph, places),
        *_device_faults(graph, places),
        *_order_faults(blockers, homes),
        *_deadlocks(schedule, blockers, homes),
    ]
    if faults:
        lines = [f"- {fault}" for fault in faults[:MOST_FAULTS]]
        if len(faults) > MOST_FAULTS:
            lines.append(f"- and {len(faults) - MOST_FAULTS} more.")
        raise ScheduleError(
            f"Schedule {schedule.name!r} does not fit its task graph; "
            f"{counted(len(faults), 'fault')}:\n" + "\n".join(lines)
        )


def blocking_needs(schedule: Schedule, graph: TaskGraph) -> dict[Action, frozenset[Action]]:
    """Returns each action's dependencies, including the schedule's releases."""
    blockers = dict(graph.needs)
    for before, after in schedule.releases:
        blockers[after] = blockers.get(after, frozenset()) | {before}
    return blockers


def _places(schedule: Schedule) -> _Places:
    places: dict[Action, list[tuple[int, int]]] = {}
    for device, order in enumerate(schedule.orders):
        for position, action in enumerate(order):
            places.setdefault(action, []).append((device, position))
    return places


def _count_faults(schedule: Schedule, graph: TaskGraph, places: _Places) -> Iterable[str]:
    """Yields faults about missing, unknown and duplicate actions and the number of orders."""
    if len(schedule.orders) != graph.num_devices:
        verb = "is" if len(schedule.orders) == 1 else "are"
        yield (
            f"devices: there {verb} {counted(len(schedule.orders), 'order')} for "
            f"{counted(graph.num_devices, 'device')}; give one per device, an empty one where a "
            "device has no work."
        )
    for action in sorted(set(graph.device) - set(places)):
        yield (
            f"missing: {action} is in no order; add it to that of device {graph.device[action]}."
        )
    released = {action for pair in schedule.releases for action in pair}
    for action in sorted((set(places) | released) - set(graph.device)):
        yield f"unknown: {action} is not in the task graph; take it out."
    for action, found in places.items():
        if len(found) > 1:
            where = " and ".join(f"device {d} at position {p}" for d, p in found)
            yield f"doubled: {action} is there {len(found)} times, on {where}; keep one."


def _device_faults(graph: TaskGraph, places: _Places) -> Iterable[str]:
    for action, found in places.items():
        own = graph.device.get(action)
        for device in sorted({device for device, _ in found}):
            if own is not None and device != own:
                yield (
                    f"device: {action} is in the order of device {device}, but belongs to "
                    f"device {own}; move it there."
                )


def _order_faults(blockers: Mapping[Action, frozenset[Action]], homes: _Homes) -> Iterable[str]:
    for action, (device, _) in homes.items():
        for needed in sorted(blockers[action]):
            if _runs_too_late(needed, action, homes):
                yield (
                    f"order: device {device} runs {action} before {needed}, which it needs; "
                    f"put {needed} first."
                )


def _runs_too_late(needed: Action, action: Action, homes: _Homes) -> bool:
    if needed not in homes:
        return False
    (needed_device, needed_position), (device, position) = homes[needed], homes[action]
    return needed_device == device and needed_position > position


def _deadlocks(
    schedule: Schedule, blockers: Mapping[Action, frozenset[Action]], homes: _Homes
) -> Iterable[str]:
    """Runs the orders with blocking semantics and reports each cycle of waiting devices.

    Faults that the other checks report (missing or misplaced actions, wrong orders on one device)
    are assumed to be fixed, and a reported cycle to be broken, so that each fault is reported once.
    """
    orders = [
        [action for position, action in enumerate(order) if homes.get(action) == (device, position)]
        for device, order in enumerate(schedule.orders)
    ]
    waits_for = {
        action: {
            needed
            for needed in blockers[action]
            if needed in homes and not _runs_too_late(needed, action, homes)
        }
        for action in homes
    }
    heads = [0] * len(orders)
    done: set[Action] = set()
    while True:
        progress = False
        for device, order in enumerate(orders):
            while heads[device] < len(order) and waits_for[order[heads[device]]] <= done:
                done.add(order[heads[device]])
                heads[device] += 1
                progress = True
        if progress:
            continue
        stuck = {d: order[heads[d]] for d, order in enumerate(orders) if heads[d] < len(order)}
        if not stuck:
            return
        waited_for = {d: min(waits_for[action] - done) for d, action in stuck.items()}
        cycle = _cycle({d: homes[action][0] for d, action in waited_for.items()})
        yield (
            "deadlock: "
            + "; ".join(
                f"device {device} waits at {stuck[device]} for {waited_for[device]}"
                + _behind(homes[waited_for[device]][0], waited_for[device], stuck)
                for device in cycle
            )
            + "; change one of these orders."
        )
        waits_for[stuck[cycle[0]]].discard(waited_for[cycle[0]])


def _behind(device: int, waited_for: Action, stuck: Mapping[int, Action]) -> str:
    if stuck[device] == waited_for:
        return ""
    return f", which device {device} runs after {stuck[device]}"


def _cycle(next_device: Mapping[int, int]) -> list[int]:
    """Returns the first cycle reached from the smallest device, starting at its smallest device."""
    way: list[int] = []
    device = min(next_device)
    while device not in way:
        way.append(device)
        device = next_device[device]
    cycle = way[way.index(device) :]
    first = cycle.index(min(cycle))
    return cycle[first:] + cycle[:first]
