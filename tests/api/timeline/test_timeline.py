from __future__ import annotations

import json

import pytest

from opensmp.api.timeline.timeline import Event, StepTimeline, Timeline
from opensmp.compiler.schedule.actions import Action
from opensmp.errors import StepError

DEVICES = ("/device:CPU:0", "/device:CPU:1")


def event(text: str, partition: int, start: float, end: float, step: int = 0) -> Event:
    return Event(step, Action.parse(text), partition, DEVICES[partition], start, end)


def pipeline(step: int = 0, origin: float = 0.0) -> StepTimeline:
    """Two microbatches over ten seconds: busy 0-3, 7-10 and 1-8, two at a time in 1-3, 7-8."""
    events = [
        event("0F0", 0, origin + 0, origin + 1, step),
        event("0F1", 0, origin + 1, origin + 3, step),
        event("1F0", 1, origin + 1, origin + 4, step),
        event("1B0", 1, origin + 4, origin + 8, step),
        event("0B0", 0, origin + 7, origin + 10, step),
    ]
    return StepTimeline(step, "forward_backward", DEVICES, tuple(events))


class TestStepTimeline:
    def test_makespan_is_from_the_first_start_to_the_last_end(self):
        step = pipeline(origin=100.0)
        assert (step.start_seconds, step.end_seconds, step.makespan_seconds) == (100.0, 110.0, 10.0)

    def test_busy_fraction_is_per_device(self):
        assert pipeline().busy_fraction == {"/device:CPU:0": 0.6, "/device:CPU:1": 0.7}

    def test_overlap_is_the_share_in_which_two_devices_work(self):
        assert pipeline().overlap == 0.3

    def test_bubble_is_the_idle_share_of_all_devices(self):
        assert pipeline().bubble == pytest.approx(0.35)

    def test_a_device_without_events_is_idle(self):
        step = StepTimeline(0, "step", DEVICES, (event("0F0", 0, 0.0, 2.0),))
        assert step.busy_fraction == {"/device:CPU:0": 1.0, "/device:CPU:1": 0.0}
        assert (step.bubble, step.overlap) == (0.5, 0.0)

    def test_touching_events_do_not_overlap(self):
        step = StepTimeline(
            0, "step", DEVICES, (event("0F0", 0, 0.0, 1.0), event("1F0", 1, 1.0, 2.0))
        )
        assert step.overlap == 0.0


class TestTimeline:
    def test_an_empty_one_says_so(self):
        timeline = Timeline()
        assert (timeline.steps, timeline.events, len(timeline)) == ((), (), 0)
        assert (timeline.overlap, timeline.bubble, timeline.busy_fraction) == (0.0, 0.0, {})
        assert str(timeline) == "Timeline: nothing was measured"

    def test_steps_and_events_are_in_order(self):
        timeline = Timeline([pipeline(0), pipeline(1, origin=20.0)])
        assert [step.index for step in timeline.steps] == [0, 1]
        assert [e.step for e in timeline.events] == [0] * 5 + [1] * 5
        assert repr(timeline) == "Timeline(2 steps, 10 events)"

    def test_time_between_steps_counts_for_nothing(self):
        once, twice = Timeline([pipeline()]), Timeline([pipeline(), pipeline(1, origin=500.0)])
        assert twice.overlap == once.overlap
        assert twice.bubble == once.bubble
        assert twice.busy_fraction == once.busy_fraction

    def test_string_draws_the_last_step(self):
        timeline = Timeline([pipeline(), pipeline(1, origin=20.0)])
        assert str(timeline).startswith(str(pipeline(1, origin=20.0)))
        assert str(timeline).endswith("the last of 2 steps")


class TestChromeTrace:
    @pytest.fixture
    def trace(self, tmp_path):
        path = tmp_path / "timeline.json"
        Timeline([pipeline(), pipeline(1, origin=20.0)]).to_chrome_trace(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def test_rows_are_named_after_partitions_and_devices(self, trace):
        names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
        assert names == {
            0: "steps",
            1: "partition 0 (/device:CPU:0)",
            2: "partition 1 (/device:CPU:1)",
        }

    def test_times_are_microseconds(self, trace):
        (backward,) = [
            e for e in trace["traceEvents"] if e["name"] == "0B0" and e["args"]["step"] == 1
        ]
        assert (backward["ph"], backward["tid"], backward["cat"]) == ("X", 1, "backward")
        assert (backward["ts"], backward["dur"]) == (27e6, 3e6)
        assert backward["args"] == {
            "step": 1,
            "kind": "B",
            "segment": 0,
            "microbatch": 0,
            "call": 0,
        }

    def test_each_step_has_a_slice_around_its_events(self, trace):
        steps = [e for e in trace["traceEvents"] if e.get("cat") == "step"]
        assert [(e["name"], e["ts"], e["dur"]) for e in steps] == [
            ("forward_backward 0", 0.0, 10e6),
            ("forward_backward 1", 20e6, 10e6),
        ]


class TestPlot:
    """The picture of a measured step."""

    def test_every_action_is_a_bar_in_the_row_of_its_partition(self):
        [axes] = pipeline(origin=100.0).plot().axes
        bars = [
            (
                round(path.get_extents().x0),
                round(path.get_extents().x1),
                round(path.vertices[:, 1].mean()),
            )
            for collection in axes.collections
            for path in collection.get_paths()
        ]
        assert sorted(bars) == [(0, 1, 0), (1, 3, 0), (1, 4, 1), (4, 8, 1), (7, 10, 0)]
        assert "bubble 35 %" in axes.get_title(loc="left")

    def test_the_last_step_is_written_to_a_file(self, tmp_path):
        timeline = Timeline([pipeline(0), pipeline(1, origin=20.0)])
        figure = timeline.plot(tmp_path / "t.svg")
        assert "Step 1 of" in figure.axes[0].get_title(loc="left")
        assert "<svg" in (tmp_path / "t.svg").read_text()
        assert figure._repr_png_().startswith(b"\x89PNG")

    def test_many_partitions_and_kinds_of_actions_are_drawn(self):
        devices = tuple(f"/device:CPU:{p}" for p in range(12))
        events = tuple(
            Event(0, Action(kind, p, 11), p, devices[p], p + k, p + k + 0.5)
            for p in range(12)
            for k, kind in enumerate("FRBW")
        )
        [axes] = StepTimeline(0, "step", devices, events).plot().axes
        assert {text.get_text() for text in axes.texts} == {"11", "R11", "W11"}

    def test_nothing_to_draw_is_refused(self):
        with pytest.raises(StepError, match=r"nothing was measured.*Run a step inside"):
            Timeline().plot()
        with pytest.raises(StepError, match="no actions on this process"):
            StepTimeline(0, "step", ("", ""), ()).plot()
