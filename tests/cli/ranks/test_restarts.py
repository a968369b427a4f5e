from __future__ import annotations

import pytest
from processes import launch

from opensmp.cli.ranks.process_group import RunResult
from opensmp.cli.ranks.restarts import Restarts, known_layout
from opensmp.distributed.launch.init_markers import Layout

TWO = Layout(2, None)


def ended(code, rank=0, lost=(), signal=None):
    return RunResult(code, rank, signal, 1.0, tuple(lost))


def all_came(size, layout=TWO):
    return dict.fromkeys(range(size), layout)


def test_a_failure_is_tried_again_so_often_and_not_more(capsys):
    restarts = Restarts(2, 4, None, None)
    assert [restarts.again(ended(1), all_came(4)) for _ in range(3)] == [True, True, False]
    assert "restart 1 of 2: all ranks are started again" in capsys.readouterr().err


def test_a_preempted_run_is_started_again():
    assert Restarts(1, 2, None, None).again(ended(143), all_came(2))


@pytest.mark.parametrize(
    "outcome",
    [
        RunResult(0, None, None, 1.0),
        RunResult(143, 0, 15, 1.0),
        RunResult(143, None, 15, 1.0),
        ended(2),
        ended(130),
    ],
    ids=["good end", "signal to the launcher", "and all ended", "wrong usage", "Ctrl-C in a rank"],
)
def test_what_would_end_in_the_same_way_or_was_asked_for_is_not_started_again(outcome):
    assert not Restarts(3, 2, None, None).again(outcome, all_came(2))


@pytest.mark.parametrize(
    ("size", "lost", "layout", "least", "left"),
    [
        (4, (3,), TWO, 2, 2),
        (4, (0, 1), TWO, 2, 2),
        (4, (3,), TWO, 3, None),  # three ranks hold no whole replicas
        (4, (3,), Layout(4, None), 1, 2),  # two partitions in each rank
        (8, (3,), Layout(4, 2), 2, 6),
        (3, (1,), Layout(1, None), 1, 2),
        (2, (0, 1), TWO, 1, None),
        (2, (0,), TWO, 1, 1),
    ],
)
def test_a_run_goes_on_with_as_many_ranks_as_make_up_whole_replicas(
    size, lost, layout, least, left
):
    restarts = Restarts(3, size, least, None)
    assert restarts.again(ended(137, lost[0], lost), all_came(size, layout)) == (left is not None)
    assert restarts.size == (left or size)


def test_without_min_procs_there_are_always_as_many():
    restarts = Restarts(3, 4, None, TWO)
    assert restarts.again(ended(137, 3, (3,)), all_came(4))
    assert restarts.size == 4


def test_a_rank_that_has_not_come_to_init_twice_counts_as_lost():
    restarts = Restarts(5, 4, 2, None)
    came = dict.fromkeys((0, 1, 3), TWO)
    assert restarts.again(ended(1, 2), came)
    assert restarts.size == 4
    assert restarts.again(ended(1, 2), came)
    assert restarts.size == 2


def test_a_rank_that_fails_in_training_again_and_again_is_not_lost():
    restarts = Restarts(5, 4, 2, None)
    assert all(restarts.again(ended(1, 2), all_came(4)) for _ in range(3))
    assert restarts.size == 4


def test_the_layout_of_flags_counts_where_no_rank_has_come():
    restarts = Restarts(5, 4, 1, known_layout({"partitions": 4, "processes_per_replica": 2}))
    assert restarts.again(ended(137, 0, (0,)), {})
    assert restarts.size == 2
    assert known_layout({"microbatches": 2}) is None


DIES = """
import os, signal, sys, time
import opensmp as smp
restart = int(os.environ["OPENSMP_RUN_RESTART"])
smp.init({"partitions": 2})
if restart == 0 and smp.rank() == 3:
    os.kill(os.getpid(), signal.SIGKILL)
print("ranks", smp.allgather(smp.rank()), flush=True)
sys.exit(0)
"""


def test_four_ranks_go_on_as_two_after_one_was_killed():
    result = launch(DIES, ["-n", "4", "--max-restarts", "3", "--min-procs", "2"])
    assert result.code == 0, result.stderr
    assert "rank 3 lost: 2 of 4 ranks are started again" in result.stderr
    assert result.stdout.splitlines()[-1] == "[0] ranks [0, 1]"


def test_min_procs_without_restarts_is_refused():
    result = launch("print()\n", ["-n", "2", "--min-procs", "1"])
    assert result.code != 0
    assert "--max-restarts" in result.stderr


USAGE = """
import argparse
argparse.ArgumentParser().parse_args(["--no-such-flag"])
"""


def test_wrong_usage_is_not_started_again():
    result = launch(USAGE, ["-n", "1", "--max-restarts", "5"])
    assert result.code == 2
    assert "no restart: exit code 2 would come again" in result.stderr
