"""Cases of the suite, spread over several processes, against plain Keras in this one.

All cases of a number of processes run one after the other in the same processes, for it
takes some seconds to start them; a part of the cases every day, all of them with
PARITY_PROCESSES=all. With three and four processes everything runs exactly, see
`exact`: then the bits are equal but where partitions add their own contributions first.
"""

from __future__ import annotations

import os
import pathlib
import pickle
from typing import Any, NamedTuple

import pytest
from parity.bounds import (
    BIT_EQUAL,
    JOINED,
    JOINED_DOUBLE,
    REASSOCIATED,
    SEVERAL_USES,
    SEVERAL_USES_DOUBLE,
    Bound,
)
from parity.case import Case
from parity.cases import CASES
from parity.layout import Layout
from parity.ranks import merged
from parity.records import compare
from parity.rotation import part_of_today
from parity.runs import reference
from processes import check_ranks

SCRIPT = str(pathlib.Path(__file__).with_name("ranks.py"))
SECONDS = 900

ACROSS = Bound(
    1e-6,
    "each process optimises a graph of its own, in which the mean over microbatches may be "
    "added in another order; equal bits without TensorFlow's graph optimizer",
)
# In these the first update of Adam, which divides a gradient by its own size, makes of the
# last bit of a gradient near zero a step of another sign.
EXACTLY = ("Transformer, tied embedding", "tied kernel")


# In these a tape does not see all variables, which the exact reference does not know.
NOT_EXACTLY = (
    "gradients of frozen variables",
    "tape that watches some variables",
    "tf.gradients of inputs and frozen variables",
)

# Layouts by hand that cut through a list of tensors, which is a handle: the planner never does.
REFUSED = {("TensorArray across a border", 3): "has the dtype variant"}


class Comparison(NamedTuple):
    """One case in several processes."""

    case: Case
    layout: Layout

    @property
    def is_exact(self) -> bool:
        if self.case.name in NOT_EXACTLY:
            return False
        return self.layout.partitions > 2 or self.case.name in EXACTLY

    @property
    def bound(self) -> Bound:
        if self.case.bound in (SEVERAL_USES, SEVERAL_USES_DOUBLE, JOINED, JOINED_DOUBLE):
            return self.case.bound
        if self.is_exact:
            return BIT_EQUAL
        return ACROSS if self.case.bound in (BIT_EQUAL, REASSOCIATED) else self.case.bound

    def __str__(self) -> str:
        return f"{self.case.name};{self.layout}" + ";exact" * self.is_exact


def of(partitions: int) -> list[Comparison]:
    pairs = [Comparison(case, layout) for case in CASES for layout in case.layouts]
    return [c for c in pairs if c.layout.partitions == partitions and not c.case.heavy]


COUNTS = {2: 6, 3: 2, 4: 2}
if os.environ.get("PARITY_PROCESSES") == "all":
    COUNTS = {n: len(of(n)) for n in COUNTS}
COMPARISONS = {n: part_of_today(of(n), count) for n, count in COUNTS.items()}
ALL = [(n, comparison) for n, comparisons in COMPARISONS.items() for comparison in comparisons]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: Any) -> Any:
    """What all ranks have of a comparison; the processes run at the first question."""
    folders: dict[int, pathlib.Path] = {}

    def get(n: int, comparison: Comparison) -> list[Any]:
        if n not in folders:
            folders[n] = tmp_path_factory.mktemp(f"processes_{n}")
            wanted = [str(c) for c in COMPARISONS[n]]
            check_ranks(SCRIPT, n, args=[folders[n], *wanted], seconds=SECONDS)
        number = COMPARISONS[n].index(comparison)
        return [
            pickle.loads((folders[n] / f"{number}-{rank}.pickle").read_bytes()) for rank in range(n)
        ]

    return get


@pytest.mark.parametrize(
    ("processes", "comparison"), ALL, ids=[f"{n}-{comparison}" for n, comparison in ALL]
)
def test_several_processes_give_the_numbers_of_plain_keras(
    parts: Any, processes: int, comparison: Comparison
) -> None:
    found = parts(processes, comparison)
    case, layout = comparison.case, comparison.layout
    errors = [part for part in found if isinstance(part, str)]
    if (refusal := REFUSED.get((case.name, layout.partitions))) is not None:
        assert len(errors) == processes
        assert all("StepError" in error and refusal in error for error in errors)
        return
    assert not errors, errors[0]
    whole, disagreements = merged(found)
    plain = reference(case, layout.microbatches, exact=comparison.is_exact)
    beyond = [d for d in compare(plain, whole) if not d.relative <= comparison.bound.relative]
    listed = "\n".join(map(str, beyond[:10]))
    assert not beyond, f"{comparison}: {len(beyond)} beyond {comparison.bound}:\n{listed}"
    assert not disagreements or not comparison.is_exact, disagreements[:10]
