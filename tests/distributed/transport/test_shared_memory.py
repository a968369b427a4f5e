from __future__ import annotations

import itertools

import tensorflow as tf
from sharing import HERE, LARGE, share_in_two_threads, transfer

from opensmp.distributed.transport import shared_memory
from opensmp.distributed.transport.shared_memory import PLACES, rooms
from opensmp.distributed.transport.transfer import Transfer


def test_tensors_of_known_shape_go_by_shared_memory():
    listed = [
        transfer(LARGE),
        transfer([]),
        transfer([None, 100_000]),
        transfer([200_000], "bfloat16"),
        transfer([200_000], tf.string),
        transfer([100_000], tf.bool),
        transfer([0, 3]),
        transfer(LARGE, source=1, target=0),
        Transfer(tf.Graph().as_graph_def, None, 0, 1),
    ]
    found = rooms(listed, HERE)
    assert {pair: set(room.slots) for pair, room in found.items()} == {
        (0, 1): {0, 1, 3, 5, 8},
        (1, 0): {7},
    }
    slots = sorted(found[0, 1].slots.values(), key=lambda slot: slot.offset)
    for one, other in itertools.pairwise(slots):
        assert other.offset >= one.offset + PLACES * one.num_bytes
    assert [slot.num_bytes for slot in slots] == [80_000, 4, 400_000, 100_000, 0]
    assert found[0, 1].size >= slots[-1].offset


def test_nothing_is_shared_between_machines():
    assert rooms([transfer(LARGE)], ["a", "b"]) == {}


def test_what_would_be_too_much_travels_as_before(monkeypatch):
    monkeypatch.setattr(shared_memory, "MOST_BYTES", 400_000)
    (room,) = rooms([transfer(LARGE) for _ in range(5)], HERE).values()
    assert set(room.slots) == {0, 1}
    assert room.size <= 400_000


def test_both_processes_see_what_one_writes():
    all_rooms = rooms([transfer([300, 100]), transfer([40_001], "bool"), transfer([])], HERE)
    here, there = share_in_two_threads(all_rooms)
    sender, receiver = here[0, 1], there[0, 1]
    slots = all_rooms[0, 1].slots
    for number, (size, dtype) in enumerate([(30_000, "int32"), (40_001, "uint8"), (1, "int32")]):
        written, read = sender.places(slots[number]), receiver.places(slots[number])
        assert (read.shape, read.dtype) == ((PLACES, size), dtype)
        for place in range(PLACES):
            written[place] = 1 + number + place
    sender.counters[:] = [5, 6, 7]
    receiver.ended[0] = 4
    for number in range(3):
        for place in range(PLACES):
            assert (receiver.places(slots[number])[place] == 1 + number + place).all()
    assert receiver.counters.tolist() == [5, 6, 7]
    assert sender.ended.tolist() == [4]


def test_a_pair_that_cannot_see_each_other_does_without(monkeypatch):
    monkeypatch.setattr(shared_memory, "_opened", lambda *_: None)
    assert share_in_two_threads(rooms([transfer(LARGE)], HERE)) == ({}, {})


def test_nothing_is_shared_where_writes_may_be_seen_in_another_order(monkeypatch):
    monkeypatch.setattr(shared_memory, "_CAN_SHARE", False)
    assert share_in_two_threads(rooms([transfer(LARGE)], HERE)) == ({}, {})


def test_memory_of_another_process_is_not_taken_for_ours():
    (room,) = rooms([transfer(LARGE)], HERE).values()
    here, _ = share_in_two_threads({(0, 1): room})
    nonce = here[0, 1].nonce
    assert len(nonce) == 16
    assert shared_memory._opened(room, 1, 0, nonce) is None


def test_transfers_use_the_buffers_of_those_that_have_been_read():
    listed = [transfer(LARGE), transfer(LARGE), transfer([9]), transfer(LARGE), transfer(LARGE)]
    read_before = [0, 0, 0b1, 0b1, 0b1011]
    (room,) = rooms(listed, HERE, read_before).values()
    offsets = [room.slots[number].offset for number in range(5)]
    assert offsets[3] == offsets[0] != offsets[1]
    assert offsets[2] not in offsets[:2]  # another size
    assert offsets[4] in (offsets[1], offsets[3])
    assert sorted(slot.position for slot in room.slots.values()) == [0, 1, 2, 3, 4]
    assert room.size < 5 * PLACES * 80_000


def test_a_buffer_is_not_used_by_two_that_may_meet():
    listed = [transfer(LARGE) for _ in range(4)]
    (room,) = rooms(listed, HERE, [0, 0b1, 0b1, 0b1]).values()  # three follow one
    offsets = [room.slots[number].offset for number in range(4)]
    assert len(set(offsets)) == 3
