"""Whole training programs: the numbers of plain Keras, or the refusal that is documented.

A few of them run each day; all of them by

    python -m pytest tests/programs -m "slow or not slow"

In several processes all programs of a run share one start of the ranks.
"""

from __future__ import annotations

import collections
import pathlib
import re
from typing import Any

import pytest
from programs.catalogue import PROGRAMS
from programs.registry import ALONE, RANKS, WORLDS
from programs.running import is_there, judge, run, run_in_processes
from programs.wrap import Wrap
from turns import in_turn

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "programs.md"
ALONE_A_DAY, SHARED_A_DAY = 4, 3
"""How many have their turn each day: together about 60 to 90 seconds of processor time."""
HOUR = 3600


class Case(tuple[str, str]):
    """A program and a world."""

    def __str__(self) -> str:
        return f"{self[0]}, {self[1]}"


def cases(worlds: tuple[str, ...], of: int) -> list[Any]:
    return in_turn([Case((name, world)) for name in PROGRAMS for world in worlds], of)


def alone() -> list[Any]:
    """Each day some programs, in several worlds of one process."""
    of = len(PROGRAMS) * len(ALONE) // ALONE_A_DAY
    return cases(ALONE, of + 1 - of % 2)


def shared() -> list[Any]:
    """Each day some programs, in one world of several processes: starting ranks costs most."""
    of = len(PROGRAMS) * len(RANKS) // SHARED_A_DAY
    return cases(RANKS, of + -of % len(RANKS))


def needed(name: str) -> None:
    if not is_there(PROGRAMS[name]):
        pytest.skip(f"{PROGRAMS[name].needs} is not installed")


@pytest.mark.parametrize("case", alone())
def test_one_process(case, smp_init):
    name, world = case
    needed(name)
    smp_init(PROGRAMS[name].config(world))
    verdict = judge(name, world, [run(PROGRAMS[name], Wrap())])
    assert verdict.right, verdict.words


@pytest.fixture(scope="module")
def in_ranks(request) -> Any:
    """Outcomes by world and name, of all programs that this run of the tests asks for."""
    asked = collections.defaultdict(list)
    for item in request.session.items:
        if item.name.startswith("test_several_processes[") and item.path == request.path:
            name, world = item.callspec.params["case"]
            if is_there(PROGRAMS[name]):
                asked[world].append(name)
    found: dict[str, Any] = {}

    def outcomes(name: str, world: str) -> Any:
        if world not in found:
            found[world] = run_in_processes(world, asked[world], seconds=HOUR)
        return found[world][name]

    return outcomes


@pytest.mark.timeout(3 * HOUR)
@pytest.mark.parametrize("case", shared())
def test_several_processes(case, in_ranks):
    name, world = case
    needed(name)
    verdict = judge(name, world, in_ranks(name, world))
    assert verdict.right, verdict.words


def test_a_part_of_all_has_its_turn():
    of_today = [[case.values[0] for case in all_ if not case.marks] for all_ in (alone(), shared())]
    assert len(of_today[0]) in (ALONE_A_DAY - 1, ALONE_A_DAY, ALONE_A_DAY + 1)
    assert len(of_today[1]) in (SHARED_A_DAY - 1, SHARED_A_DAY, SHARED_A_DAY + 1)
    assert len({world for _, world in of_today[1]}) == 1


def test_there_are_enough_of_each_face():
    faces = collections.Counter(program.face for program in PROGRAMS.values())
    assert sum(faces.values()) >= 60
    assert min(faces.values()) >= 20


def test_refusals_are_of_worlds_that_there_are():
    for program in PROGRAMS.values():
        assert set(program.refused) <= set(WORLDS)


def test_the_page_has_a_row_for_each():
    """`python scripts/programs_table.py` makes it."""
    rows = re.findall(r"^\| (.+) \| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", PAGE.read_text(), re.M)
    assert [name for _, name, *_ in rows] == list(PROGRAMS)
    for title, name, *_ in rows:
        assert title == PROGRAMS[name].title


def test_what_differs_has_a_reason():
    for program in PROGRAMS.values():
        assert program.why or not (program.microbatches or program.bound > 1e-6), program.name
