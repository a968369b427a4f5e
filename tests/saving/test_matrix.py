"""Saved under each set-up, loaded under each, in each format: one day a part, `-m slow` all.

`scripts/saving_table.py` writes the results into docs/saving.md.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest
from processes import check_ranks
from saving import matrix
from turns import day, turn

SCRIPT = str(pathlib.Path(matrix.__file__))
CELLS = [(setup, ending) for setup in matrix.SETUPS for ending in matrix.FORMATS]
# Where to put the results for the table.
RECORD = os.environ.get("SAVING_TABLE_RECORD")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


def saved(setup, folder, smp_init):
    """Makes sure that the files of a set-up are there."""
    if (folder / f"{setup}.expected.npz").exists():
        return
    if setup in matrix.PROCESSES:
        check_ranks(SCRIPT, matrix.PROCESSES[setup], args=["save", folder, setup], environ=_BUSY)
        return
    if setup in matrix.PARTITIONS:
        smp_init(matrix.config_of(setup))
    matrix.save_all(setup, folder)


# One thread each, as in this process: sums come out the same.
_BUSY = {"TF_NUM_INTRAOP_THREADS": "1"}


def check(results):
    if RECORD:
        with open(RECORD, "a") as file:
            file.writelines(f"{json.dumps(result)}\n" for result in results)
    bad = [result for result in results if result["faults"]]
    assert not bad, "\n".join(f"{r['name']} under {r['setup']}: {r['faults']}" for r in bad)


def load_here(source, ending, folder, smp_init):
    saved(source, folder, smp_init)
    results = []
    for setup in matrix.HERE:
        if setup in matrix.PARTITIONS:
            smp_init(matrix.config_of(setup))
        else:
            from opensmp.api import init

            init.shutdown()
        results.append(matrix.load_one(setup, folder, f"{source}{ending}"))
    check(results)


def today(cells, count):
    """A part of a list that is another one each day."""
    begin = day() // 2 * count
    return [cells[(begin + i) % len(cells)] for i in range(count)]


IN_PROCESS = [cell for cell in CELLS if cell[0] in matrix.HERE]


@turn(0, of=2)
@pytest.mark.parametrize(("source", "ending"), today(IN_PROCESS, 1))
def test_today_what_is_saved_loads_everywhere(source, ending, folder, smp_init):
    load_here(source, ending, folder, smp_init)


@turn(1, of=2)
@pytest.mark.parametrize("setup", today(sorted(matrix.PROCESSES), 1))
def test_today_processes_of_their_own_save_and_load(setup, folder, smp_init):
    saved(setup, folder, smp_init)
    (source,) = today(matrix.HERE, 1)
    saved(source, folder, smp_init)
    formats = today(list(matrix.FORMATS), 2)
    names = [f"{each}{ending}" for each in (setup, source) for ending in formats]
    check_ranks(SCRIPT, matrix.PROCESSES[setup], args=["load", folder, setup, *names])
    check(json.loads((folder / f"{setup}.results.json").read_text()))
    load_here(setup, formats[0], folder, smp_init)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "ending"), CELLS)
def test_what_is_saved_loads_everywhere(source, ending, folder, smp_init):
    load_here(source, ending, folder, smp_init)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "setup"),
    [
        pytest.param(source, setup, id=f"{source}-in-{setup}")
        for source in matrix.SETUPS
        for setup in sorted(matrix.PROCESSES)
    ],
)
def test_it_loads_in_processes_of_their_own(source, setup, folder, smp_init):
    saved(source, folder, smp_init)
    names = [f"{source}{ending}" for ending in matrix.FORMATS]
    check_ranks(
        SCRIPT,
        matrix.PROCESSES[setup],
        args=["load", folder, setup, *names],
        environ=_BUSY,
    )
    check(json.loads((folder / f"{setup}.results.json").read_text()))
