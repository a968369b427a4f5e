"""Optimizer state that replicas have divided is saved and restored like any other."""

from __future__ import annotations

import pathlib

import pytest
from processes import check_ranks, launch
from saving import sharded_state

SCRIPT = str(pathlib.Path(sharded_state.__file__))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Files that two replicas have written, with the key and without it."""
    folder = tmp_path_factory.mktemp("sharded")
    check_ranks(SCRIPT, 2, args=["write", folder, 1], seconds=600)
    return folder


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("ranks", "partitions"), [(1, 1), (2, 1), (4, 2)])
def test_it_is_read_with_and_without_the_key_by_any_number_of_replicas(written, ranks, partitions):
    check_ranks(SCRIPT, ranks, args=["read", written, partitions], seconds=1200)


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_with_the_same_bits(written):
    flags = ["-n", 2, "--partitions", 1, "--max-restarts", 1, "--all-output"]
    result = launch(SCRIPT, flags, args=["go on", written, 1], seconds=600)
    assert result.code == 0, result.stdout + result.stderr
    assert result.stdout.count("went on") == 2
    assert "in one run" not in result.stdout
