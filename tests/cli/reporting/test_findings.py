from __future__ import annotations

import dataclasses
import re

import pytest
from cli.reporting.made_runs import BEGIN, NAN, planned, write_run

from opensmp.cli.reporting.findings import Findings
from opensmp.cli.reporting.run_folder import read_runs
from opensmp.compiler.plan.plan import Plan


def findings(folder, now=BEGIN + 1000):
    run = read_runs(folder)[-1]
    return Findings(run, {"net": Plan.load(run.plans[0])}, now)


def words(found):
    return " ".join(sentence.text for sentence in found.verdict)


def test_measured_bubble_is_that_of_the_actions(tmp_path):
    plan = planned(4)
    write_run(tmp_path, plan, slow=3)
    found = findings(tmp_path)
    assert found.step.bubble == pytest.approx(found.predicted[1].bubble)
    assert found.step.makespan_seconds == pytest.approx(
        3 * found.predicted[1].makespan_seconds, rel=1e-6
    )


def test_verdict_says_what_the_simulator_says_of_more_microbatches(tmp_path):
    write_run(tmp_path, planned(4))
    found = findings(tmp_path)
    timed, why = found.timed_plan
    assert why == ""
    now = timed.simulate()
    more = timed.simulate(microbatches=8)
    text = words(found)
    assert f"{100 * now.bubble:.0f} % simulated with the measured times" in text
    assert f"8 microbatches would give {100 * more.bubble:.0f} %" in text
    assert more.bubble < now.bubble


def test_other_plans_give_other_numbers(tmp_path):
    verdicts = set()
    for partitions in (2, 4, 8):
        folder = tmp_path / str(partitions)
        write_run(folder, planned(partitions))
        verdicts.add(re.search(r"Bubble.*?\.", words(findings(folder)))[0])
    assert len(verdicts) == 3


def test_predicted_times_are_used_where_no_step_was_measured(tmp_path):
    write_run(tmp_path, planned(2))
    (path,) = tmp_path.glob("*.jsonl")
    lines = [line for line in path.read_text().splitlines() if '"timeline"' not in line]
    path.write_text("\n".join(lines) + "\n")
    found = findings(tmp_path)
    assert found.step is None
    assert "simulated with the predicted times" in words(found)
    assert "measured" not in words(found)


def test_loss_that_is_not_finite_is_named_with_its_step(tmp_path):
    write_run(tmp_path, planned(2), losses=(2.0, 1.0, NAN, NAN))
    found = findings(tmp_path)
    assert "'loss' is NaN, first at step 3" in words(found)
    assert "fell" not in words(found)


@pytest.mark.parametrize(
    ("end", "now", "state", "level"),
    [
        ("", 1000, "finished", None),
        ("ValueError: no", 1000, "ended with an error", "bad"),
        (None, 1000, "stopped without an end: killed, or stuck", "bad"),
        (None, 5, "running", "note"),
    ],
)
def test_how_a_run_ended(end, now, state, level, tmp_path):
    write_run(tmp_path, planned(2), end=end)
    found = findings(tmp_path, BEGIN + now)
    assert found.state == state
    ends = [s.level for s in found.verdict if "run ended" in s.text or "has not ended" in s.text]
    assert ends == ([] if level is None else [level])


def test_ranks_that_wrote_nothing_are_counted(tmp_path):
    write_run(tmp_path, planned(4), ranks=4, skip=(2,))
    assert "1 rank of 4 wrote nothing" in words(findings(tmp_path))


def test_uneven_partitions_are_told_with_what_another_cut_would_give(tmp_path):
    from compiler.plan.hand_made import chain, plan_of

    plan = plan_of(chain(8), [0, 0, 0, 0, 0, 0, 1, 1], 2)
    write_run(tmp_path, plan)
    text = words(findings(tmp_path))
    assert "Partition 0 has 1.50 x the mean work" in text
    assert '"optimize": "speed"' in text


def test_a_pass_that_was_interrupted_once_is_no_work(tmp_path):
    write_run(tmp_path, planned(4))
    found = findings(tmp_path)
    step = found.step
    row, last = step.rows[1], max(e.end for e in step.events)
    first = next(e for e in step.events if e.row == row and e.action.kind == "B")
    events = tuple(e._replace(end=e.end + last) if e is first else e for e in step.events)
    disturbed = dataclasses.replace(step, events=events)
    assert disturbed.busy_seconds(row) > step.busy_seconds(row) + 0.9 * last
    assert disturbed.work_seconds(row) == pytest.approx(step.work_seconds(row))
    assert step.work_seconds(row) == pytest.approx(step.busy_seconds(row))


def test_time_of_a_step_leaves_out_those_that_were_traced(tmp_path):
    write_run(tmp_path, planned(2))
    (path,) = tmp_path.glob("*.jsonl")
    text = path.read_text().replace(
        '"seconds":0.5,"examples":64,"warm":false', '"seconds":99,"examples":64,"warm":false'
    )
    path.write_text(text)
    found = findings(tmp_path)
    assert found.step_seconds == 0.5
    assert found.examples_per_second == 128


def test_one_partition_has_no_pipeline(tmp_path):
    write_run(tmp_path, planned(1))
    assert "one partition" in words(findings(tmp_path))


def test_handover_is_the_time_between_a_result_and_its_reader(tmp_path):
    plan = planned(2)
    write_run(tmp_path, plan)
    found = findings(tmp_path)
    waits = found.handover
    # The plan's machine takes 0.5 s and 1 s for the 100 bytes, for each tensor that is waited for.
    assert max(waits.values()) > 0
    assert all(seconds <= 4 * 2 * 1.5 + 1e-3 for seconds in waits.values())
