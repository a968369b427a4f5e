"""A lookup that is the same in each microbatch has the gradient that plain Keras gives it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from processes import check_ranks
from training import positions

import opensmp as smp

SCRIPT = """
import json
import opensmp as smp
smp.init({"partitions": 2, "microbatches": 3})
from training import positions
wrap = smp.DistributedModel.from_keras
found = [positions.fitted(kind, wrap) for kind in (positions.Net, positions.Own)]
print("FOUND", json.dumps(found), flush=True)
"""


def plain():
    return [positions.fitted(kind, lambda model: model) for kind in (positions.Net, positions.Own)]


@pytest.mark.parametrize("microbatches", [1, 3])
def test_one_process(microbatches, smp_init):
    smp_init({"partitions": 2, "microbatches": microbatches})
    wrap = smp.DistributedModel.from_keras
    ours = [positions.fitted(kind, wrap) for kind in (positions.Net, positions.Own)]
    np.testing.assert_allclose(ours, plain(), rtol=2e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_and_replicas(ranks):
    right = plain()
    for result in check_ranks(SCRIPT, ranks):
        (line,) = [line for line in result.lines if line.startswith("FOUND")]
        np.testing.assert_allclose(json.loads(line.removeprefix("FOUND")), right, rtol=2e-5)
