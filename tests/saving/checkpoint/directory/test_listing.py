from __future__ import annotations

from opensmp.saving.checkpoint.directory.listing import listing
from opensmp.saving.checkpoint.directory.manifest import History
from opensmp.saving.checkpoint.directory.state_file import State


def look(state, present, histories=None, name="ckpt", began=100.0):
    histories = histories or {}
    return listing(name, state, present, histories.get, began)


def history(time, after=None, last_preserved=0.0, preserved=False):
    return History(time, after, last_preserved, preserved)


STATE = State(("ckpt-2", "ckpt-10"), (20.0, 30.0), 5.0)


def test_the_state_file_says_which_are_in_use():
    found = look(STATE, {1, 2, 10})
    assert found.active == ((2, 20.0), (10, 30.0))
    assert found.order == (10, 2, 1)  # 1 may be restored if all else fails
    assert found.last_preserved == 5.0


def test_what_is_not_there_is_not_in_use_but_is_looked_for():
    found = look(STATE, {2})
    assert found.active == ((2, 20.0),)
    assert found.order == (10, 2)


def test_what_was_preserved_or_has_no_time_is_not_in_use():
    assert look(STATE._replace(last_preserved=20.0), {2, 10}).active == ((10, 30.0),)
    found = look(STATE._replace(times=()), {2, 10}, {2: history(7.0)})
    assert found.active == ((2, 7.0),)
    assert found.newest == 10


def test_the_one_that_was_completed_before_a_kill_is_the_newest():
    histories = {
        1: history(10.0),
        5: history(40.0, "ckpt-10"),
        7: history(40.0, "ckpt-10", preserved=True),
        11: history(40.0, "ckpt-9"),
    }
    found = look(STATE, {1, 2, 5, 7, 10, 11}, histories)
    assert found.active == ((2, 20.0), (10, 30.0), (5, 40.0))
    assert found.order == (5, 10, 2, 11, 7, 1)


def test_numbers_grow_in_checkpoints_of_earlier_versions():
    found = look(STATE, {1, 2, 10, 11}, {1: history(1.0, ""), 11: history(40.0, "")})
    assert [number for number, _ in found.active] == [2, 10, 11]


def test_without_a_state_file_those_with_a_manifest_are_in_use():
    histories = {9: history(9.0, None, 3.0), 10: history(10.0, "ckpt-9", 4.0)}
    for state in (None, State(("best-7",), (1.0,), 0.0), State(("ckpt-2.index",), (1.0,), 0.0)):
        found = look(state, {9, 10, 3}, histories)
        assert found.active == ((9, 9.0), (10, 10.0))
        assert found.order == (10, 9, 3)
        assert found.last_preserved == 4.0
    histories[3] = history(6.0, preserved=True)
    found = look(None, {9, 10, 3}, histories)
    assert found.active == ((9, 9.0), (10, 10.0))
    assert found.last_preserved == 6.0


def test_hours_count_from_the_beginning_if_nothing_else_is_known():
    assert look(None, set()).last_preserved == 100.0
    assert look(None, {1}, {1: history(50.0, "")}).last_preserved == 49.0
    assert look(None, set()).newest is None
