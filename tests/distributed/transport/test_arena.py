from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest

from opensmp.distributed.transport import arena as module
from opensmp.distributed.transport.arena import Arena, share

pytestmark = pytest.mark.skipif(not module._CAN_SHARE, reason="memory is shared on Linux, x86 only")


@pytest.fixture
def ends():
    made = Arena.make(2)
    opened = Arena.opened(made.offer, 2)
    assert opened is not None
    return made, opened


def test_a_key_means_one_region_whoever_asks_first(ends):
    first, second = ends
    a, b = first.region("a", 1000), second.region("b", 5000)
    assert second.region("a", 1000) == a
    assert first.region("b", 5000) == b
    assert first.region("a", 1000) == a
    assert a.number != b.number
    assert a.offset + a.num_bytes <= b.offset


def test_all_see_what_one_writes(ends):
    regions = [end.region("a", 100) for end in ends]
    views = [end.view(region) for end, region in zip(ends, regions, strict=True)]
    views[0][:] = 7
    assert (views[1] == 7).all()
    ends[1].counters[3] = 9
    assert ends[0].counters[3] == 9


def test_when_there_is_no_room_all_are_told_so_also_later(ends):
    first, second = ends
    first._state[2] = first._state[1] + (1 << 20)
    assert first.region("large", 2 << 20) is None
    assert second.region("large", 2 << 20) is None
    first._state[2] += 10 << 20
    assert second.region("large", 2 << 20) is None
    small = second.region("small", 100)
    assert small is not None
    assert first.region("small", 100) == small


def test_a_full_table_has_room_for_no_other_key(ends, monkeypatch):
    monkeypatch.setattr(module, "NUM_REGIONS", 2)
    first, second = ends
    known = [first.region(key, 10) for key in "ab"]
    assert first.region("c", 10) is None
    assert second.region("c", 10) is None
    assert [second.region(key, 10) for key in "ab"] == known


def test_other_memory_is_not_taken_for_it(ends):
    process, descriptor, _ = ends[0].offer
    assert Arena.opened((process, descriptor, b"x" * 16), 2) is None
    assert Arena.opened((process, 9999, b"x" * 16), 2) is None
    assert Arena.opened(ends[0].offer, 4096) is None  # smaller than it would be


def test_ranks_that_cannot_open_it_are_left_out():
    offers = []

    def gather(value):
        offers.append(value)
        return [value, value, None if len(offers) == 1 else False, value]

    arena, members = share(0, (0, 1, 2), gather)
    assert arena is not None
    assert members == (0, 1)
    assert share(3, (3,), lambda value: [None, None, None, value]) == (None, ())


RACING = """
import json, random, sys
from opensmp.distributed.transport.arena import Arena
process, descriptor, nonce, seed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
arena = Arena.opened((process, descriptor, bytes.fromhex(nonce)), 2)
keys = list(range(300))
random.Random(seed).shuffle(keys)
print(json.dumps({key: arena.region(str(key), 100 + key) for key in keys}, sort_keys=True))
"""


def test_processes_that_ask_at_the_same_time_get_the_same_regions():
    made = Arena.make(2)
    process, descriptor, nonce = made.offer
    arguments = [str(process), str(descriptor), nonce.hex()]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACING, *arguments, seed], stdout=subprocess.PIPE, text=True
        )
        for seed in "abcd"
    ]
    found = [json.loads(racer.communicate(timeout=100)[0]) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers)
    assert all(each == found[0] for each in found)
    spans = sorted((offset, offset + size) for _, offset, size in found[0].values())
    assert len(spans) == 300
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))
