"""Steps in functions that read weights and compute with gradients of other ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import check_ranks

PROGRAMS = Path(__file__).with_name("step_reads.py")


@pytest.mark.parametrize("n", [1, 2, 4])
def test_programs_give_the_numbers_of_keras(n):
    config = {"partitions": 2, "microbatches": 2}
    check_ranks(str(PROGRAMS), n, config)
