from __future__ import annotations

from opensmp.api.timeline.gantt import gantt
from opensmp.api.timeline.timeline import Event, StepTimeline
from opensmp.compiler.schedule.actions import Action

DEVICES = ("/device:CPU:0", "/device:CPU:10")


def step(*events: tuple[str, int, float, float]) -> StepTimeline:
    made = tuple(
        Event(0, Action.parse(text), partition, DEVICES[partition], start, end)
        for text, partition, start, end in events
    )
    return StepTimeline(0, "train", DEVICES, made)


def test_actions_are_drawn_to_scale_with_idle_time_as_dots():
    drawn = gantt(
        step(("0F0", 0, 5.0, 6.0), ("1F0", 1, 6.0, 7.0), ("1B0", 1, 7.0, 8.5), ("0B0", 0, 8.5, 10)),
        num_columns=20,
    )
    assert drawn.splitlines() == [
        "CPU:0  |F0--..........B0----|",
        "CPU:10 |....F0--B0----......|",
        "        0          5000.0 ms",
        "train 0: 5000.0 ms, busy 50 %, 50 %, overlap 0 %, bubble 50 %",
    ]


def test_segments_are_named_where_a_device_has_several():
    drawn = gantt(step(("0F0", 0, 0, 1), ("1F0", 1, 1, 2), ("2F0", 0, 2, 3)), num_columns=12)
    assert drawn.splitlines()[:2] == ["CPU:0  |0F0-....2F0-|", "CPU:10 |....1F0-....|"]


def test_an_action_too_short_for_its_name_has_at_least_one_column():
    drawn = gantt(step(("0F0", 0, 0.0, 9.99), ("1F0", 1, 9.99, 10.0)), num_columns=10)
    assert drawn.splitlines()[1] == "CPU:10 |.........F|"


def test_a_step_of_no_length_can_be_drawn():
    assert "0.0 ms" in gantt(step(("0F0", 0, 1.0, 1.0)))
