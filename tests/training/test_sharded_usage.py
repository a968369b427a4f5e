"""What programs do with `shard_optimizer_state`: see `sharded_usage`."""

from __future__ import annotations

import pathlib

import pytest
from processes import check_ranks
from training import sharded_usage
from turns import in_turn

SCRIPT = str(pathlib.Path(sharded_usage.__file__))
USES = ["again", "partitions", "custom", "callbacks", "resume", "errors", "others"]


@pytest.mark.timeout(700)
@pytest.mark.parametrize("use", in_turn(USES, 3))
def test_two_replicas_have_the_bits_of_those_that_have_all_state(tmp_path, use):
    results = check_ranks(SCRIPT, 2, args=[tmp_path, use], seconds=600)
    assert all(f"{use}: good" in result.output for result in results)
