from __future__ import annotations

import pytest
import tensorflow as tf

from opensmp.compiler.schedule.actions import Action, Schedule
from opensmp.execution.emission.task_graph import (
    Task,
    add_schedule_edges,
    live_operations,
    task_graph,
)


@pytest.fixture
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def task(text: str, partition: int, *needs: tf.Operation) -> Task:
    """A task that is one operation, after others."""
    with tf.control_dependencies(needs):
        op = tf.no_op(name=f"task_{text}")
    return Task(Action.parse(text), partition, first=op, last=op)


def actions(*texts: str) -> frozenset[Action]:
    return frozenset(map(Action.parse, texts))


def test_dependencies_are_read_off_the_graph_through_what_lies_between(graph):
    first = task("0F0", 0)
    with tf.control_dependencies([first.last]):
        between = tf.identity(tf.constant(1.0)) * 2.0
    second = task("1F0", 1, between.op)
    third = task("2F0", 0, second.last, first.last)
    tasks = task_graph([first, second, third], live_operations([third.last]), 2)
    assert tasks.needs[Action.parse("0F0")] == frozenset()
    assert tasks.needs[Action.parse("1F0")] == actions("0F0")
    assert tasks.needs[Action.parse("2F0")] == actions("0F0", "1F0")
    assert tasks.device == {first.action: 0, second.action: 1, third.action: 0}
    assert tasks.num_devices == 2


def test_a_task_that_nothing_needs_is_left_out(graph):
    needed, idle = task("0F0", 0), task("1F0", 1)
    tasks = task_graph([needed, idle], live_operations([needed.last]), 2)
    assert set(tasks.device) == {needed.action}


def test_a_task_of_two_operations_counts_from_its_last(graph):
    first = tf.no_op()
    with tf.control_dependencies([first]):
        last = tf.no_op()
    long = Task(Action.parse("0F0"), 0, first=first, last=last)
    after = task("1F0", 1, last)
    tasks = task_graph([long, after], live_operations([after.last]), 2)
    assert tasks.needs[after.action] == actions("0F0")


def test_live_operations_are_in_topological_order(graph):
    a = tf.constant(1.0)
    b = a + 1.0
    with tf.control_dependencies([b.op]):
        c = tf.constant(2.0)
    tf.constant(3.0)  # nobody needs it
    live = live_operations([c.op])
    assert [op for op in live if op in (a.op, b.op, c.op)] == [a.op, b.op, c.op]
    assert len(live) == 4


def test_a_schedule_becomes_control_edges_on_each_device(graph):
    tasks = {t.action: t for t in (task("0F0", 0), task("0F1", 0), task("1F0", 1), task("1F1", 1))}
    orders = tuple(tuple(map(Action.parse, row)) for row in (["0F0", "0F1"], ["1F1", "1F0"]))
    assert add_schedule_edges(Schedule("by hand", orders), tasks) == 2
    before = {a.text: [c.name for c in t.first.control_inputs] for a, t in tasks.items()}
    assert before == {"0F0": [], "0F1": ["task_0F0"], "1F0": ["task_1F1"], "1F1": []}


def test_releases_become_control_edges_between_devices(graph):
    tasks = {t.action: t for t in (task("0F0", 0), task("0F1", 0), task("1F0", 1))}
    schedule = Schedule(
        "by hand",
        ((Action.parse("0F0"), Action.parse("0F1")), (Action.parse("1F0"),)),
        releases=((Action.parse("1F0"), Action.parse("0F1")),),
    )
    assert add_schedule_edges(schedule, tasks) == 2
    held_back = tasks[Action.parse("0F1")].first.control_inputs
    assert {op.name for op in held_back} == {"task_0F0", "task_1F0"}


def test_predicted_times_of_segments_are_those_of_their_passes(graph):
    forward, backward = task("0F0", 0), task("0B0", 0)
    whole, half, rest = task("1F0", 1), task("1B0", 1), task("1W0", 1)
    listed = [forward, backward, whole, half, rest]
    live = live_operations([each.last for each in listed])
    times = {0: (5.0, 7.0), 1: (2.0, 6.0)}
    seconds = task_graph(listed, live, 2, times).seconds
    assert [seconds[each.action] for each in listed] == [5.0, 7.0, 2.0, 3.0, 3.0]
    relative = task_graph(listed, live, 2).seconds
    assert task_graph(listed, live, 2, {0: (5.0, 7.0)}).seconds == relative
    assert task_graph(listed, live, 2, {**times, 1: None}).seconds == relative


def test_joint_pass_takes_the_predicted_time_of_its_microbatches(graph):
    with tf.control_dependencies([]):
        op = tf.no_op()
    joint = Task(Action.parse("1W2"), 0, first=op, last=op, microbatches=(0, 1, 2))
    backward = task("1B2", 0)
    tasks = task_graph([joint, backward], live_operations([op, backward.last]), 1, {1: (2.0, 6.0)})
    assert tasks.seconds[joint.action] == 9.0
