"""Runs saved under one set-up and restored under another: equal bits, and equal numbers after."""

from __future__ import annotations

import contextlib
import pathlib
import pickle

import numpy as np
import pytest
from processes import check_ranks
from saving.checkpoint.moves import Run, same
from turns import in_turn

SCRIPT = str(pathlib.Path(__file__).with_name("moves.py"))
PARTITIONS = (1, 2, 4)


def test_any_number_of_partitions_goes_on_from_any_other(smp_init, tmp_path):
    values, losses = {}, {}
    for partitions in PARTITIONS:
        smp_init({"partitions": partitions, "microbatches": 2})
        run = Run(partitions, tmp_path / str(partitions))
        run.train()
        run.train()
        run.manager.save()
        values[partitions] = run.values()
        losses[partitions] = [run.train(), run.train()]
    assert len({tuple(found) for found in losses.values()}) == 3  # other seeds, other numbers
    for partitions in PARTITIONS:
        smp_init({"partitions": partitions, "microbatches": 2})
        run = Run(9, tmp_path)  # the first time before the first step, then on a running model
        for saved in PARTITIONS:
            run.manager.restore(tmp_path / str(saved))
            run.build()
            same(run.values(), values[saved])
            np.testing.assert_allclose([run.train(), run.train()], losses[saved], rtol=1e-6)


def replicas_differ(how):
    if how != "hybrid":
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match=r"written by 2 replicas of the model, and here are 1\.")


def of_ranks(folder, how, size):
    return [pickle.loads((folder / f"{how}-{rank}.pickle").read_bytes()) for rank in range(size)]


SIZES = {"two": 2, "hybrid": 4, "v": 2}


@pytest.mark.parametrize("how", in_turn(SIZES, len(SIZES)))
def test_several_processes_and_one_go_on_from_each_other(smp_init, tmp_path, how):
    size = SIZES[how]
    smp_init({"partitions": 4, "microbatches": 2})
    run = Run(1, tmp_path / "one")
    run.train()
    run.train()
    run.manager.save()
    values = run.values()
    losses = [run.train(), run.train()]
    check_ranks(SCRIPT, size, args=[tmp_path, how])
    records = of_ranks(tmp_path, how, size)
    for record in records:
        same(record["restored"], values)
    merged = {k: v for record in records for k, v in record["restored"].items()}
    assert merged.keys() == values.keys()
    if size == 2:
        np.testing.assert_allclose(records[0]["losses of one"], losses, rtol=1e-5)
    for partitions in (1, 4):
        smp_init({"partitions": partitions, "microbatches": 2})
        run = Run(9, tmp_path / how)
        with replicas_differ(how):
            run.manager.restore(tmp_path / how / "ckpt-1")
        run.build()
        for record in records:
            same(run.values(), record["saved"])
        if size == 2:
            np.testing.assert_allclose([run.train(), run.train()], records[0]["losses"], rtol=1e-5)
