"""Every case with gradients of weights for several microbatches at once, however many rows.

The rule that joins only where there are few rows would leave out most cases, which are small.
All take an optimizer whose steps are as small as the gradients, see `momentum`; what a step starts
with differs by what the steps before have left, so that only the first one has a narrow bound.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from parity.case import Case, momentum
from parity.cases import CASES
from parity.layout import Layout
from parity.records import compare
from parity.rotation import part_of_today
from parity.runs import reference, run_split

from opensmp.compiler.lowering.matmul_gradients import Product
from opensmp.compiler.lowering.program import Program

NUM_TODAY = 3
# Convolutions and attention, whose factors are sums already, lose a digit more than the dense
# layers of the cases with a bound of their own.
FIRST, LATER = 1e-5, 1e-3


def joining() -> list[tuple[Case, Layout]]:
    """Each layout of more than one partition with the option, and with enough microbatches."""
    pairs = itertools.chain.from_iterable(
        ((case, layout) for layout in case.layouts) for case in CASES if not case.heavy
    )
    return [
        (
            dataclasses.replace(case, optimizer=momentum),
            dataclasses.replace(layout, microbatches=4, optimize="speed"),
        )
        for case, layout in pairs
        if layout.optimize != "speed"
    ]


ALL = list(dict.fromkeys(joining()))


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Product, "is_worth_joining", True)
    monkeypatch.setattr(Program, "is_worth_joining", lambda *_: True)


def check(case: Case, layout: Layout) -> None:
    differences = compare(reference(case, layout.microbatches), run_split(case, layout))
    bounds = {"start": 0.0, "step 1": FIRST}
    beyond = [d for d in differences if not d.relative <= bounds.get(d.key.moment, LATER)]
    assert not beyond, f"{case} {layout}: {len(beyond)} values beyond the bound: {beyond[:10]}"


def named(pairs: list[tuple[Case, Layout]]) -> list[object]:
    return [pytest.param(case, layout, id=f"{case}-{layout}") for case, layout in pairs]


@pytest.mark.parametrize(("case", "layout"), named(part_of_today(ALL, NUM_TODAY)))
def test_todays_cases_give_the_numbers_of_plain_keras(case: Case, layout: Layout) -> None:
    check(case, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "layout"), named(ALL))
def test_every_case_gives_the_numbers_of_plain_keras(case: Case, layout: Layout) -> None:
    check(case, layout)
