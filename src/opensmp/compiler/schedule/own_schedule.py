"""Schedules that a user writes: a Python function, or a JSON file of the orders."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensmp.base.message_text import MOST_FAULTS, counted, did_you_mean, numbered, shown
from opensmp.base.strict_json import JsonFault, parse_json
from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.config.pipelines import OwnPipeline, pipeline_name
from opensmp.errors import ScheduleError

FORMAT = "opensmp schedule"
_KEYS = ("format", "orders")
_MOST_BYTES = 256 << 20
_FORM = (
    'Expected: {"format": "opensmp schedule", "orders": [["0F0", ...], ...]}, one list for each '
    "partition, in which an action is its segment, kind (F, B or W) and microbatch."
)


def own_schedule(pipeline: OwnPipeline, graph: TaskGraph) -> Schedule:
    """Returns the schedule of a function or a file for a task graph, not yet validated.

    A function gets the graph and returns one order for each device, or a `Schedule`; an order is a
    sequence of actions or of their texts, such as `"2F0"`. A weight gradient W that no order has
    follows its B. Of the orders of a file, a graph without backward passes, as of an evaluation or
    of a call outside of a step, takes its own forward passes.

    Raises:
        ScheduleError: If the file cannot be read, or what it or the function gives are no orders.
            The message names all faults.
    """
    name = pipeline_name(pipeline)
    if callable(pipeline):
        made = _made(pipeline, graph)
        if isinstance(made, Schedule):
            orders = [list(order) for order in made.orders]
        else:
            orders = _orders(made, f"what the function {name} returned")
    else:
        orders = read_orders(pipeline)
        if all(action.kind == "F" for action in graph.device):
            orders = [[action for action in order if action in graph.device] for order in orders]
    return Schedule(name, tuple(_with_weights(orders, graph)), None, (), graph)


def read_orders(path: str) -> list[list[Action]]:
    """Returns the orders in a file, one per partition.

    Raises:
        ScheduleError: If the file cannot be read, or has no orders; the message names all faults.
    """
    return _orders(_read(path), f"the orders of {path!r}")


def check_file(pipeline: OwnPipeline, num_partitions: int | None) -> None:
    """Raises what is wrong with a file, if `pipeline` is one, before there are tasks to order.

    The number of its orders is not compared with `num_partitions` None.
    """
    if not isinstance(pipeline, str) or not pipeline.endswith(".json"):
        return
    orders = len(read_orders(pipeline))
    if num_partitions is not None and orders != num_partitions:
        raise ScheduleError(
            f"Schedule: the file {pipeline!r} has {counted(orders, 'order')}, but partitions is "
            f"{num_partitions}. Expected: one order per partition. Set partitions to "
            f"{max(1, orders)}, or use a file that was made for {num_partitions}."
        )


def _made(pipeline: Callable[..., Any], graph: TaskGraph) -> Any:
    """What a user's function returns; its errors name it."""
    try:
        return pipeline(graph)
    except Exception as error:
        raise ScheduleError(
            f"Schedule: the function {pipeline_name(pipeline)}, the value of the key pipeline, "
            f"failed for {counted(len(graph.device), 'action')} on "
            f"{counted(graph.num_devices, 'device')}: {type(error).__name__}: {error}. Expected: "
            "it takes a task graph and returns one order for each device, or a Schedule. The "
            "traceback above shows its line."
        ) from error


def save(schedule: Schedule, path: str | os.PathLike[str]) -> None:
    """Writes the orders of a schedule to a file that the key `pipeline` accepts.

    Example:
        >>> from opensmp.compiler.schedule.pipelines import build
        >>> graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
        >>> save(build("interleaved", graph), "mine.json")
        >>> build("mine.json", graph).orders == build("interleaved", graph).orders
        True
    """
    rows = ",\n".join(
        "    [" + ", ".join(f'"{action}"' for action in order) + "]" for order in schedule.orders
    )
    text = f'{{\n  "format": "{FORMAT}",\n  "orders": [\n{rows}\n  ]\n}}\n'
    Path(path).write_text(text, encoding="utf-8")


def _read(path: str) -> Any:
    """Returns the orders in a file."""
    try:
        found = os.stat(path)
        # Reading a pipe or a device may never end.
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            raise ScheduleError(
                f"Schedule: {path!r} of the key pipeline is no regular file of at most "
                f"{_MOST_BYTES} bytes. {_FORM}"
            )
        data = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ScheduleError(
            f"Schedule: the file {path!r} of the key pipeline cannot be read: {error.strerror}. "
            "Expected: the path of a JSON file, from the folder in which the program runs."
        ) from error
    except (JsonFault, UnicodeDecodeError) as error:
        raise ScheduleError(f"Schedule: the file {path!r} is not JSON: {error}. {_FORM}") from None
    if not isinstance(data, Mapping) or data.get("format") != FORMAT or "orders" not in data:
        raise ScheduleError(
            f"Schedule: the file {path!r} is not a schedule. {_FORM} Received: {shown(data, 200)}"
        )
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        named = ", ".join(
            f"{shown(key, 40)} ({hint})" if (hint := did_you_mean(key, _KEYS)) else shown(key, 40)
            for key in unknown[:MOST_FAULTS]
        )
        more = f" and {len(unknown) - MOST_FAULTS} more" if len(unknown) > MOST_FAULTS else ""
        raise ScheduleError(
            f"Schedule: the file {path!r} has {counted(len(unknown), 'unknown key')}: "
            f"{named}{more}. Expected: {' and '.join(map(repr, _KEYS))} only. Take the others out."
        )
    return data["orders"]


def _orders(made: Any, what: str) -> list[list[Action]]:
    """Returns orders that a user has given as lists of actions."""
    if not _is_list(made) or not all(map(_is_list, made)):
        raise ScheduleError(
            f"Schedule: {what} must be one list of actions for each partition, such as "
            f"[['0F0', '0B0'], ['1F0', '1B0']]; received {shown(made, 200)}."
        )
    faults: list[str] = []
    orders = [
        [_action(item, f"device {device}, position {position}", faults) for position, item in row]
        for device, row in enumerate(map(enumerate, made))
    ]
    if faults:
        count = counted(len(faults), "fault")
        raise ScheduleError("\n".join([f"Schedule: {count} in {what}:", *numbered(faults)]))
    return orders


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _action(item: Any, where: str, faults: list[str]) -> Action:
    if isinstance(item, Action):
        return item
    try:
        if isinstance(item, str):
            return Action.parse(item)
    except ScheduleError:
        pass
    faults.append(
        f"{where}: {shown(item, 60)} is not an action; write segment, kind and microbatch, such as "
        "'2F0'"
    )
    return Action("F", 0, 0)


def _with_weights(
    orders: Iterable[Sequence[Action]], graph: TaskGraph
) -> Iterable[tuple[Action, ...]]:
    """Adds weight gradients that no order has, each after its backward pass."""
    listed = [list(order) for order in orders]
    there = {action for order in listed for action in order}
    for order in listed:
        complete: list[Action] = []
        for action in order:
            complete.append(action)
            weights = action._replace(kind="W")
            if action.kind == "B" and weights in graph.device and weights not in there:
                complete.append(weights)
        yield tuple(complete)
