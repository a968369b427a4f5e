from __future__ import annotations

import itertools

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from opensmp.distributed.collectives import keys
from opensmp.distributed.collectives.keys import KeyRegistry, instance_of_shape
from opensmp.errors import CommunicationError


def test_regular_groups_below_1024_ranks_have_different_keys():
    registry = KeyRegistry()
    groups = {
        tuple(range(start, start + stride * count, stride))
        for start, stride, count in itertools.product(range(12), range(1, 6), range(1, 9))
    }
    assert len({registry.group(group) for group in groups}) == len(groups)


@given(ranks=st.sets(st.integers(0, 5000), min_size=1, max_size=9))
def test_key_is_a_positive_32_bit_number_that_depends_on_the_ranks_alone(ranks):
    members = sorted(ranks)
    key = KeyRegistry().group(members)
    assert 0 < key < 2**31
    assert KeyRegistry().group(tuple(members)) == key


def test_other_devices_are_another_group():
    registry = KeyRegistry()
    plain = registry.group((0, 1))
    assert registry.group((0, 1), ("GPU:0", "GPU:0")) != plain
    assert registry.group((0, 1), ("GPU:0", "GPU:1")) != registry.group((0, 1), ("GPU:0", "GPU:0"))


@pytest.mark.parametrize("ranks", [(), (1, 0), (0, 0)])
def test_ranks_must_be_different_and_ascending(ranks):
    with pytest.raises(ValueError, match="different and ascending"):
        KeyRegistry().group(ranks)


def test_instance_keys_are_the_same_in_every_process():
    meaning = ("activation", 3, "float32", (32, 128))
    assert KeyRegistry().instance(5, meaning) == KeyRegistry().instance(5, meaning)
    assert KeyRegistry().instance(5, meaning) != KeyRegistry().instance(
        5, ("gradient", *meaning[1:])
    )
    assert 0 < KeyRegistry().instance(5, meaning) < 2**31


def test_second_meaning_of_a_number_is_refused(monkeypatch):
    monkeypatch.setattr(keys, "_hash", lambda meaning, below: 7)
    registry = KeyRegistry()
    registry.instance(5, ("a",))
    assert registry.instance(5, ("a",)) == registry.instance(6, ("b",))
    with pytest.raises(CommunicationError, match=r"means \('a',\) and cannot mean \('b',\)"):
        registry.instance(5, ("b",))
    registry.group((0, 1, 5))
    with pytest.raises(CommunicationError, match=r"\(0, 1, 5\) and \(0, 1, 6\) have the same key"):
        registry.group((0, 1, 6))


def test_shapes_that_are_known_late_have_different_keys():
    """Batch and last dimension trade places in all ways that a weighted sum would confuse."""
    shapes = [[a, 1, 1, b] for a in range(0, 400, 3) for b in range(1, 40, 3)]
    shapes += [[a, b] for a in (1, 2, 40504, 81007) for b in range(1, 60)]
    found = {}
    for shape in shapes:
        key = int(instance_of_shape(tf.constant(shape, tf.int32)))
        assert 1 <= key < 1 << 31
        found.setdefault((len(shape), key), []).append(shape)
    assert [same for same in found.values() if len(same) > 1] == []
    again = tf.function(instance_of_shape)(tf.constant(shapes[-1], tf.int32))
    assert int(again) == key
