from __future__ import annotations

import pytest

from opensmp.compiler.recomputation.policy import Policy, describe_unmatched, is_match


@pytest.mark.parametrize(
    ("pattern", "label", "matches"),
    [
        ("block_*", "block_3", True),
        ("block_*", "block_3/attention/softmax", True),
        ("attention", "block_3/attention/softmax", True),
        ("block_3/attention", "block_3/attention/softmax", True),
        ("block", "block_3", False),
        ("dense", "dense#2", True),
        ("dense#2", "block#3/dense#2", True),
        ("dense#2", "dense", False),
        ("dense#2", "dense#3", False),
        ("Dense", "dense", False),
        ("*", "*", True),
    ],
)
def test_patterns_match_a_layer_and_those_inside_it(pattern, label, matches):
    assert is_match(pattern, label) == matches


def test_layers_override_partitions_and_the_last_pattern_counts():
    policy = Policy(
        "selective", ((1, "full"),), (("block_*", "none"), ("block_2", "full"), ("stem", "none"))
    )
    assert policy.level(0, "head") == "selective"
    assert policy.level(1, "head") == "full"
    assert policy.level(1, "block_1/dense") == "none"
    assert policy.level(0, "block_2/dense") == "full"


def test_a_policy_without_any_level_is_false():
    assert not Policy()
    assert not Policy("none", ((0, "none"),), (("a", "none"),))
    assert Policy("none", ((0, "full"),))
    assert Policy("none", (), (("a", "selective"),))


def test_unknown_layers_are_told_with_the_nearest_name():
    labels = ("*", "encoder", "encoder/block_1")
    policy = Policy("none", (), (("enkoder", "full"), ("block_*", "full")))
    assert policy.unmatched(labels) == ("enkoder",)
    message = describe_unmatched(("enkoder",), labels)
    assert "'enkoder' (did you mean 'encoder'?)" in message
