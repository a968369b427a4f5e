"""Every argument and callback of Keras: equal numbers in one process, and a row in the docs."""

from __future__ import annotations

import pathlib
import re

import keras
import pytest
from training import uses
from training.fixtures import BY_TWO, classifier
from training.uses import ALONE, LEFT_OUT, NOT_SHARED, USES

import opensmp as smp

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "fit-table.md"
COVERED = frozenset().union(*(use.rows for use in {**USES, **ALONE}.values()))


@pytest.mark.parametrize("name", [*USES, *ALONE])
def test_a_split_model_gives_the_numbers_of_plain_keras(name, smp_init, tmp_path):
    smp_init({**BY_TWO, "microbatches": 3})
    plain = uses.record(name, tmp_path / "plain", plain=True)
    ours = uses.record(name, tmp_path / "ours")
    assert uses.difference(plain, ours) <= {**USES, **ALONE}[name].bound


@pytest.mark.parametrize("row", uses.all_rows())
def test_every_argument_and_callback_is_compared_or_there_is_a_reason(row):
    """One that a later Keras brings needs a use in uses.py that covers it."""
    assert (row in COVERED) != (row in LEFT_OUT)


def test_no_row_is_of_an_argument_that_there_is_not():
    assert {*COVERED, *LEFT_OUT, *NOT_SHARED} <= set(uses.all_rows())


def test_the_page_has_a_row_for_each():
    """`python scripts/fit_table.py` makes it."""
    text = PAGE.read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == [row.split(".")[1] for row in uses.all_rows()]
    for cell in (cell for _, *cells in rows for cell in cells):
        assert re.match(r"equal to plain Keras|refused: |left out |not compared: ", cell), cell


def test_jit_compile_is_left_out_with_a_warning(smp_init):
    smp_init(BY_TWO)
    model = smp.DistributedModel.from_keras(classifier())
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model.compile("sgd", "mse", jit_compile=True)
    assert not model.jit_compile


@pytest.mark.skipif(
    not hasattr(keras.callbacks, "OrbaxCheckpoint"),
    reason="Keras has OrbaxCheckpoint since 3.13",
)
def test_orbax_needs_its_package():
    with pytest.raises(ImportError, match="orbax"):
        keras.callbacks.OrbaxCheckpoint("there")
