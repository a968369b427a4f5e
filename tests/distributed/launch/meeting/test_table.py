from __future__ import annotations

import base64
import json
import random
import zlib

import pytest

from opensmp.distributed.launch.meeting.table import Peer, packed, unpacked


def peers(size: int) -> list[Peer]:
    rng = random.Random(size)
    return [
        Peer(rank, f"node{rank // 8}:{rng.randint(1024, 65535)}", f"node{rank // 8} {'3c4f' * 9}",
             rng.randint(2, 1 << 22), "net:[4026531840]")
        for rank in range(size)
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 12, 101, 1001])
def test_table_is_read_as_it_was_written(size):
    message = json.loads(json.dumps(packed(peers(size))))
    assert unpacked(message, size) == tuple(peers(size))
    assert unpacked(message, size + 1) is None


def test_table_of_4096_ranks_takes_a_few_bytes_for_each():
    assert len(json.dumps(packed(peers(4096)))) < 14 * 4096


def columns(**fault: object) -> dict[str, object]:
    whole = {"address": ["a:1", "b:2"], "machine": ["a", "b"], "process": [1, 2]}
    return {**whole, "network": ["", ""], **fault}


@pytest.mark.parametrize(
    "found",
    [
        [],
        {},
        columns(address=["a:1"]),
        columns(address=None),
        columns(machine=[1, 2]),
        columns(process=[True, 1]),
        columns(process=[1 << 63, 1]),
        columns(network=["", {}]),
        columns(machine=["x" * 100_000, ""]),  # longer than rows of two ranks may be
    ],
)
def test_what_is_no_table_is_refused(found):
    rows = base64.b64encode(zlib.compress(json.dumps(found).encode())).decode()
    assert unpacked({"kind": "table", "rows": rows}, 2) is None


@pytest.mark.parametrize("rows", [None, 1, "", "?", "AAAA", "é" * 8])
def test_rows_that_are_not_packed_are_refused(rows):
    assert unpacked({"kind": "table", "rows": rows}, 2) is None
