from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opensmp.compiler.schedule.actions import Action, TaskGraph
from opensmp.compiler.schedule.own_schedule import check_file, save
from opensmp.compiler.schedule.pipelines import build
from opensmp.errors import ScheduleError
from schedules import v_chain


def forward_then_backward(graph: TaskGraph) -> list[list[str]]:
    """GPipe with backward passes from the newest microbatch on, as texts."""
    microbatches = graph.microbatches
    segments = sorted({a.segment for a in graph.device})
    orders = []
    for device in range(graph.num_devices):
        own = [s for s in segments if graph.device[Action("F", s, 0)] == device]
        order = [f"{s}F{m}" for s in own for m in microbatches]
        if any(a.kind == "B" for a in graph.device):
            order += [f"{s}B{m}" for s in reversed(own) for m in reversed(microbatches)]
        orders.append(order)
    return orders


@pytest.mark.parametrize("partitions", [1, 2, 5])
@pytest.mark.parametrize("microbatches", [1, 4, 12])
def test_function_orders_the_tasks(partitions: int, microbatches: int) -> None:
    graph = TaskGraph.chain(partitions, microbatches)
    schedule = build(forward_then_backward, graph)
    assert schedule.name.endswith("test_own_schedule.forward_then_backward")
    assert [[str(a) for a in order] for order in schedule.orders] == forward_then_backward(graph)


def test_weight_gradients_that_are_not_named_follow_their_backward_pass() -> None:
    graph = TaskGraph.chain(2, 12, split_backward=True)
    order = build(forward_then_backward, graph).orders[1]
    assert order[-3:] == (Action("W", 1, 1), Action("B", 1, 0), Action("W", 1, 0))


def test_function_may_return_actions_or_a_schedule() -> None:
    graph = TaskGraph.chain(2, 3, split_backward=True)
    made = build("zero_bubble", graph, 3)
    assert build(lambda graph: made.orders, graph).orders == made.orders
    assert build(lambda graph: made, graph).orders == made.orders


def test_object_that_can_be_called_has_the_name_of_its_class() -> None:
    class Mine:
        def __call__(self, graph: TaskGraph) -> Any:
            return build("simple", graph)

    assert build(Mine(), TaskGraph.chain(2, 2)).name.endswith("Mine")


@pytest.mark.parametrize("name", ["zero_bubble", "zb_v", "auto"])
def test_saved_file_gives_the_same_orders(name: str, tmp_path: Path) -> None:
    graph = v_chain(2, 11)
    made = build(name, graph)
    path = str(tmp_path / "mine.json")
    save(made, path)
    read = build(path, graph)
    assert read.orders == made.orders
    assert read.name == path


def test_file_serves_an_evaluation_and_a_single_call_too(tmp_path: Path) -> None:
    path = str(tmp_path / "mine.json")
    save(build("interleaved", TaskGraph.chain(2, 4), 2), path)
    forward = TaskGraph.chain(2, 4, backward=False)
    assert [str(a) for a in build(path, forward).orders[1]] == ["1F0", "1F1", "1F2", "1F3"]
    alone = TaskGraph.chain(2, 1, backward=False)
    assert [str(a) for a in build(path, alone).orders[0]] == ["0F0"]


def test_orders_that_do_not_fit_are_refused_with_all_faults(tmp_path: Path) -> None:
    graph = TaskGraph.chain(2, 1)
    with pytest.raises(ScheduleError) as error:
        build(lambda graph: [["0B0", "0F0", "7F0"], ["1F0", "1F0"]], graph)
    text = str(error.value)
    assert "4 faults" in text
    assert "missing: 1B0 is in no order" in text
    assert "unknown: 7F0 is not in the task graph; take it out." in text
    assert "doubled: 1F0" in text
    assert "order: device 0 runs 0B0 before 0F0" in text


def test_orders_that_wait_for_each_other_are_refused() -> None:
    orders = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
    with pytest.raises(ScheduleError, match="deadlock: device 0 waits at 0B0 for 1B0"):
        build(lambda graph: orders, TaskGraph.chain(2, 2))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, "must be one list of actions for each partition"),
        ("0F0", "must be one list of actions for each partition"),
        ([1, 2], "must be one list of actions for each partition"),
        ([["0F0", "F0", 3], ["1X0"]], "3 faults"),
        ([["0F0", "F0", 3], ["1X0"]], "device 0, position 1: 'F0' is not an action"),
        ([["0F0", "F0", 3], ["1X0"]], "device 1, position 0: '1X0' is not an action"),
    ],
)
def test_what_is_no_orders_is_refused(made: Any, words: str) -> None:
    with pytest.raises(ScheduleError) as error:
        build(lambda graph: made, TaskGraph.chain(2, 1))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is not a schedule. Expected: {"),
        (b'{"format": "opensmp plan", "orders": []}', "is not a schedule"),
        (
            b'{"format": "opensmp schedule", "orders": [], "order": 1, "x": 2}',
            "2 unknown keys: 'order' (did you mean 'orders'?), 'x'. Expected: 'format' and",
        ),
        (b'{"format": "opensmp schedule"}', "is not a schedule"),
        (b'{"format": "opensmp schedule", "orders": {}}', "one list of actions for each"),
        (b'{"format": "opensmp schedule", "orders": []}', "there are 0 orders for 2 devices"),
    ],
)
def test_faulty_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ScheduleError) as error:
        build(str(path), TaskGraph.chain(2, 1))
    assert words in str(error.value)


def test_missing_file_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"'no\.json' of the key pipeline cannot be read: No"):
        build("no.json", TaskGraph.chain(2, 1))


@pytest.mark.parametrize(
    ("rows", "title"), [([["x"]], "1 fault in what"), ([["x"] * 60], "60 faults in what")]
)
def test_faults_of_orders_are_counted_and_only_some_are_listed(rows: Any, title: str) -> None:
    with pytest.raises(ScheduleError) as error:
        build(lambda graph: rows, TaskGraph.chain(1, 1))
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"Schedule: {title} the function ")
    assert len(lines) <= 52
    assert lines[-1] == "  and 10 more." or len(rows[0]) == 1


def test_a_long_list_of_faults_ends_with_their_number() -> None:
    with pytest.raises(ScheduleError) as error:
        build(lambda graph: [[], []], TaskGraph.chain(2, 100))
    lines = str(error.value).splitlines()
    assert "; 400 faults:" in lines[0]
    assert len(lines) == 52
    assert lines[-1] == "- and 350 more."


def test_an_error_of_a_function_names_it_and_keeps_its_cause() -> None:
    def broken(graph: TaskGraph) -> Any:
        return {}["no"]

    with pytest.raises(ScheduleError, match=r"the function \S+broken.*failed.*KeyError: 'no'") as e:
        build(broken, TaskGraph.chain(2, 3))
    assert isinstance(e.value.__cause__, KeyError)
    assert "12 actions on 2 devices" in str(e.value)
    with pytest.raises(ScheduleError, match="takes a task graph and returns one order"):
        build(list, TaskGraph.chain(1, 1))  # type: ignore[misc]


def test_a_file_is_checked_before_there_are_tasks(tmp_path: Path) -> None:
    path = str(tmp_path / "mine.json")
    save(build("simple", TaskGraph.chain(12, 2)), path)
    check_file(path, 12)
    check_file("simple", 3)
    check_file(forward_then_backward, 3)
    with pytest.raises(ScheduleError, match=r"has 12 orders, but partitions is 2\..*to 12"):
        check_file(path, 2)
    with pytest.raises(ScheduleError, match="cannot be read"):
        check_file("no.json", 2)


def test_more_in_flight_than_allowed_is_refused() -> None:
    graph = TaskGraph.chain(2, 4)
    assert build(forward_then_backward, graph, 4).orders
    with pytest.raises(ScheduleError, match="4 microbatches in flight at once, but active_micro"):
        build(forward_then_backward, graph, 3)


def test_file_is_json_that_people_can_edit(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    save(build("simple", TaskGraph.chain(2, 1)), path)
    assert json.loads(path.read_text()) == {
        "format": "opensmp schedule",
        "orders": [["0F0", "0B0"], ["1F0", "1B0"]],
    }


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "folder.json"
    path.mkdir()
    with pytest.raises(ScheduleError, match="is no regular file of at most"):
        build(str(path), TaskGraph.chain(2, 1))
