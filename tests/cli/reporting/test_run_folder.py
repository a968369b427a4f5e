from __future__ import annotations

import math

import pytest
from cli.reporting.made_runs import NAN, planned, write_run

from opensmp.cli.reporting.run_folder import Steps, _halved, read_runs
from opensmp.errors import SavingError
from opensmp.execution.profiling import run_files


def test_what_ranks_have_written_is_read_in_the_order_of_their_numbers(tmp_path):
    write_run(tmp_path, planned(12), ranks=12)
    (run,) = read_runs(tmp_path)
    assert list(run.ranks) == list(range(12))
    assert run.size == 12
    assert [rank.memory[0].peak_bytes for rank in run.ranks.values()] == [
        2000 + rank for rank in range(12)
    ]
    assert [step.values["loss"] for step in run.first.steps] == [3.0, 2.0, 1.0]
    assert run.first.end is not None
    assert [path.name for path in run.plans] == ["20260101-120000-abcd.plan0.json"]


def test_a_line_that_was_being_written_is_left_out(tmp_path):
    write_run(tmp_path, planned(2), end=None)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + b'{"kind":"steps","count":1,"sec')
    (run,) = read_runs(tmp_path)
    assert run.first.broken == 0
    assert len(run.first.steps) == 3
    assert run.first.end is None


@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        "[]",
        '{"kind": "else"}',
        '{"kind": "steps", "last": -1}',
        '{"kind": "steps", "last": 1, "count": 1, "seconds": NaN, "values": {}}',
        '{"kind": "timeline", "step": 0, "name": "a", "actions": ["x"], "partitions": [0],'
        ' "seconds": [[0, 1]]}',
        '{"kind": "timeline", "step": 0, "name": "a", "actions": ["0F0"], "partitions": [0],'
        ' "seconds": []}',
        '{"kind": "memory", "partitions": [{}]}',
        '{"kind": "end", "time": "now", "error": ""}',
    ],
)
def test_lines_that_are_wrong_are_counted_and_the_rest_is_read(line, tmp_path):
    write_run(tmp_path, planned(2), end=None)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(path.read_text() + line + "\n" + '{"kind":"end","time":1,"error":""}\n')
    (run,) = read_runs(tmp_path)
    assert run.first.broken == 1
    assert run.first.end is not None


def test_values_that_are_not_finite_are_read(tmp_path):
    write_run(tmp_path, planned(2), losses=(1.0, NAN, math.inf))
    (run,) = read_runs(tmp_path)
    first, second, third = (step.values["loss"] for step in run.first.steps)
    assert first == 1.0
    assert math.isnan(second)
    assert third == math.inf


def test_runs_of_one_folder_are_kept_apart_and_sorted_by_time(tmp_path):
    for name in ("20260102-000000-0000", "20260101-000000-ffff"):
        write_run(tmp_path, planned(2), name=name)
    assert [run.name for run in read_runs(tmp_path)] == [
        "20260101-000000-ffff",
        "20260102-000000-0000",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: path.mkdir(), "has no run"),
    ],
)
def test_what_is_no_folder_of_a_run_is_refused_with_what_to_do(make, message, tmp_path):
    folder = tmp_path / "runs"
    make(folder)
    with pytest.raises(SavingError, match=message) as caught:
        read_runs(folder)
    assert "smp.RunReport" in str(caught.value)


def test_a_file_of_another_version_is_no_run(tmp_path):
    path = run_files.rank_file(tmp_path, run_files.new_run(), 0)
    path.write_text('{"kind":"run","format":"opensmp run","version":99}\n')
    with pytest.raises(SavingError, match="of this version"):
        read_runs(tmp_path)


def test_long_runs_are_joined_without_losing_steps_or_odd_values():
    steps = [Steps(i + 1, 1, 0.5, 2, True, {"loss": NAN if i == 4 else 1.0}) for i in range(7)]
    found = _halved(steps)
    assert [step.last for step in found] == [2, 4, 6, 7]
    assert sum(step.num_steps for step in found) == 7
    assert sum(step.seconds for step in found) == 3.5
    assert sum(step.examples for step in found) == 14
    assert [math.isnan(step.values["loss"]) for step in found] == [False, False, True, False]
